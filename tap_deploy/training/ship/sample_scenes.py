"""The sample pictures of the demo model: test scenes with prompts and expected results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tap_deploy.demo_model import BOX, POINT, PROMPT_KINDS, Sample, SampleRegion, save_samples
from tap_deploy.evaluation.clicks import inner_point
from tap_deploy.training.scenes.clicks import inner_stroke
from tap_deploy.training.scenes.scenes import SceneObject, SceneSource

# Chosen from the pictures alone, before any prediction: three objects each, in front of a
# photograph, stones, tiles and waves.
SAMPLE_SEEDS = (63, 0, 78, 95, 137)
ABOUT = {
    "made_by": "tap_deploy.training.scenes, split test; the seed of each is below",
    "licence": "Apache-2.0. Glyphs: Noto Color Emoji (SIL OFL 1.1, which leaves documents made "
    "with the font free). Backgrounds: photographs that scikit-image has under CC0 or in the "
    "public domain (coffee: Rachel Michetti, Pikolo Espresso Bar, CC0; gravel: CC0Textures, "
    "CC0), and textures of this project.",
}


def write_samples(
    scenes: SceneSource, folder: Path, seeds: Sequence[int] = SAMPLE_SEEDS
) -> tuple[Sample, ...]:
    """Write sample pictures (PNG) and ``samples.json`` into a new folder.

    Args:
        scenes: scenes of the test split.
        folder: the folder to make.
        seeds: seeds of the scenes; the first one is used in the demo.
    """
    folder.mkdir()
    samples = []
    for number, seed in enumerate(seeds, start=1):
        scene = scenes.scene(seed)
        picture = folder / f"{number}.png"
        Image.fromarray(scene.image).save(picture, optimize=True)
        kinds = itertools.cycle(PROMPT_KINDS)  # every picture has all kinds of prompts
        regions = tuple(
            _region(item, kind) for item, kind in zip(scene.objects, kinds, strict=False)
        )
        samples.append(Sample(picture=picture, seed=seed, regions=regions))
    save_samples(tuple(samples), folder, ABOUT)
    return tuple(samples)


def _region(item: SceneObject, kind: str) -> SampleRegion:
    if kind == POINT:
        points = [inner_point(item.mask)]
    elif kind == BOX:
        x0, y0, x1, y1 = item.box.tolist()
        points = [(x0, y0), (x1, y1)]
    else:
        points = inner_stroke(item.mask)
    return SampleRegion(
        prompt=kind, points=tuple(points), name=item.name, caption=item.caption, mask=item.mask
    )
