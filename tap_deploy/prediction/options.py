"""Validated options of a prediction."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Literal

import numpy as np

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError, require_int, require_share

Masks = bool | Literal["rle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of one prediction; see ``TapPredictor.predict`` for their meaning.

    Attributes:
        top_k: names per region.
        masks: True for full-size masks, "rle" for run lengths, False for neither.
        captions: whether captions are written.
        vocabulary: concepts that regions are classified into; None for no names.
        max_new_tokens: maximum caption length, tokens; None for the model's maximum.
        temperature: 0 for greedy decoding, above 0 to sample.
        seed: seed of the sampling; None for a random one.
        candidates: whether the masks of all mask tokens are returned.
        clip: whether prompts outside the picture are moved to its border.

    Raises:
        InputError: invalid value.
    """

    top_k: int
    masks: Masks
    captions: bool
    vocabulary: Vocabulary | None
    max_new_tokens: int | None
    temperature: float
    seed: int | None
    candidates: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        require_int("top_k", self.top_k, 1)
        if not isinstance(self.masks, bool) and self.masks != "rle":
            raise InputError(f"masks is {self.masks!r}; expected True, False or 'rle'")
        if self.max_new_tokens is not None:
            require_int("max_new_tokens", self.max_new_tokens, 0)
        if self.seed is not None:
            require_int("seed", self.seed, 0)
        _require_temperature(self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Options of ``TapPredictor.everything``; see there for their meaning.

    Raises:
        InputError: invalid value.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.6
    stability_score_thresh: float = 0.6
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    mask_nms_thresh: float = 0.5
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1

    def __post_init__(self) -> None:
        require_int("points_per_side", self.points_per_side, 1)
        require_int("crop_n_layers", self.crop_n_layers, 0)
        require_int("crop_n_points_downscale_factor", self.crop_n_points_downscale_factor, 1)
        # The predicted IoU is an output of the model without bounds.
        _require_number("pred_iou_thresh", self.pred_iou_thresh, -np.inf)
        _require_number("stability_score_offset", self.stability_score_offset, 0)
        for name in (
            "stability_score_thresh",
            "box_nms_thresh",
            "mask_nms_thresh",
            "crop_nms_thresh",
            "crop_overlap_ratio",
        ):
            require_share(name, getattr(self, name))

    def points_of_layer(self, layer: int) -> int:
        """Return the points per side on a crop of a layer; layer 0 is the whole picture."""
        factor: int = self.crop_n_points_downscale_factor**layer
        return max(1, self.points_per_side // factor)


def check_vocabulary(vocabulary: Any, config: TapConfig) -> None:
    """Raise InputError unless ``vocabulary`` is a ``Vocabulary`` for this model."""
    if not isinstance(vocabulary, Vocabulary):
        raise InputError(
            f"vocabulary is a {type(vocabulary).__name__}; expected a Vocabulary, "
            "see Vocabulary.load"
        )
    found, expected = vocabulary.weights.shape[0], config.sem_embed_dim
    if found != expected:
        raise InputError(
            f"concept weights have {found} rows; expected {expected}, "
            "the semantic embedding of this model"
        )


def _require_number(name: str, value: Any, minimum: float) -> None:
    most = float(np.finfo(np.float32).max)  # it is compared with float32
    if not (isinstance(value, numbers.Real) and max(minimum, -most) <= float(value) <= most):
        least = "" if minimum == -np.inf else f" of at least {minimum}"
        raise InputError(f"{name} is {value!r}; expected a number{least}, in the range of float32")


def _require_temperature(value: Any) -> None:
    smallest = np.finfo(np.float32).tiny  # dividing logits by less overflows
    is_number = isinstance(value, numbers.Real)
    if not is_number or not (value == 0 or smallest <= value < float("inf")):
        raise InputError(f"temperature is {value!r}; expected 0, or {smallest:.0e} or more")
