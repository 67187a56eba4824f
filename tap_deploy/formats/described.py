"""The protocol that the formats require of regions; ``Regions`` implements it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class DescribedRegions(Protocol):
    """The regions of one picture with concepts and captions; see ``tap_deploy.regions.Regions``."""

    @property
    def image_height(self) -> int:
        """Height H of the picture, pixels."""

    @property
    def image_width(self) -> int:
        """Width W of the picture, pixels."""

    @property
    def masks(self) -> npt.NDArray[np.bool_] | None:
        """Masks, bool [P, H, W]; None if they are stored as run lengths or were not requested."""

    @property
    def iou_predictions(self) -> npt.NDArray[np.float32]:
        """Predicted IoU of each mask, float32 [P]."""

    @property
    def concepts(self) -> list[list[tuple[str, float]]] | None:
        """(name, probability) of the likeliest concepts per region; None without concepts."""

    @property
    def captions(self) -> list[str] | None:
        """P captions; None without captions."""

    def __len__(self) -> int:
        """Number of regions P."""

    def likeliest(self, index: int) -> tuple[str, float] | None:
        """Return the likeliest concept of a region and its probability; None without concepts."""

    def name(self, index: int) -> str | None:
        """Return the name of a region's likeliest concept; None without concepts."""

    def to_coco(
        self, image_id: int, category_ids: Mapping[str, int] | None, first_id: int
    ) -> list[dict[str, Any]]:
        """Return the regions as COCO annotations."""
