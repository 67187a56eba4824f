"""Samples for the measurement of activations: golden samples, and pictures of the user."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import PointLabel, TapConfig
from tap_deploy.errors import InputError
from tap_deploy.image import load_image, model_image
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.pictures.folders import find_pictures, read_each
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.storage.unpickle import printable

PROMPTS_PER_PICTURE = 8  # half points, half boxes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleInputs:
    """A picture with prompts.

    Attributes:
        name: name for messages and records.
        images: picture in the model frame, uint8 BGR ``[1, S, S, 3]``.
        point_coords: XY in pixels of the model frame, float32 ``[P, N, 2]``.
        point_labels: codes of ``PointLabel``, int32 ``[P, N]``.
    """

    name: str
    images: np.ndarray
    point_coords: np.ndarray
    point_labels: np.ndarray


def golden_inputs(bundle: Bundle) -> list[SampleInputs]:
    """Return picture and prompts of each golden sample of a bundle.

    Raises:
        BundleError: they are missing or invalid.
    """
    return [
        SampleInputs(
            name=f"golden {sample.name}",
            images=np.ascontiguousarray(sample.images[:1]),
            point_coords=sample.point_coords,
            point_labels=sample.point_labels,
        )
        for sample in bundle.golden().samples
    ]


def find_samples(paths: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
    """Return the pictures of each path: those in the folder, or the path itself if it is a file.

    Raises:
        InputError: a path does not exist, or a folder contains no pictures.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"samples {path} do not exist; expected a picture or a folder")
    return [find_pictures(path) if path.is_dir() else [path] for path in paths]


def read_samples(
    paths: Sequence[pathlib.Path], config: TapConfig, *, strict: bool = False
) -> list[SampleInputs]:
    """Read the pictures of ``find_samples``; in a folder, skip those that cannot be read.

    Raises:
        InputError: as in ``find_samples``; or no picture of a folder can be read, or one cannot be
            read and must not be skipped.
    """
    samples: list[SampleInputs] = []
    seed = 0
    for files in find_samples(paths):
        numbered = list(enumerate(files, start=seed))
        samples += read_each(
            numbered, lambda item: picture_inputs(item[1], config, item[0]), strict=strict
        )
        seed += len(files)
    return samples


def picture_inputs(path: pathlib.Path, config: TapConfig, seed: int) -> SampleInputs:
    """Read a picture, and create random prompts for it: points, and boxes of all sizes.

    Raises:
        InputError: the picture cannot be read.
    """
    images, frame = model_image(load_image(path), config.image_size)
    rng = np.random.default_rng(seed)
    size = np.array([frame.scaled_width, frame.scaled_height], np.float32)
    coords = rng.uniform(0, 1, (PROMPTS_PER_PICTURE, 2, 2)).astype(np.float32) * size
    labels = np.empty((PROMPTS_PER_PICTURE, 2), np.int32)
    boxes, points = slice(0, None, 2), slice(1, None, 2)
    coords[boxes].sort(axis=1)
    labels[boxes] = PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM
    coords[points, 1] = 0
    labels[points] = PointLabel.FOREGROUND, PointLabel.PADDING
    return SampleInputs(
        name=printable(path.name), images=images, point_coords=coords, point_labels=labels
    )


def run_sample(sessions: Mapping[str, Session], config: TapConfig, sample: SampleInputs) -> None:
    """Run a sample through the three graphs in a chain, with greedy captions."""
    encoded = sessions[graphs.IMAGE_ENCODER].run({graphs.IMAGES: sample.images})
    outputs = sessions[graphs.PROMPT_DECODER].run(
        {
            graphs.IMAGE_EMBEDDINGS: encoded[graphs.IMAGE_EMBEDDINGS],
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
            graphs.MASK_REQUEST: request_answers(len(sample.point_labels)),
            graphs.MASK_ROWS: mask_rows(len(sample.point_labels)),
        }
    )
    tokens = outputs[graphs.SEMANTIC_TOKENS][:, 0]
    Captioner(sessions[graphs.TEXT_DECODER], config).generate(tokens)
