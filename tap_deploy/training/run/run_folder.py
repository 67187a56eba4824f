"""The folder of a training run: its config, tokenizer, concepts, state, progress and result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from tap_deploy.storage.files import atomic_file, sha256_of_file
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.run.progress import training_summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where the files of a run are.

    ``model.safetensors`` is the averaged model, float32, and ``model.json`` its sizes; with
    ``tokenizer.model`` and ``concepts.npz`` they are what ``tap-export export`` takes.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Return the file of the ``TrainingConfig``."""
        return self.path / "training.json"

    @property
    def state(self) -> Path:
        """Return the file to resume from."""
        return self.path / "state.pt"

    @property
    def progress(self) -> Path:
        """Return the file of JSON lines, see ``Progress``."""
        return self.path / "progress.jsonl"

    @property
    def history(self) -> Path:
        """Return the file in which a person tells what was changed during the run, if anything.

        Markdown; the model card quotes it.
        """
        return self.path / "history.md"

    @property
    def initial_weights(self) -> Path:
        """Return the checkpoint that the run begins with; not there if weights are new."""
        return self.path / "initial.safetensors"

    @property
    def origin(self) -> Path:
        """Return the file that says where the initial weights are from, see ``begin``."""
        return self.path / "origin.json"

    @property
    def tokenizer(self) -> Path:
        """Return the SentencePiece model."""
        return self.path / "tokenizer.model"

    @property
    def concepts(self) -> Path:
        """Return the vocabulary."""
        return self.path / "concepts.npz"

    @property
    def model(self) -> Path:
        """Return the weights of the averaged model."""
        return self.path / "model.safetensors"

    @property
    def model_config(self) -> Path:
        """Return the file of its ``TapConfig``."""
        return self.path / "model.json"

    def begin(
        self,
        config: TrainingConfig,
        vocabulary: Vocabulary,
        tokenizer: bytes,
        weights: Path | None = None,
    ) -> None:
        """Make the folder with all that a run begins with.

        Args:
            config: of the run.
            vocabulary: of the names of the scenes, in their order.
            tokenizer: a SentencePiece model.
            weights: checkpoint to begin with, which is copied; None for new weights. Its digest
                and, if it is the model of a run, what that run was, are written to ``origin``.

        Raises:
            InputError: a run was begun here before, or the folder cannot be made.
            CheckpointError: the weights cannot be read, or are those of another model.
        """
        if self.config.exists():
            raise InputError(
                f"{self.path} holds a training run already; pass --resume to continue it, or "
                "choose another folder"
            )
        model = None if weights is None else load_checkpoint(weights, config.model)[0]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InputError(f"cannot make folder {self.path}: {exc.strerror}") from exc
        with atomic_file(self.tokenizer) as partial:
            partial.write_bytes(tokenizer)
        vocabulary.save(self.concepts)
        self.initial_weights.unlink(missing_ok=True)  # of a beginning that failed
        if weights is not None and model is not None:
            save_checkpoint(model, self.initial_weights)
            _write_json(self.origin, _origin(weights))
        _write_json(self.model_config, config.model.to_dict())
        _write_json(self.config, config.to_dict())  # last: from now on the run has begun

    def read_config(self) -> TrainingConfig:
        """Return the config that the run was begun with.

        Raises:
            InputError: no run was begun here.
        """
        try:
            values = json.loads(self.config.read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise InputError(f"{self.path} holds no training run ({exc}); begin one first") from exc
        return TrainingConfig.from_dict(values)

    def is_finished(self) -> bool:
        """Whether the last step of the run was reported.

        Raises:
            InputError: no run was begun here, or its reports cannot be read.
        """
        steps = self.read_config().steps
        return self.progress.exists() and training_summary(self.progress)["step"] == steps

    def summary(self) -> dict[str, Any]:
        """Return what the run is and how far it has come, JSON types.

        Returns:
            what ``training_summary`` says, the fields of the config but ``model``, and under
            ``origin`` what ``begin`` wrote of the initial weights, null for new ones.

        Raises:
            InputError: no run was begun here, or it holds no report.
        """
        settings = self.read_config().to_dict()
        del settings["model"]  # in a file of its own
        origin = None
        if self.origin.exists():
            origin = json.loads(self.origin.read_text("utf-8"))
        elif self.initial_weights.exists():  # begun before this was written down
            origin = {"sha256": sha256_of_file(self.initial_weights), "run": None}
        return training_summary(self.progress) | settings | {"origin": origin}

    def change_steps(self, steps: int) -> None:
        """Make the run shorter or longer, before it goes on.

        Raises:
            InputError: no run was begun here, or a wrong number of steps.
        """
        config = dataclasses.replace(self.read_config(), steps=steps)
        _write_json(self.config, config.to_dict())


def _origin(weights: Path) -> dict[str, Any]:
    """Describe weights: their digest, and the run that they are the model of, if any."""
    run = RunFolder(path=weights.parent)
    is_of_run = weights.name == run.model.name and run.config.exists() and run.progress.exists()
    return {"sha256": sha256_of_file(weights), "run": run.summary() if is_of_run else None}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
