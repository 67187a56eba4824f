"""Pictures and regions to judge on: held back from the calibration, or given for it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tap_deploy.engines.agreement import Case, mask_ious
from tap_deploy.errors import InputError
from tap_deploy.files import sha256_of_file
from tap_deploy.image import ImageSource, load_image
from tap_deploy.masks import box_from_mask
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts

HELD_OUT_SHARE = 0.2
REGIONS_PER_IMAGE = 8
# A proposal is a region if it is neither a speck nor the picture, and not one that is there.
_GRID = 6  # points a side
_AREA_SHARES = (0.002, 0.7)
_SAME_REGION_IOU = 0.7


def split_files(
    files: Sequence[str | os.PathLike[str]], held_out_share: float = HELD_OUT_SHARE
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Part files into those to calibrate on and those to judge on, by their content.

    A file's SHA-256 decides, so a picture stays on its side when others come and go, and copies
    of one picture are on one side. At least one file is on either side.

    Args:
        files: at least two of different content.
        held_out_share: about how many of them to judge on, 0..1, both excluded.

    Returns:
        files to calibrate on, files to judge on; each in the order given.

    Raises:
        InputError: there are not two different files.
    """
    if not 0 < held_out_share < 1:
        raise InputError(f"held-out share is {held_out_share}; expected more than 0, less than 1")
    digests = {pathlib.Path(file): sha256_of_file(file) for file in files}
    different = sorted(set(digests.values()))
    if len(different) < 2:
        raise InputError(
            f"{len(different)} different pictures cannot be parted into some to calibrate on and "
            "some to judge on; give more, or others to judge on with --evaluation-data"
        )
    held_out = {digest for digest in different if _fraction(digest) < held_out_share}
    held_out = held_out or {different[0]}
    if len(held_out) == len(different):
        held_out.remove(different[-1])
    evaluation = [file for file, digest in digests.items() if digest in held_out]
    return [file for file in digests if file not in set(evaluation)], evaluation


def _fraction(digest: str) -> float:
    return int(digest[:8], 16) / 16**8


def proposed_cases(
    predictor: TapPredictor,
    images: Sequence[ImageSource],
    *,
    regions_per_image: int = REGIONS_PER_IMAGE,
    prompts: Mapping[str, Prompts] | None = None,
    on_image: Callable[[], None] | None = None,
) -> Iterator[Case]:
    """Yield pictures with prompts: the user's own, or regions that the reference proposes.

    The reference is asked with a grid of points; the masks that it rates highest, without those
    that repeat another, become the regions. They are prompted by box and by point in turns.

    Args:
        predictor: the reference.
        images: pictures.
        regions_per_image: at most so many proposals.
        prompts: file name -> prompts of that picture, in place of proposals.
        on_image: called once for each picture.
    """
    for image in images:
        name = pathlib.Path(image).name if isinstance(image, (str, os.PathLike)) else ""
        if prompts is not None and name in prompts:
            yield Case(image=image, prompts=prompts[name])
        else:
            yield Case(image=image, prompts=propose(predictor, image, regions_per_image))
        if on_image is not None:
            on_image()


def propose(predictor: TapPredictor, image: ImageSource, limit: int) -> Prompts:
    """Return prompts for up to ``limit`` regions that the reference finds on a grid of points."""
    rgb = load_image(image)
    height, width = rgb.shape[:2]
    places = (np.arange(_GRID) + 0.5) / _GRID
    points = [[[x * width, y * height, 1.0]] for y in places for x in places]
    regions = predictor.predict(rgb, points=points, captions=False)
    assert regions.masks is not None
    chosen = _distinct(regions.masks, np.argsort(-regions.iou_predictions, kind="stable"), limit)
    if not chosen:  # nothing like a region anywhere: ask for the points themselves
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
    """Return indices of masks in the order given, without specks, whole pictures and repeats."""
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
