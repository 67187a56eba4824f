"""Scenes: synthetic labelled pictures of nameable objects, determined by a seed."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from tap_deploy.errors import InputError
from tap_deploy.training.scenes.backgrounds import SPLITS, Backgrounds
from tap_deploy.training.scenes.captions import CaptionParts
from tap_deploy.training.scenes.emoji import Glyph, load_glyphs
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES
from tap_deploy.training.scenes.layout import Layout
from tap_deploy.training.scenes.sprites import Sprite, color_word, draw_sprite, is_colored

REFERENCE_SIZE = 256  # side of the picture that the sizes below refer to, pixels
MIN_IMAGE_SIZE = 128
_OBJECT_COUNTS = (1, 2, 3, 4, 5, 6)
_COUNT_SHARES = (0.06, 0.12, 0.2, 0.24, 0.22, 0.16)
# Longer sides of small, medium and large objects, pixels; the gaps avoid unclear sizes.
_SIDES = ((56.0, 70.0), (84.0, 100.0), (114.0, 140.0))
_SIDE_SHARES = {  # by number of objects: many large objects would not fit
    1: (0.3, 0.3, 0.4),
    2: (0.3, 0.3, 0.4),
    3: (0.4, 0.3, 0.3),
    4: (0.5, 0.3, 0.2),
    5: (0.6, 0.3, 0.1),
    6: (0.7, 0.25, 0.05),
}
_PLACE_TRIES = 14
_BESIDE_SHARE = 0.4  # fraction of objects that are first tried next to another one
_OVERLAP = 0.4  # maximum overlap of neighbours, as a fraction of the narrower one
_LEVELS = np.arange(256)
_OUTSIDE = 0.2  # fraction of an object that may lie outside the picture


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SceneObject:
    """An object of a scene.

    Attributes:
        name: common name of the object.
        name_index: index of the name in ``SceneGenerator.names``.
        mask: visible part of the object, bool [H, W].
        box: box of the mask XYXY, pixels, x1 and y1 exclusive, float32 [4].
        parts: parts of its caption, see ``captions.py``.
    """

    name: str
    name_index: int
    mask: npt.NDArray[np.bool_]
    box: npt.NDArray[np.float32]
    parts: CaptionParts

    @property
    def caption(self) -> str:
        """Caption of the object."""
        return self.parts.text()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A labelled picture.

    Attributes:
        image: the picture, RGB uint8 [H, W, 3].
        objects: the objects, bottom to top, with different names.
        seed: seed of the scene.
        split: "train", "validation" or "test".
    """

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    seed: int
    split: str


