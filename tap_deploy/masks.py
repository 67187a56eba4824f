"""Mask token selection, conversion of logits to full-size masks, and run-length encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.graphs import ANSWERING_TOKEN
from tap_deploy.image import Frame
from tap_deploy.mask_strips import strips_above_0

Rle = dict[str, list[int]]  # uncompressed COCO run lengths, see rle_from_mask

THREADS = 2  # for masks; more wait for each other's Python code

BOX_BONUS = 500.0  # exceeds any IoU prediction, so it alone decides for or against token 0


def select_mask_token(
    iou_predictions: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.int64]:
    """Return the mask token that answers each prompt, int64 [P].

    Token 0 answers prompts that start with a box. All others are answered by the token with the
    highest predicted IoU among 1..M-1.

    Args:
        iou_predictions: float [P, M].
        labels: codes of ``PointLabel``, int [P, N].
    """
    scores = np.array(iou_predictions, np.float64)
    boxed = labels[:, 0] == PointLabel.BOX_LEFT_TOP
    scores[:, 0] += np.where(boxed, BOX_BONUS, -BOX_BONUS)
    tokens: npt.NDArray[np.int64] = scores.argmax(axis=1).astype(np.int64)
    return tokens


def request_answers(num_prompts: int) -> npt.NDArray[np.int32]:
    """Return a ``mask_request`` for the answering token of each prompt, int32 [P, 1]."""
    return np.full((num_prompts, 1), ANSWERING_TOKEN, np.int32)


def request_candidates(num_prompts: int, num_mask_tokens: int) -> npt.NDArray[np.int32]:
    """Return a ``mask_request`` for all M tokens of each prompt, int32 [P, M]."""
    return np.tile(np.arange(num_mask_tokens, dtype=np.int32), (num_prompts, 1))


def mask_rows(num_prompts: int, *, masks: bool = True) -> npt.NDArray[np.int32]:
    """Return ``mask_rows``, int32: all P prompts, or the first if no masks are wanted."""
    return np.arange(num_prompts if masks else 1, dtype=np.int32)


def masks_from_logits(
    low_res_masks: npt.NDArray[np.floating[Any]], frame: Frame
) -> npt.NDArray[np.bool_]:
    """Convert mask logits to masks at the original size of the picture, bool [P, H, W].

    The logits are upsampled bilinearly to the model frame, cropped to the scaled picture, resized
    bilinearly to the original size, and thresholded at 0. Besides the result, memory holds one
    strip (float32 [H, 256]) per thread.

    Args:
        low_res_masks: logits of the selected token of each prompt, float [P, S, S].
        frame: placement of the picture in the model frame.

    Raises:
        InputError: the logits are not [P, S, S].
    """
    _check_logits(low_res_masks)
    masks = np.zeros((len(low_res_masks), frame.height, frame.width), np.bool_)

    def fill(logits: npt.NDArray[np.floating[Any]], mask: npt.NDArray[np.bool_]) -> None:
        for strip in strips_above_0(_single(logits), frame, columns_first=False):
            np.greater(strip.logits, 0, out=mask[strip.rows, strip.columns])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, low_res_masks, masks))  # raises the errors of the threads
    return masks


def rles_from_logits(
    low_res_masks: npt.NDArray[np.floating[Any]],
    frame: Frame,
    *,
    corner: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
) -> list[Rle]:
    """Encode the masks of ``masks_from_logits`` without allocating a full-size mask.

    Args:
        low_res_masks: logits of the selected token of each prompt, float [P, S, S].
        frame: placement of the picture, or of a crop of it, in the model frame.
        corner: x and y of the crop in the picture, pixels.
        size: height and width of the picture, pixels; None if it was not cropped.

    Returns:
        The run lengths of each region, as ``rle_from_mask`` returns them.

    Raises:
        InputError: the logits are not [P, S, S].
    """
    _check_logits(low_res_masks)
    size = (frame.height, frame.width) if size is None else size
    with ThreadPoolExecutor(THREADS) as pool:
        return list(
            pool.map(
                lambda logits: _rle_from_logits(_single(logits), frame, corner, size),
                low_res_masks,
            )
        )


def _rle_from_logits(
    logits: npt.NDArray[np.float32], frame: Frame, corner: tuple[int, int], size: tuple[int, int]
) -> Rle:
    x, y = corner
    parts = [
        _run_ends(strip.logits > 0, x + strip.columns.start, y + strip.rows.start, size[0])
        for strip in strips_above_0(logits, frame, columns_first=True)
    ]
    return _rle_from_run_ends(np.concatenate([np.empty(0, np.int64), *parts]), *size)


def rle_from_mask(mask: npt.NDArray[np.bool_]) -> Rle:
    """Encode a mask bool [H, W] as uncompressed COCO run lengths.

    Returns:
        ``size`` [H, W], and ``counts``: lengths of alternating background and foreground runs in
        column-major order, starting with background.
    """
    mask = np.asarray(mask, np.bool_)
    x, y, width, height = box_from_mask(mask)
    ends = _run_ends(mask[y : y + height, x : x + width].T, x, y, mask.shape[0])
    return _rle_from_run_ends(ends, *mask.shape)


def _run_ends(columns: npt.NDArray[np.bool_], x: int, y: int, height: int) -> npt.NDArray[np.int64]:
    """Return start and stop of each column's foreground runs, alternating, ascending, int64.

    Args:
        columns: transposed part of a mask, bool [w, h].
        x: first column of the part in the mask.
        y: first row of the part in the mask.
        height: height of the mask; pixel (x, y) has the offset x * height + y.
    """
    w, h = columns.shape
    flat = np.zeros(w * (h + 1) + 1, np.bool_)  # one background pixel before and after each column
    flat[1:].reshape(w, h + 1)[:, :h] = columns
    along, down = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), h + 1)
    ends: npt.NDArray[np.int64] = (along + x) * height + (down + y)
    return ends


def _rle_from_run_ends(ends: npt.NDArray[np.int64], height: int, width: int) -> Rle:
    apart = np.ones(len(ends), np.bool_)
    # Merge a run that reaches the bottom of a column with one at the top of the next column.
    apart[1:-1] = np.repeat(ends[1:-1:2] != ends[2::2], 2)
    counts: list[int] = np.diff(ends[apart], prepend=0, append=height * width).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return {"size": [height, width], "counts": counts}


def mask_from_rle(rle: Mapping[str, Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Decode the output of ``rle_from_mask`` to a mask bool [H, W].

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


class MasksFromRles(Sequence[npt.NDArray[np.bool_]]):
    """A sequence of masks bool [H, W] that decodes each mask on access; a slice decodes none."""

    def __init__(self, rles: Sequence[Rle]) -> None:
        self._rles = rles

    def __len__(self) -> int:
        return len(self._rles)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return MasksFromRles(self._rles[index])
        return mask_from_rle(self._rles[index])


def box_from_mask(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return the bounding box of a mask bool [H, W] as [x, y, width, height] in pixels.

    An empty mask gives [0, 0, 0, 0].
    """
    ys = np.flatnonzero(mask.any(axis=1))
    xs = np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return [0, 0, 0, 0]
    x, y = int(xs[0]), int(ys[0])
    return [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y]


