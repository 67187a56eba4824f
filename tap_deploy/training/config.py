"""TrainingConfig: the settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tap_deploy.config import DEMO, VARIANTS, TapConfig
from tap_deploy.errors import InputError

DTYPES = ("auto", "float32", "bfloat16")

DEMO_MODEL = VARIANTS[DEMO]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a training run.

    Attributes:
        model: configuration of the model.
        seed: seed of weights, scenes and prompts; together with the step it determines a batch.
        steps: length of the run, steps; the learning rate falls to 0 at its end.
        pictures_per_step: scenes per batch, B.
        regions_per_picture: prompts per scene, R; a batch has P = B * R regions.
        learning_rate: peak learning rate of Muon and AdamW; see ``optimizer.py``.
        warmup_steps: steps of linear warm-up.
        weight_decay: weight decay of all parameters. It includes biases: without it, a QK product
            can exceed the range of float16, as in TAP v1.0.
        max_gradient_norm: gradients are clipped to this norm.
        average_decay: decay of the moving average of the weights, which is the final model.
        mask_weight: weight of focal and dice loss. Outlines take longest to learn.
        iou_weight: weight of the squared error of IoU predictions.
        concept_weight: weight of the KL divergence in the concept space.
        caption_weight: weight of the cross-entropy of captions.
        dense_weight: initial weight of the auxiliary heads.
        dense_fade_from: fraction of the run, 0..1, from which ``dense_weight`` falls.
        dense_fade_to: fraction of the run, 0..1, from which ``dense_weight`` is 0.
        box_noise: maximum shift of the edges of a box prompt, as a fraction of its sides.
        max_extra_points: maximum number of points that the second stage adds to a prompt.
        sketch_share: fraction of prompts, 0..1, whose extra points are drawn from the object, as
            in a sketch, and not from the error.
        dtype: dtype of matrix products: ``float32``, ``bfloat16``, or ``auto`` for bfloat16 on a
            GPU.

    Raises:
        InputError: a value is out of range.
    """

    model: TapConfig = DEMO_MODEL
    seed: int = 0
    steps: int = 6_000
    pictures_per_step: int = 16
    regions_per_picture: int = 3
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.05
    max_gradient_norm: float = 1.0
    average_decay: float = 0.999
    mask_weight: float = 2.0
    iou_weight: float = 1.0
    concept_weight: float = 1.0
    caption_weight: float = 2.0
    dense_weight: float = 1.0
    dense_fade_from: float = 0.75
    dense_fade_to: float = 0.95
    box_noise: float = 0.1
    max_extra_points: int = 8
    sketch_share: float = 0.5
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "pictures_per_step", "regions_per_picture", "max_extra_points"):
            self._require_range(name, 1, math.inf)
        for name in ("seed", "warmup_steps", "weight_decay"):
            self._require_range(name, 0, math.inf)
        for name in (
            "mask_weight",
            "iou_weight",
            "concept_weight",
            "caption_weight",
            "dense_weight",
        ):
            self._require_range(name, 0, math.inf)
        for name in ("learning_rate", "max_gradient_norm"):
            self._require_range(name, 1e-12, math.inf)
        self._require_range("average_decay", 0, 1 - 1e-9)
        self._require_range("box_noise", 0, 0.4)  # from 0.5 on, opposite edges could cross
        for name in ("dense_fade_from", "dense_fade_to", "sketch_share"):
            self._require_range(name, 0, 1)
        if self.dense_fade_from > self.dense_fade_to:
            raise InputError(
                f"dense_fade_from is {self.dense_fade_from}; expected at most dense_fade_to "
                f"({self.dense_fade_to})"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")

    def _require_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high or math.isinf(value):
            upper = "" if math.isinf(high) else f" and at most {high:g}"
            raise InputError(f"{name} is {value}; expected at least {low:g}{upper}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, cosine decay."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * min(1.0, done))) / 2

    def dense_weight_at(self, step: int) -> float:
        """Return the weight of the auxiliary heads at a step, counted from 0."""
        part = step / self.steps
        if part < self.dense_fade_from:
            return self.dense_weight
        if part >= self.dense_fade_to:
            return 0.0
        left = (self.dense_fade_to - part) / (self.dense_fade_to - self.dense_fade_from)
        return self.dense_weight * left

    def average_decay_at(self, step: int) -> float:
        """Return the decay of the moving average at a step; it is lower at first, to skip noise."""
        return min(self.average_decay, (1 + step) / (10 + step))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TrainingConfig:
        """Return the config from the result of ``to_dict``.

        Raises:
            InputError: the value is not an object, or a field is unknown, missing or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise InputError(f"training config contains {found}; expected exactly {sorted(names)}")
        return cls(**values | {"model": TapConfig.from_dict(values["model"])})
