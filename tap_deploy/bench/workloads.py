"""Workloads: pictures, prompts and requested results, as users call the predictor."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.config import PointLabel, TapConfig
from tap_deploy.demo_model import Sample, load_samples
from tap_deploy.prompts import Prompts

STAGE, CLICK, VG, LVIS, EVERYTHING, STREAM = (
    *("stage", "click", "vg", "lvis"),
    *("everything", "stream"),
)
WORKLOADS = (STAGE, CLICK, VG, LVIS, EVERYTHING, STREAM)
VG_BOXES, LVIS_BOXES, STREAM_BOXES, STREAM_FRAMES = 47, 166, 5, 30
EVERYTHING_POINTS = 32 * 32
# Pictures are 1920 x 1080 for a model frame of 1024, and in proportion for others.
WIDTH, HEIGHT = 1920 / 1024, 1080 / 1024
BOX_SIDES = (0.05, 0.4)  # sides of the boxes, as shares of those of the picture


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A call of the predictor, from pictures in memory to masks, names and captions.

    Attributes:
        name: one of ``WORKLOADS`` except ``stage``.
        pictures: pictures, uint8 ``[H, W, 3]`` RGB.
        prompts: prompts of every picture; None for ``everything``.
        captions: write captions.
    """

    name: str
    pictures: tuple[npt.NDArray[np.uint8], ...]
    prompts: Prompts | None
    captions: bool

    @property
    def regions(self) -> int:
        """Regions per picture that are prompted."""
        return EVERYTHING_POINTS if self.prompts is None else len(self.prompts)


def workload(name: str, config: TapConfig) -> Workload:
    """Return a workload in the size of a model; the same for every candidate and every run.

    Pictures are pairs of the sample pictures of the demo model, side by side. Boxes are drawn with
    a fixed seed.
    """
    count = STREAM_FRAMES if name == STREAM else 1
    pictures = sample_pictures(config, count)
    height, width = pictures[0].shape[:2]
    if name == EVERYTHING:
        prompts = None
    elif name == CLICK:
        prompts = _click(height)
    else:
        boxes = {VG: VG_BOXES, LVIS: LVIS_BOXES, STREAM: STREAM_BOXES}[name]
        prompts = _boxes(boxes, width, height)
    return Workload(
        name=name, pictures=pictures, prompts=prompts, captions=name not in (LVIS, EVERYTHING)
    )


def sample_pictures(config: TapConfig, count: int) -> tuple[npt.NDArray[np.uint8], ...]:
    """Return pictures of 16:9, uint8 ``[H, W, 3]`` RGB, all different."""
    samples = [_picture(sample) for sample in load_samples()]
    height = round(HEIGHT * config.image_size)
    size = round(WIDTH * config.image_size), height
    pairs = [(i % len(samples), (i + 1 + i // len(samples)) % len(samples)) for i in range(count)]
    pictures = []
    for turn, (left, right) in enumerate(pairs):
        pair = np.hstack([samples[left], np.roll(samples[right], 8 * turn, axis=1)])
        wide = Image.fromarray(pair[:, : round(len(pair) * WIDTH / HEIGHT)])
        pictures.append(np.asarray(wide.resize(size, Image.Resampling.BICUBIC)))
    return tuple(pictures)


def _picture(sample: Sample) -> npt.NDArray[np.uint8]:
    with Image.open(sample.picture) as opened:
        return np.asarray(opened.convert("RGB"))


def _click(height: int) -> Prompts:
    """Return the first point prompt of the first sample, which is the left half of picture 0."""
    sample = load_samples()[0]
    scale = height / len(_picture(sample))
    (x, y), *_ = next(region.points for region in sample.regions if len(region.points) == 1)
    return Prompts.from_points([[[x * scale, y * scale, PointLabel.FOREGROUND]]])


def _boxes(count: int, width: int, height: int) -> Prompts:
    rng = np.random.default_rng(0)
    sides = rng.uniform(*BOX_SIDES, (count, 2))
    corners = rng.uniform(0, 1 - sides)
    scale = np.array([width - 1, height - 1])
    boxes = np.hstack([corners * scale, (corners + sides) * scale])
    return Prompts.from_boxes(boxes)
