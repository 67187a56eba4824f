"""The trainer: weights, their average, the optimizer and the step, saved in one file."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import CheckpointError, InputError, first_line
from tap_deploy.reference.checkpoint import load_checkpoint
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.weight_files import write_torch
from tap_deploy.storage.files import atomic_file
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.objective.batches import Batch
from tap_deploy.training.objective.losses import ConceptSpace
from tap_deploy.training.objective.objective import AuxiliaryHeads, Losses, Objective
from tap_deploy.training.run.initialize import new_model
from tap_deploy.training.run.optimizer import Optimizer
from tap_deploy.training.run.progress import Means
from tap_deploy.training.run.weight_average import WeightAverage


class Trainer:
    """A training run at some step.

    The step and the tensors of the state determine how it continues: on a CPU, a run that is saved
    and loaded again gives exactly the same result as an uninterrupted one.

    Attributes:
        config: config of the run.
        step: steps done so far, which is the index of the next batch.
        device: torch device.
        unreported: the means of the steps since the last report, of which the state keeps a copy:
            the run may be killed before it writes the report.
    """

    def __init__(
        self,
        config: TrainingConfig,
        vocabulary: Vocabulary,
        device: torch.device,
        weights: Path | None = None,
    ) -> None:
        """Start a run.

        Args:
            config: config of the run.
            vocabulary: the concepts.
            device: torch device.
            weights: initial checkpoint; None for new weights.

        Raises:
            InputError: the vocabulary does not fit the model.
            CheckpointError: the weights cannot be read, or belong to another model.
        """
        expected = config.model.sem_embed_dim
        if vocabulary.weights.shape[0] != expected:
            raise InputError(
                f"concept vectors have {vocabulary.weights.shape[0]} numbers; expected {expected}, "
                "sem_embed_dim of the model"
            )
        self.config, self.device, self.step = config, device, 0
        self.unreported = Means()
        model = new_model(config.model, config.seed)
        if weights is not None:
            model.load_state_dict(load_checkpoint(weights, config.model)[0].state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            heads = AuxiliaryHeads(config.model.image_embed_dim, len(vocabulary))
        self.objective = Objective(config, model, heads, ConceptSpace(vocabulary)).to(device)
        self.average = WeightAverage(self.objective.model)
        self.optimizer = Optimizer(
            self.objective.model, heads, config.learning_rate, config.weight_decay
        )
        self._dtype = _dtype(config.dtype, device)

    @property
    def averaged_model(self) -> TapModel:
        """The averaged model, in evaluation mode."""
        model: TapModel = self.average.model  # type: ignore[assignment]
        return model

    def train_step(self, batch: Batch) -> Losses:
        """Train on the batch of ``self.step``, and increment the step.

        Raises:
            CheckpointError: the loss is NaN or infinite.
        """
        self.optimizer.learning_rate = self.config.learning_rate_at(self.step)
        losses: Losses = self.objective(batch.to(self.device), self.step, self._dtype)
        self.optimizer.zero_grad()
        losses.total.backward()
        total = float(losses.total.detach())
        if not math.isfinite(total):
            raise CheckpointError(
                f"the loss is {total} in step {self.step}; expected a finite number; start again "
                "with a lower learning rate"
            )
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.max_gradient_norm)
        self.optimizer.step()
        self.average.update(self.config.average_decay_at(self.step))
        self.step += 1
        return losses

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state; an existing file is replaced atomically.

        Raises:
            InputError: it cannot be written, for example because the disk is full.
        """
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "model": self.objective.model.state_dict(),
            "heads": self.objective.heads.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "unreported": dataclasses.asdict(self.unreported),
        }
        with atomic_file(path) as partial:
            write_torch(state, partial)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a state that ``save`` has written.

        Its config may differ in ``steps``; the learning rate follows the current value.

        Raises:
            CheckpointError: the file is missing or corrupt, belongs to another config, or has done
                more steps than the length of the run.
        """
        state = _read_state(Path(path))
        if state["config"] | {"steps": self.config.steps} != self.config.to_dict():
            raise CheckpointError(
                f"training state {path} belongs to another config; resume with the config that it "
                "was started with"
            )
        if state["step"] > self.config.steps:
            raise CheckpointError(
                f"training state {path} has done {state['step']} steps; expected at most "
                f"{self.config.steps}, the length of the run; pass a larger --steps"
            )
        self.step = int(state["step"])
        self.objective.model.load_state_dict(state["model"])
        self.objective.heads.load_state_dict(state["heads"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.unreported = Means(**state.get("unreported", {}))


def steps_done(path: str | os.PathLike[str]) -> int:
    """Return the steps done in a state that ``Trainer.save`` has written.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    return int(_read_state(Path(path))["step"])


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch raises anything on corrupt files
        raise CheckpointError(f"training state {path} cannot be read ({first_line(exc)})") from exc
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise CheckpointError(
            f"training state {path} contains other data; expected the state.pt of a training run"
        )
    return state


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
