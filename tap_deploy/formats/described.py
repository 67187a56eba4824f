"""What the formats need of the regions of a picture; ``Regions`` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class DescribedRegions(Protocol):
    """The regions of one picture with their words, see ``tap_deploy.regions.Regions``."""

    @property
    def image_height(self) -> int:
        """H, pixels."""

    @property
    def image_width(self) -> int:
        """W, pixels."""

    @property
    def masks(self) -> npt.NDArray[np.bool_] | None:
        """Bool [P, H, W]; None where there are run lengths in place of them, or nothing."""

    @property
    def iou_predictions(self) -> npt.NDArray[np.float32]:
        """float32 [P]."""

    @property
    def concepts(self) -> list[list[tuple[str, float]]] | None:
        """Per region the (name, probability) of its likeliest concepts; None without concepts."""

    @property
    def captions(self) -> list[str] | None:
        """P texts; None without captions."""

    def __len__(self) -> int:
        """P, the number of regions."""

    def likeliest(self, index: int) -> tuple[str, float] | None:
        """Return the likeliest concept of a region and its probability, None without concepts."""

    def name(self, index: int) -> str | None:
        """Return the likeliest concept of a region, None without concepts."""

    def to_coco(
        self, image_id: int, category_ids: Mapping[str, int] | None, first_id: int
    ) -> list[dict[str, Any]]:
        """Return COCO annotations."""