class SceneGenerator:
    """Makes the scenes of a split; a scene depends only on its seed, not on the order of calls.

    Splits share the objects, but neither backgrounds nor random numbers.

    Args:
        split: "train", "validation" or "test".
        image_size: side of the square pictures, pixels. Objects scale with it; above 256 they are
            blurred, because the font has no larger bitmaps.

    Attributes:
        names: all names of objects.

    Raises:
        InputError: the split is unknown, the size is below 128, or the emoji font is missing.
        MissingDependencyError: the photographs for the backgrounds are not installed.
    """

    def __init__(self, split: str, image_size: int = REFERENCE_SIZE) -> None:
        if image_size < MIN_IMAGE_SIZE:
            raise InputError(f"image_size is {image_size}; expected at least {MIN_IMAGE_SIZE}")
        self.names: tuple[str, ...] = OBJECT_NAMES
        self._backgrounds = Backgrounds(split)
        self._split = split
        self._size = image_size
        self._scale = image_size / REFERENCE_SIZE
        self._glyphs: dict[str, list[tuple[Glyph, bool]]] = {name: [] for name in OBJECT_NAMES}
        for glyph in load_glyphs():
            self._glyphs[glyph.name].append((glyph, is_colored(glyph)))

    def scene(self, seed: int) -> Scene:
        """Return the scene of a seed, with 1 to 6 objects.

        Raises:
            InputError: the seed is negative.
        """
        if seed < 0:
            raise InputError(f"seed is {seed}; expected 0 or more")
        attempt = 0
        while True:  # about 1 % of scenes are redrawn, as shadow or noise makes a colour unclear
            rng = np.random.default_rng([SPLITS.index(self._split), seed, attempt])
            layout = self._draw_layout(rng)
            image = self._draw_image(layout, rng)
            objects = _objects(layout, image)
            if objects is not None:
                return Scene(image=image, objects=objects, seed=seed, split=self._split)
            attempt += 1

    def _draw_layout(self, rng: np.random.Generator) -> Layout:
        """Return a layout with at least one object; objects that do not fit are left out."""
        layout = Layout(self._size)
        count = int(rng.choice(_OBJECT_COUNTS, p=_COUNT_SHARES))
        left_over = [self.names[index] for index in rng.permutation(len(self.names))]
        while not layout.sprites:
            for _ in range(count):
                sprite = self._draw_sprite(left_over.pop(), count, rng)
                if sprite is not None:
                    self._place(sprite, layout, rng)
        return layout

    def _draw_sprite(self, name: str, count: int, rng: np.random.Generator) -> Sprite | None:
        glyphs = self._glyphs[name]
        glyph, colored = glyphs[rng.integers(len(glyphs))]
        sides = _SIDES[rng.choice(len(_SIDES), p=_SIDE_SHARES[count])]
        return draw_sprite(glyph, colored, rng.uniform(*sides) * self._scale, rng)

    def _place(self, sprite: Sprite, layout: Layout, rng: np.random.Generator) -> None:
        beside = bool(layout.sprites) and rng.random() < _BESIDE_SHARE
        for attempt in range(_PLACE_TRIES):
            if beside and attempt < _PLACE_TRIES // 2:
                corner = _corner_beside(sprite, layout, rng)
            else:
                corner = self._corner_anywhere(sprite, rng)
            if layout.add(sprite, *corner):
                return

    def _corner_anywhere(self, sprite: Sprite, rng: np.random.Generator) -> tuple[int, int]:
        height, width = sprite.mask.shape
        left = rng.uniform(-_OUTSIDE * width, self._size - (1 - _OUTSIDE) * width)
        top = rng.uniform(-_OUTSIDE * height, self._size - (1 - _OUTSIDE) * height)
        return round(left), round(top)

    def _draw_image(self, layout: Layout, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        canvas = Image.fromarray(self._backgrounds.draw(rng, self._size))
        shadow = _Shadow.draw(rng, self._scale) if rng.random() < 0.6 else None
        for sprite, corner in zip(layout.sprites, layout.corners, strict=True):
            alpha = Image.fromarray(np.ascontiguousarray(sprite.pixels[..., 3]))
            if shadow is not None:
                shadow.cast(canvas, alpha, corner)
            canvas.paste(Image.fromarray(sprite.pixels[..., :3].copy()), corner, alpha)
        if rng.random() < 0.3:
            canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * self._scale))
        return _noisy(np.asarray(canvas), rng) if rng.random() < 0.5 else np.array(canvas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shadow:
    """The soft shadow of all objects of a scene.

    Attributes:
        right: offset to the right, pixels.
        down: offset downwards, pixels.
        blur: blur radius, pixels.
        darkness: opacity, 0..1.
    """

    right: int
    down: int
    blur: float
    darkness: float

    @classmethod
    def draw(cls, rng: np.random.Generator, scale: float) -> _Shadow:
        right, down = np.rint(rng.uniform((-6, 1), (6, 8)) * scale).astype(int).tolist()
        return cls(
            right=right,
            down=down,
            blur=rng.uniform(1.5, 4) * scale,
            darkness=rng.uniform(0.2, 0.5),
        )

    def cast(self, canvas: Image.Image, alpha: Image.Image, corner: tuple[int, int]) -> None:
        margin = round(self.blur * 2)
        size = (alpha.width + 2 * margin, alpha.height + 2 * margin)
        shape = Image.new("L", size)
        shape.paste(alpha.point((_LEVELS * self.darkness).astype(int).tolist()), (margin, margin))
        place = (corner[0] + self.right - margin, corner[1] + self.down - margin)
        canvas.paste((0, 0, 0), place, shape.filter(ImageFilter.BoxBlur(self.blur)))


def _corner_beside(sprite: Sprite, layout: Layout, rng: np.random.Generator) -> tuple[int, int]:
    """Return a corner that puts the sprite to the left, right, top or bottom of another object."""
    height, width = sprite.mask.shape
    x0, y0, x1, y1 = layout.box(int(rng.integers(len(layout.sprites))))
    overlap = rng.uniform(-0.02, _OVERLAP)
    slant = rng.uniform(-0.4, 0.4)
    middle_x, middle_y = (x0 + x1 - width) / 2, (y0 + y1 - height) / 2
    if rng.random() < 0.5:
        overlap *= min(width, x1 - x0)
        left = x1 - overlap if rng.random() < 0.5 else x0 - width + overlap
        return round(left), round(middle_y + slant * (left - middle_x))
    overlap *= min(height, y1 - y0)
    top = y1 - overlap if rng.random() < 0.5 else y0 - height + overlap
    return round(middle_x + slant * (top - middle_y)), round(top)


def _noisy(image: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    noise = rng.standard_normal((*image.shape[:2], 1), np.float32) * np.float32(rng.uniform(1, 6))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _objects(layout: Layout, image: npt.NDArray[np.uint8]) -> tuple[SceneObject, ...] | None:
    """Return the labelled objects, or None if the colour of one is unclear in the picture."""
    objects = []
    for index, (sprite, parts) in enumerate(zip(layout.sprites, layout.parts, strict=True)):
        mask = layout.mask(index)
        color = color_word(image[mask]) if sprite.colored else ""
        if color is None:
            return None
        objects.append(
            SceneObject(
                name=sprite.name,
                name_index=sprite.name_index,
                mask=mask,
                box=np.array(layout.box(index), np.float32),
                parts=dataclasses.replace(parts, color=color),
            )
        )
    return tuple(objects)


class SceneSource(Protocol):
    """A source of labelled pictures by seed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all objects that may occur; ``name_index`` is an index into them."""

    def scene(self, seed: int) -> Scene:
        """Return the scene of a seed; it is determined by the seed."""
