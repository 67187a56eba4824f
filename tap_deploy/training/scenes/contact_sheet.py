"""A contact sheet: scenes of a split with their masks and captions, for visual inspection.

python -m tap_deploy.training.scenes.contact_sheet --split test -o sheet.png
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tap_deploy.console.exits import CleanExits
from tap_deploy.errors import InputError
from tap_deploy.storage.files import atomic_file
from tap_deploy.training.scenes.backgrounds import SPLITS
from tap_deploy.training.scenes.scenes import Scene, SceneGenerator, SceneObject
from tap_deploy.visualize.colors import PALETTE, Color

_COLUMNS = 5
_PICTURE = 320  # side of a scene on the sheet, pixels
_LINE = 15
_CAPTION_LINES = 6
_PAPER, _INK = (250, 250, 250), (20, 20, 20)
_TINT = 0.3


@click.command(cls=CleanExits)
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True)
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first scene.")
@click.option("--count", default=20, show_default=True, help="Number of scenes.")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("sheet.png"),
    show_default=True,
    help="PNG to write; an existing file is replaced.",
)
def main(split: str, first_seed: int, count: int, output: Path) -> None:
    """Draw scenes with masks and captions onto one picture."""
    generator = SceneGenerator(split)
    sheet = contact_sheet([generator.scene(first_seed + index) for index in range(count)])
    with atomic_file(output) as partial:
        sheet.save(partial, format="PNG")
    click.echo(f"{output}: {count} scenes of split {split}, {sheet.width} x {sheet.height}")


def contact_sheet(scenes: list[Scene]) -> Image.Image:
    """Return the scenes as one picture, mode RGB, five per row.

    Each scene is shown twice: plain, and with every mask tinted and outlined in its own colour.
    The captions are listed below in the same colours.

    Raises:
        InputError: ``scenes`` is empty.
    """
    if not scenes:
        raise InputError("no scenes for a contact sheet; expected at least one")
    rows = -(-len(scenes) // _COLUMNS)
    cell = (2 * _PICTURE + 8, _PICTURE + _CAPTION_LINES * _LINE + 14)
    sheet = Image.new("RGB", (_COLUMNS * cell[0], rows * cell[1]), _PAPER)
    for index, scene in enumerate(scenes):
        left, top = index % _COLUMNS * cell[0], index // _COLUMNS * cell[1]
        sheet.paste(_scaled(Image.fromarray(scene.image)), (left, top))
        sheet.paste(_marked(scene), (left + _PICTURE, top))
        _write_captions(ImageDraw.Draw(sheet), scene, (left + 4, top + _PICTURE + 2))
    return sheet


def _marked(scene: Scene) -> Image.Image:
    picture = _scaled(Image.fromarray(scene.image))
    for item, color in zip(scene.objects, PALETTE, strict=False):
        inside = _scaled(Image.fromarray(item.mask).convert("L"))
        tint = inside.point([round(value * _TINT) for value in range(256)])
        picture.paste(color, (0, 0), tint)
        solid = inside.point([255 * (value >= 128) for value in range(256)])
        grown, shrunk = (solid.filter(f(3)) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        edge = np.asarray(grown) != np.asarray(shrunk)
        picture.paste(color, (0, 0), Image.fromarray(edge))
    draw = ImageDraw.Draw(picture)
    for number, (item, color) in enumerate(zip(scene.objects, PALETTE, strict=False), 1):
        _write_number(draw, number, item, color, _PICTURE / scene.image.shape[0])
    return picture


def _write_number(
    draw: ImageDraw.ImageDraw, number: int, item: SceneObject, color: Color, scale: float
) -> None:
    x, y = ((item.box[:2] + item.box[2:]) / 2 * scale).tolist()
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=_INK, outline=color)
    draw.text((x, y), str(number), fill=color, font=ImageFont.load_default(13), anchor="mm")


def _write_captions(draw: ImageDraw.ImageDraw, scene: Scene, corner: tuple[int, int]) -> None:
    font = ImageFont.load_default(13)
    for row, (item, color) in enumerate(zip(scene.objects, PALETTE, strict=False)):
        x, y = corner[0], corner[1] + row * _LINE
        draw.rectangle((x, y + 2, x + 11, y + 13), fill=color, outline=_INK)
        draw.text((x + 18, y), f"{row + 1}  {item.caption}", fill=_INK, font=font)
    text = f"{scene.split} {scene.seed}"
    draw.text((corner[0] + 2 * _PICTURE - 6, corner[1]), text, fill=_INK, font=font, anchor="ra")


def _scaled(image: Image.Image) -> Image.Image:
    return image.resize((_PICTURE, _PICTURE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
