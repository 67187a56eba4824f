"""Writes scenes as picture files with prompts, for int8 calibration and evaluation.

python -m tap_deploy.training.scenes.scene_pictures --split test --count 160 -o FOLDER
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image

from tap_deploy.console.exits import CleanExits
from tap_deploy.demo_model import BOX, POINT, PROMPT_KINDS, SKETCH
from tap_deploy.errors import InputError
from tap_deploy.evaluation.clicks import inner_point
from tap_deploy.storage.files import atomic_file, new_folder
from tap_deploy.training.scenes.backgrounds import SPLITS
from tap_deploy.training.scenes.clicks import inner_stroke
from tap_deploy.training.scenes.scenes import Scene, SceneGenerator, SceneObject

PROMPTS_FILE = "prompts.json"
_KEYS = {BOX: "boxes", POINT: "points", SKETCH: "sketches"}
_INSIDE = 1  # label of a point in the foreground


@click.command(cls=CleanExits)
@click.option("--split", type=click.Choice(SPLITS), required=True)
@click.option(
    "--first-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the first scene.",
)
@click.option("--count", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(PROMPT_KINDS),
    multiple=True,
    default=(BOX, POINT),
    show_default=True,
    help="Kind of prompt; repeat it to alternate between several kinds.",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
def main(split: str, first_seed: int, count: int, kinds: tuple[str, ...], output: Path) -> None:
    """Write scenes as PNG, and prompts.json with one prompt per object."""
    generator = SceneGenerator(split)
    scenes = (generator.scene(first_seed + index) for index in range(count))
    regions = write_pictures(scenes, output, kinds)
    click.echo(f"{output}: {count} scenes of split {split}, {regions} regions")


def write_pictures(
    scenes: Iterable[Scene], folder: Path, kinds: Sequence[str] = (BOX, POINT)
) -> int:
    """Write scenes and their prompts into a folder, for ``tap-export quantize`` and ``verdict``.

    File names contain split and seed, so that several folders can be merged.

    Args:
        scenes: the scenes to write.
        folder: the folder to write; it may exist, but without prompts of an earlier call.
        kinds: some of ``demo_model.PROMPT_KINDS``, used alternately for the objects.

    Returns:
        The number of regions, one per object.

    Raises:
        InputError: the folder already contains prompts, or cannot be written.
    """
    if (folder / PROMPTS_FILE).exists():
        raise InputError(f"{folder} already contains {PROMPTS_FILE}; choose another folder")
    prompts: dict[str, dict[str, list[Any]]] = {}
    turns, regions = itertools.cycle(kinds), 0
    with new_folder(folder):
        for scene in scenes:
            name = f"{scene.split}-{scene.seed}.png"
            with atomic_file(folder / name) as partial:
                Image.fromarray(scene.image).save(partial, "PNG")
            own = prompts[name] = {}
            for item in scene.objects:
                kind = next(turns)
                own.setdefault(_KEYS[kind], []).append(_prompt(item, kind))
            regions += len(scene.objects)
        with atomic_file(folder / PROMPTS_FILE) as partial:
            partial.write_text(json.dumps(prompts, indent=1) + "\n", "utf-8")
    return regions


def _prompt(item: SceneObject, kind: str) -> list[Any]:
    """Return a prompt in the format of ``CalibrationPrompts.from_file``, pixels."""
    if kind == BOX:
        corners: list[float] = item.box.tolist()
        return corners
    if kind == POINT:
        return [[*inner_point(item.mask), _INSIDE]]
    return [list(pixel) for pixel in inner_stroke(item.mask)]


if __name__ == "__main__":
    main()