def box_from_rle(rle: Rle) -> list[int]:
    """Return the bounding box of a run-length encoded mask, as ``box_from_mask`` does."""
    ends = np.cumsum(rle["counts"])
    stops = ends[1::2]
    starts = ends[: 2 * len(stops) : 2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    if not len(starts):
        return [0, 0, 0, 0]
    height = rle["size"][0]
    x, top = np.divmod(starts, height)
    last_x, bottom = np.divmod(stops - 1, height)
    left, right = int(x[0]), int(last_x[-1])
    if (x < last_x).any():  # a run that spans columns touches the bottom and the top row
        return [left, 0, right + 1 - left, height]
    y = int(top.min())
    return [left, y, right + 1 - left, int(bottom.max()) + 1 - y]


def area_from_rle(rle: Rle) -> int:
    """Return the number of foreground pixels of a run-length encoded mask."""
    return sum(rle["counts"][1::2])


def _single(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    return logits.astype(np.float32, copy=False)


def _check_logits(low_res_masks: npt.NDArray[np.floating[Any]]) -> None:
    if low_res_masks.ndim != 3 or low_res_masks.shape[1] != low_res_masks.shape[2]:
        raise InputError(f"mask logits have shape {list(low_res_masks.shape)}; expected [P, S, S]")


def mask_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of each pair of masks bool [P, H, W], float64 [P]; 1 if both are empty."""
    union = (a | b).sum(axis=(1, 2))
    ious: np.ndarray = np.where(union, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)
    return ious


def mask_iou(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """Return the IoU of two masks bool [H, W]; 1.0 if both are empty."""
    union = np.count_nonzero(found | true)
    return np.count_nonzero(found & true) / union if union else 1.0


def boundary_f(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_], distance: int) -> float:
    """Return the F-measure of the boundaries of two masks bool [H, W]; 1.0 if both are empty.

    The harmonic mean of two shares: of each boundary, the pixels that lie within ``distance`` of
    the other one, along both axes.
    """
    edges = [mask & ~_shrunk(mask) for mask in (found, true)]
    counts = [np.count_nonzero(edge) for edge in edges]
    if 0 in counts:
        return float(counts[0] == counts[1])
    near = [~_shrunk(~edge, distance) for edge in edges]
    precision = np.count_nonzero(edges[0] & near[1]) / counts[0]
    recall = np.count_nonzero(edges[1] & near[0]) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _shrunk(mask: npt.NDArray[np.bool_], distance: int = 1) -> npt.NDArray[np.bool_]:
    """Return the pixels whose neighbours within ``distance`` along both axes are in the mask.

    Beyond the border, every pixel counts as in the mask.
    """
    padded = np.pad(mask, distance, constant_values=True)
    height, width = mask.shape
    steps = range(2 * distance + 1)
    rows = np.logical_and.reduce([padded[step : step + height] for step in steps])
    shrunk: npt.NDArray[np.bool_] = np.logical_and.reduce(
        [rows[:, step : step + width] for step in steps]
    )
    return shrunk
