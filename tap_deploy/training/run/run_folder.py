"""The folder of a training run: its config, tokenizer, concepts, state, progress and result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from tap_deploy.storage.files import atomic_file, new_folder, sha256_of_file
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.run.progress import training_summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Paths of the files of a run.

    ``model.safetensors`` is the averaged model in float32, and ``model.json`` its config; with
    ``tokenizer.model`` and ``concepts.npz`` they are the input of ``tap-export export``.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Path of the ``TrainingConfig``."""
        return self.path / "training.json"

    @property
    def state(self) -> Path:
        """Path of the state to resume from."""
        return self.path / "state.pt"

    @property
    def progress(self) -> Path:
        """Path of the reports, JSON lines; see ``Progress``."""
        return self.path / "progress.jsonl"

    @property
    def history(self) -> Path:
        """Path of hand-written notes about changes during the run, Markdown; optional.

        The model card includes them.
        """
        return self.path / "history.md"

    @property
    def initial_weights(self) -> Path:
        """Path of the initial checkpoint; it does not exist for new weights."""
        return self.path / "initial.safetensors"

    @property
    def origin(self) -> Path:
        """Path of the description of the initial weights, see ``begin``."""
        return self.path / "origin.json"

    @property
    def tokenizer(self) -> Path:
        """Path of the SentencePiece model."""
        return self.path / "tokenizer.model"

    @property
    def concepts(self) -> Path:
        """Path of the vocabulary."""
        return self.path / "concepts.npz"

    @property
    def model(self) -> Path:
        """Path of the weights of the averaged model."""
        return self.path / "model.safetensors"

    @property
    def model_config(self) -> Path:
        """Path of the ``TapConfig`` of the model."""
        return self.path / "model.json"

    def begin(
        self,
        config: TrainingConfig,
        vocabulary: Vocabulary,
        tokenizer: bytes,
        weights: Path | None = None,
    ) -> None:
        """Make the folder with the initial files of a run.

        Args:
            config: config of the run.
            vocabulary: names of the scenes, in their order.
            tokenizer: content of a SentencePiece model.
            weights: initial checkpoint, which is copied; None for new weights. Its digest and, if
                it is the model of a run, the summary of that run, are written to ``origin``.

        Raises:
            InputError: the folder already contains a run, or cannot be made.
            CheckpointError: the weights cannot be read, or belong to another model.
        """
        if self.config.exists():
            raise InputError(
                f"{self.path} already contains a training run; pass --resume to continue it, or "
                "choose another folder"
            )
        model = None if weights is None else load_checkpoint(weights, config.model)[0]
        with new_folder(self.path):
            with atomic_file(self.tokenizer) as partial:
                partial.write_bytes(tokenizer)
            vocabulary.save(self.concepts)
            self.initial_weights.unlink(missing_ok=True)  # left by a failed start
            if weights is not None and model is not None:
                save_checkpoint(model, self.initial_weights)
                _write_json(self.origin, _origin(weights))
            _write_json(self.model_config, config.model.to_dict())
            _write_json(self.config, config.to_dict())  # last: this file marks the run as started

    def read_config(self) -> TrainingConfig:
        """Return the config of the run.

        Raises:
            InputError: the folder contains no run.
        """
        try:
            values = json.loads(self.config.read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise InputError(
                f"{self.path} contains no training run ({exc}); start one without --resume"
            ) from exc
        return TrainingConfig.from_dict(values)

    def is_finished(self) -> bool:
        """Whether the last step of the run was reported.

        Raises:
            InputError: the folder contains no run, or its reports cannot be read.
        """
        steps = self.read_config().steps
        return self.reported_step() == steps

    def reported_step(self) -> int:
        """Return the step of the last report; 0 before the first.

        Raises:
            InputError: the reports cannot be read.
        """
        return int(training_summary(self.progress)["step"]) if self.progress.exists() else 0

    def summary(self) -> dict[str, Any]:
        """Return the settings and the state of the run, JSON types.

        Returns:
            The result of ``training_summary``, the fields of the config except ``model``, and as
            ``origin`` the description of the initial weights, None for new ones.

        Raises:
            InputError: the folder contains no run, or the run has no report.
        """
        settings = self.read_config().to_dict()
        del settings["model"]  # stored in a separate file
        origin = None
        if self.origin.exists():
            origin = json.loads(self.origin.read_text("utf-8"))
        elif self.initial_weights.exists():  # a run from before origin.json was introduced
            origin = {"sha256": sha256_of_file(self.initial_weights), "run": None}
        return training_summary(self.progress) | settings | {"origin": origin}

    def change_steps(self, steps: int) -> None:
        """Change the number of steps of the run.

        Raises:
            InputError: the folder contains no run, or ``steps`` is out of range.
        """
        config = dataclasses.replace(self.read_config(), steps=steps)
        _write_json(self.config, config.to_dict())


def _origin(weights: Path) -> dict[str, Any]:
    """Return the digest of weights, and the summary of the run that made them, if any."""
    run = RunFolder(path=weights.parent)
    is_of_run = weights.name == run.model.name and run.config.exists() and run.progress.exists()
    return {"sha256": sha256_of_file(weights), "run": run.summary() if is_of_run else None}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
