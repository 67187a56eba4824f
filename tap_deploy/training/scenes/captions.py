"""Captions of objects, by rules that a picture always determines.

    caption   = article [size] [color] name place-or-neighbor
    size      = "small" | "large"                   longer side of the box of the visible part
    color     = "red" | "orange" | … | "white"      most of the visible pixels; colors.py
    place     = "at the top left" | "at the top" | "at the top right"
              | "on the left" | "in the center" | "on the right"
              | "at the bottom left" | "at the bottom" | "at the bottom right"
    neighbor  = ("left of" | "right of" | "above" | "below") article name
    article   = "an" before a, e, i, o, u; else "a"

- An object is small if its longer side is at most 9/32 of the picture, and large from 7/16 on.
- The place is the third of the picture, across and down, that contains the centre of the box.
- If exactly one other box is near (touching, overlapping, or within 1/64 of the picture), the
  caption gives its name and direction instead of the place. The direction is that of the centres.
- The caption gives a colour only for objects with one main colour.

Close to the border between two words, neither is clearly right. Each rule therefore has a margin
in which it returns None, and scenes are made so that no object lies in a margin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels; x1 and y1 exclusive

SMALL, LARGE = "small", "large"
RELATIONS = ("left of", "right of", "above", "below")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)  # by third down, then across

# (Clearly true, clearly false) limits, as fractions of the side of the picture.
_SMALL_UP_TO = (72 / 256, 82 / 256)
_LARGE_FROM = (112 / 256, 102 / 256)
_NEAR_UP_TO = (4 / 256, 16 / 256)
_PLACE_MARGIN = 7 / 256  # on both sides of a border between thirds
_DIRECTION_RATIO = 1.8  # minimum ratio of the longer to the shorter axis between two centres
_DIRECTION_DISTANCE = 30 / 256  # minimum distance of two centres along the longer axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionParts:
    """The parts of a caption; missing parts are "".

    Attributes:
        size: "small", "large" or "".
        color: one of ``colors.COLOR_WORDS``, or "".
        name: name of the object.
        place: one of ``PLACES``; "" with a relation.
        relation: one of ``RELATIONS``; "" with a place.
        neighbor: name of the object that the relation refers to; "" without a relation.
    """

    size: str = ""
    color: str = ""
    name: str
    place: str = ""
    relation: str = ""
    neighbor: str = ""

    def text(self) -> str:
        """Return the caption as text."""
        subject = " ".join(filter(None, (self.size, self.color, self.name)))
        if self.relation:
            return f"{with_article(subject)} {self.relation} {with_article(self.neighbor)}"
        return f"{with_article(subject)} {self.place}"


def size_word(box: Box, image_size: int) -> str | None:
    """Return "small", "large", "" for neither, or None within a margin."""
    side = max(box[2] - box[0], box[3] - box[1]) / image_size
    if side <= _SMALL_UP_TO[0]:
        return SMALL
    if side >= _LARGE_FROM[0]:
        return LARGE
    return "" if _SMALL_UP_TO[1] <= side <= _LARGE_FROM[1] else None


def place_phrase(box: Box, image_size: int) -> str | None:
    """Return one of PLACES, or None if the centre is within the margin of a border."""
    across = _third((box[0] + box[2]) / (2 * image_size))
    down = _third((box[1] + box[3]) / (2 * image_size))
    return None if across is None or down is None else PLACES[down][across]


def neighbors(index: int, boxes: Sequence[Box], image_size: int) -> list[int] | None:
    """Return the indices of nearby boxes, or None if one of them is within the margin."""
    near = []
    for other, box in enumerate(boxes):
        distance = _gap(boxes[index], box) / image_size
        if other != index and distance < _NEAR_UP_TO[1]:
            if distance > _NEAR_UP_TO[0]:
                return None
            near.append(other)
    return near


def relation_phrase(box: Box, other: Box, image_size: int) -> str | None:
    """Return the relation of ``box`` to ``other``, one of RELATIONS, or None if diagonal."""
    right = (box[0] + box[2] - other[0] - other[2]) / (2 * image_size)
    down = (box[1] + box[3] - other[1] - other[3]) / (2 * image_size)
    longer, shorter = max(abs(right), abs(down)), min(abs(right), abs(down))
    if longer < _DIRECTION_DISTANCE or longer < _DIRECTION_RATIO * shorter:
        return None
    if abs(right) > abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"


def parts_from_boxes(
    index: int, boxes: Sequence[Box], names: Sequence[str], image_size: int
) -> CaptionParts | None:
    """Return the caption parts of one object that follow from the boxes: all except the colour.

    Args:
        index: index of the object.
        boxes: boxes of the visible parts of all objects of the scene.
        names: names of the objects.
        image_size: side of the picture, pixels.

    Returns:
        The parts, with color "", or None if one of them is within a margin.
    """
    size = size_word(boxes[index], image_size)
    near = neighbors(index, boxes, image_size)
    if size is None or near is None:
        return None
    if len(near) == 1:
        relation = relation_phrase(boxes[index], boxes[near[0]], image_size)
        if relation is None:
            return None
        other = names[near[0]]
        return CaptionParts(size=size, name=names[index], relation=relation, neighbor=other)
    place = place_phrase(boxes[index], image_size)
    return None if place is None else CaptionParts(size=size, name=names[index], place=place)


def _third(center: float) -> int | None:
    if min(abs(center - 1 / 3), abs(center - 2 / 3)) < _PLACE_MARGIN:
        return None
    return min(int(center * 3), 2)


def _gap(box: Box, other: Box) -> float:
    """Return the gap between two boxes, pixels, along the axis with the larger one; 0 if none."""
    across = max(box[0], other[0]) - min(box[2], other[2])
    down = max(box[1], other[1]) - min(box[3], other[3])
    return max(across, down, 0)


def with_article(phrase: str) -> str:
    """Return the phrase with "a" or "an", chosen by its first letter."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
