"""Captions as classes, which the auxiliary head predicts for the object in each cell."""

from __future__ import annotations

from tap_deploy.training.scenes.captions import LARGE, PLACES, RELATIONS, SMALL, CaptionParts
from tap_deploy.training.scenes.colors import COLOR_WORDS
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES

_SIZES = ("", SMALL, LARGE)
_COLORS = ("", *COLOR_WORDS)
_WHERE = (*(place for row in PLACES for place in row), *RELATIONS)
_NEIGHBORS = ("", *OBJECT_NAMES)

CLASS_COUNTS: tuple[int, ...] = (len(_SIZES), len(_COLORS), len(_WHERE), len(_NEIGHBORS))


def caption_classes(parts: CaptionParts) -> tuple[int, ...]:
    """Return the classes of size, colour, place or relation, and neighbour.

    Each is below its entry in ``CLASS_COUNTS``. The name is left out, because it is predicted
    separately for every cell.
    """
    return (
        _SIZES.index(parts.size),
        _COLORS.index(parts.color),
        _WHERE.index(parts.relation or parts.place),
        _NEIGHBORS.index(parts.neighbor),
    )
