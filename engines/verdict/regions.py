"""Evaluation pictures and regions, held out from the calibration data or given separately."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.verdict.agreement import Case
from tap_deploy.errors import InputError
from tap_deploy.image import load_image
from tap_deploy.masks import box_from_mask, mask_ious
from tap_deploy.pictures.source import ImageSource
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts

HELD_OUT_SHARE = 0.2
REGIONS_PER_IMAGE = 8
# A proposal is dropped if it is too small, covers most of the picture, or repeats another region.
_GRID = 6  # points per side
_AREA_SHARES = (0.002, 0.7)
_SAME_REGION_IOU = 0.7


def split_images(images: CalibrationImages) -> tuple[CalibrationImages, CalibrationImages]:
    """Split pictures into calibration and evaluation pictures.

    The SHA-256 of a file decides, so that a picture stays on its side when others are added or
    removed. Each side has at least one picture.

    Args:
        images: at least two pictures.

    Returns:
        Calibration pictures and evaluation pictures.

    Raises:
        InputError: fewer than two pictures.
    """
    if len(images) < 2:
        raise InputError(
            "one picture cannot be split into calibration and evaluation pictures; pass more "
            "pictures, or --evaluation-data, or --no-verdict"
        )
    held_out = {digest for digest in images.digests if _fraction(digest) < HELD_OUT_SHARE}
    held_out = held_out or {min(images.digests)}
    if len(held_out) == len(images):
        held_out.remove(max(images.digests))
    return without(images, held_out), without(images, set(images.digests) - held_out)


def without(images: CalibrationImages, digests: set[str]) -> CalibrationImages:
    """Return the pictures whose SHA-256 is not in ``digests``.

    Raises:
        InputError: no picture is left.
    """
    pairs = zip(images.paths, images.digests, strict=True)
    kept = [(path, digest) for path, digest in pairs if digest not in digests]
    if not kept:
        raise InputError(
            f"all {len(images)} evaluation pictures are calibration pictures; pass others with "
            "--evaluation-data"
        )
    paths, names = zip(*kept, strict=True)
    return CalibrationImages(paths=paths, digests=names)


def _fraction(digest: str) -> float:
    return int(digest[:8], 16) / 16**8


def cases_from_images(
    predictor: TapPredictor,
    images: CalibrationImages,
    *,
    prompts: CalibrationPrompts | None = None,
) -> Iterator[Case]:
    """Yield pictures with the user's prompts, or with regions that the reference proposes.

    The reference is prompted with a grid of points. The masks with the highest predicted IoU,
    without duplicates, become the regions, prompted by box and by point alternately.

    Args:
        predictor: the reference.
        images: the pictures.
        prompts: the user's prompts; pictures without an entry get proposals.

    Raises:
        InputError: a picture cannot be read, or a prompt does not fit it.
    """
    for path, digest in zip(images.paths, images.digests, strict=True):
        rgb = load_image(path, convert=True)
        height, width = rgb.shape[:2]
        if prompts is not None and path.name in prompts.own:
            parts = prompts.for_image(path, digest, width=width, height=height)
        else:
            parts = [propose(predictor, rgb, REGIONS_PER_IMAGE)]
        source = _source(path, rgb)
        for part in parts:  # one case per kind, because results depend on the number of points
            yield Case(image=source, prompts=part)


def _source(path: pathlib.Path, rgb: np.ndarray) -> ImageSource:
    """Return the path, to save memory, unless the file must be converted to 8-bit RGB."""
    try:
        load_image(path)
    except InputError:
        return rgb
    return path


def propose(predictor: TapPredictor, image: ImageSource, limit: int) -> Prompts:
    """Return prompts for up to ``limit`` regions that the reference finds with a grid of points."""
    rgb = load_image(image)
    height, width = rgb.shape[:2]
    places = (np.arange(_GRID) + 0.5) / _GRID
    points = [[[x * width, y * height, 1.0]] for y in places for x in places]
    regions = predictor.predict(rgb, points=points, captions=False)
    assert regions.masks is not None
    chosen = _distinct(regions.masks, np.argsort(-regions.iou_predictions, kind="stable"), limit)
    if not chosen:  # no usable mask: prompt with the first points of the grid
        return regions.prompts[:limit]
    parts = []
    for place, index in enumerate(chosen):
        x, y, w, h = box_from_mask(regions.masks[index])
        by_box = place % 2 == 0
        parts.append(
            Prompts.from_boxes([[x, y, x + w, y + h]]) if by_box else regions.prompts[int(index)]
        )
    return Prompts.concatenate(parts)


def _distinct(masks: np.ndarray, order: np.ndarray, limit: int) -> list[int]:
    """Return indices of masks in order, without tiny masks, whole pictures and duplicates."""
    shares = masks.mean(axis=(1, 2))
    chosen: list[int] = []
    for index in order.tolist():
        if not _AREA_SHARES[0] <= shares[index] <= _AREA_SHARES[1]:
            continue
        twins = mask_ious(masks[chosen], masks[index : index + 1]) if chosen else np.zeros(1)
        if twins.max() < _SAME_REGION_IOU:
            chosen.append(index)
        if len(chosen) == limit:
            break
    return chosen
