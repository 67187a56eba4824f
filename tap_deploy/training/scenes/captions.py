"""Captions: what is said of an object, by rules that a picture always decides.

    caption   = article [size] [color] name place-or-neighbor
    size      = "small" | "large"                   longer side of the box of the visible part
    color     = "red" | "orange" | … | "white"      most of the visible pixels; colors.py
    place     = "at the top left" | "at the top" | "at the top right"
              | "on the left" | "in the center" | "on the right"
              | "at the bottom left" | "at the bottom" | "at the bottom right"
    neighbor  = ("left of" | "right of" | "above" | "below") article name
    article   = "an" before a, e, i, o, u; else "a"

- An object whose longer side is at most 9/32 of the picture is small, from 7/16 on it is large.
- Place is the third of the picture, across and down, that holds the centre of the box.
- If exactly one other box is near (touching, overlapping, or within 1/64 of the picture), its
  name and the direction are told instead of the place. The direction is that of the centres.
- A colour is told of objects that have one colour, not of those with many.

Nobody could say which word is right close to the border between two. So each rule has a margin,
and answers None inside: scenes are made such that this never happens.
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

# Parts of the side of the picture: up to the first it is so, from the second on it is not.
_SMALL_UP_TO = (72 / 256, 82 / 256)
_LARGE_FROM = (112 / 256, 102 / 256)
_NEAR_UP_TO = (4 / 256, 16 / 256)
_PLACE_MARGIN = 7 / 256  # on both sides of a border between thirds
_DIRECTION_RATIO = 1.8  # the longer way between two centres is at least so much longer
_DIRECTION_DISTANCE = 30 / 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionParts:
    """A caption taken apart; what it does not say is "".

    Attributes:
        size: "small" or "large".
        color: one of ``colors.COLOR_WORDS``.
        name: of the object.
        place: one of ``PLACES``, or "" if there is a relation.
        relation: one of ``RELATIONS``.
        neighbor: name of the object that the relation is to.
    """

    size: str = ""
    color: str = ""
    name: str
    place: str = ""
    relation: str = ""
    neighbor: str = ""

    def text(self) -> str:
        """Return the caption."""
        subject = " ".join(filter(None, (self.size, self.color, self.name)))
        if self.relation:
            return f"{with_article(subject)} {self.relation} {with_article(self.neighbor)}"
        return f"{with_article(subject)} {self.place}"


def size_word(box: Box, image_size: int) -> str | None:
    """Return "small", "large", "" for neither, or None on the border."""
    side = max(box[2] - box[0], box[3] - box[1]) / image_size
    if side <= _SMALL_UP_TO[0]:
        return SMALL
    if side >= _LARGE_FROM[0]:
        return LARGE
    return "" if _SMALL_UP_TO[1] <= side <= _LARGE_FROM[1] else None


def place_phrase(box: Box, image_size: int) -> str | None:
    """Return one of PLACES, or None if the centre is too close to a border between thirds."""
    across = _third((box[0] + box[2]) / (2 * image_size))
    down = _third((box[1] + box[3]) / (2 * image_size))
    return None if across is None or down is None else PLACES[down][across]


def neighbors(index: int, boxes: Sequence[Box], image_size: int) -> list[int] | None:
    """Return which other boxes are near, or None if that is not clear of one of them."""
    near = []
    for other, box in enumerate(boxes):
        distance = _gap(boxes[index], box) / image_size
        if other != index and distance < _NEAR_UP_TO[1]:
            if distance > _NEAR_UP_TO[0]:
                return None
            near.append(other)
    return near


def relation_phrase(box: Box, other: Box, image_size: int) -> str | None:
    """Return where ``box`` is as seen from ``other``: one of RELATIONS, or None if slanting."""
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
    """Return all that the boxes tell of one object: everything but its colour.

    Args:
        index: which of the boxes.
        boxes: of the visible parts of all objects of the scene.
        names: of the objects, one a box.
        image_size: side of the picture in pixels.

    Returns:
        The parts, with color "", or None if any of them is on a border.
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
    """Return the pixels between two boxes, the longer of across and down; 0 if they touch."""
    across = max(box[0], other[0]) - min(box[2], other[2])
    down = max(box[1], other[1]) - min(box[3], other[3])
    return max(across, down, 0)


def with_article(phrase: str) -> str:
    """Return the phrase after "a" or "an", going by its first letter."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
