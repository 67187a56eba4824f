"""Masks: the token that answers a prompt, logits to full-size masks, run-length encoding."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.graphs import ANSWERING_TOKEN
from tap_deploy.image import Frame

BOX_BONUS = 500.0  # far above any IoU prediction: it decides between token 0 and the others


def select_mask_token(
    iou_predictions: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.int64]:
    """Return which of the M mask tokens answers each prompt, int64 [P].

    Token 0 answers prompts that begin with a box; of the others, which answer points, the one
    with the highest predicted IoU is taken.

    Args:
        iou_predictions: float [P, M].
        labels: int [P, N], codes of ``PointLabel``.
    """
    scores = np.array(iou_predictions, np.float64)
    boxed = labels[:, 0] == PointLabel.BOX_LEFT_TOP
    scores[:, 0] += np.where(boxed, BOX_BONUS, -BOX_BONUS)
    tokens: npt.NDArray[np.int64] = scores.argmax(axis=1).astype(np.int64)
    return tokens


def request_answers(num_prompts: int) -> npt.NDArray[np.int32]:
    """Return the ``mask_request`` for the answering token of each prompt, int32 [P, 1]."""
    return np.full((num_prompts, 1), ANSWERING_TOKEN, np.int32)


def masks_from_logits(
    low_res_masks: npt.NDArray[np.floating[Any]], frame: Frame
) -> npt.NDArray[np.bool_]:
    """Bring mask logits back to the picture: bool [P, H, W] at its original size.

    The logits are enlarged bilinearly to the model frame, cropped to the scaled picture,
    resized bilinearly to the original size, and are foreground where they are above 0. Besides
    the result, memory holds the map of one region at a time (float32 [H, W]).

    Args:
        low_res_masks: float [P, S, S] logits, the chosen token of each prompt.
        frame: where the picture lies in the model frame.

    Raises:
        InputError: the logits are not [P, S, S].
    """
    if low_res_masks.ndim != 3 or low_res_masks.shape[1] != low_res_masks.shape[2]:
        raise InputError(f"mask logits have shape {list(low_res_masks.shape)}; expected [P, S, S]")
    rows, columns = _resize_operators(frame, low_res_masks.shape[2])
    masks = np.empty((len(low_res_masks), frame.height, frame.width), np.bool_)
    full_size = np.empty((frame.height, frame.width), np.float32)
    for logits, mask in zip(low_res_masks, masks, strict=True):
        narrow = rows @ logits.astype(np.float32, copy=False)  # [H, S]
        np.matmul(narrow, columns.T, out=full_size)  # [H, W]
        np.greater(full_size, 0, out=mask)
    return masks


def rle_from_mask(mask: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
    """Encode a mask bool [H, W] as uncompressed COCO run lengths.

    Returns:
        ``size`` [H, W], and ``counts``: lengths of alternating runs of background and
        foreground, beginning with background, columns first.
    """
    flat = np.asarray(mask, np.bool_).ravel(order="F")  # [H * W]
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts: list[int] = np.diff(edges, prepend=0, append=flat.size).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": counts}


def mask_from_rle(rle: Mapping[str, Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Decode what ``rle_from_mask`` gave, to a mask bool [H, W].

    Raises:
        InputError: ``size`` or ``counts`` is missing, or the runs do not fill the picture.
    """
    try:
        height, width = (int(side) for side in rle["size"])
        counts = np.asarray(rle["counts"], np.int64)
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"mask has no size [H, W] and counts of whole numbers ({exc!r})") from exc
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
        raise InputError(
            f"runs of a mask add up to {counts.sum()} pixels; expected {height} x {width}"
        )
    values = np.arange(len(counts)) % 2 == 1  # background first
    return np.repeat(values, counts).reshape((height, width), order="F")


def box_from_mask(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return the box around a mask bool [H, W] as [x, y, width, height] in pixels.

    An empty mask gives [0, 0, 0, 0].
    """
    ys = np.flatnonzero(mask.any(axis=1))
    xs = np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return [0, 0, 0, 0]
    x, y = int(xs[0]), int(ys[0])
    return [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y]


@functools.lru_cache(maxsize=8)
def _resize_operators(
    frame: Frame, size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return [H, size] and [W, size]: both resizes and the crop as one product per axis."""
    enlarge = _bilinear_operator(np.eye(size), frame.image_size)  # [image_size, size]
    rows = _bilinear_operator(enlarge[: frame.scaled_height], frame.height)
    columns = _bilinear_operator(enlarge[: frame.scaled_width], frame.width)
    return rows.astype(np.float32), columns.astype(np.float32)


def _bilinear_operator(signal: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Resize the first axis: half-pixel centres, edges repeated, no antialiasing."""
    last = len(signal) - 1
    centres = (np.arange(size) + 0.5) * (len(signal) / size) - 0.5
    centres = centres.clip(0, last)
    left = np.floor(centres).astype(np.intp)
    weight = (centres - left)[:, None]
    right = np.minimum(left + 1, last)
    resized: npt.NDArray[np.float64] = signal[left] * (1 - weight) + signal[right] * weight
    return resized
