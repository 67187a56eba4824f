"""Automatic segmentation: one prompt per point of a grid, filters, non-maximum suppression."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tap_deploy.chunks import require_room_for_masks
from tap_deploy.errors import InputError, require_share
from tap_deploy.masks import Rle, mask_from_rle, rles_from_logits
from tap_deploy.prediction.answers import (
    Answer,
    GraphCalls,
    OnProgress,
    no_progress,
    regions_from,
)
from tap_deploy.prediction.options import GridOptions, PredictOptions
from tap_deploy.prediction.suppression import (
    Bits,
    boxes_from_masks,
    packed,
    stability_scores,
    suppressed,
)
from tap_deploy.prediction.views import View, low_res_size, num_points
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions.pipeline import DecodedPrompts, Lane
from tap_deploy.tokenizer import Tokenizer

_GROUP = 16  # masks that are filtered together; the temporary arrays fit into the CPU cache

Filter = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]
Arrays = TypeVar("Arrays", "Found", DecodedPrompts, Prompts)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Points of a view whose masks passed the filters so far; n points.

    Attributes:
        points: index of each point in the grid of the view, int64 [n].
        scores: predicted IoU, float32 [n].
        boxes: bounding boxes of the low-resolution masks, XYXY in pixels of the picture, float64
            [n, 4].
        bits: low-resolution masks, see ``packed``.
        embeddings: semantic embeddings, float32 [n, E].
    """

    points: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float64]
    bits: Bits
    embeddings: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Everything:
    """The regions of a picture, by predicted IoU, highest first.

    Attributes:
        answer: outputs of the graphs, in the frame of the whole picture.
        places: the view that each region was found in, and its logits there, float32 [S, S].
    """

    answer: Answer
    places: list[tuple[View, npt.NDArray[np.float32]]]

    def regions(self, options: PredictOptions, tokenizer: Tokenizer | None) -> Regions:
        """Convert the answer, with masks cut from the logits of each region's own view.

        Raises:
            InputError: full-size masks do not fit into free memory.
        """
        regions = regions_from(self.answer, dataclasses.replace(options, masks=False), tokenizer)
        if options.masks == "rle":
            return dataclasses.replace(regions, rles=self._rles())
        return dataclasses.replace(regions, masks=self._masks()) if options.masks else regions

    def _rles(self) -> list[Rle]:
        size = (self.answer.frame.height, self.answer.frame.width)
        return [
            rles_from_logits(logits[None], view.request.frame, corner=view.box[:2], size=size)[0]
            for view, logits in self.places
        ]

    def _masks(self) -> npt.NDArray[np.bool_]:
        shape = (len(self.places), self.answer.frame.height, self.answer.frame.width)
        require_room_for_masks(*shape)
        masks = np.zeros(shape, np.bool_)
        for mask, rle in zip(masks, self._rles(), strict=True):
            mask[:] = mask_from_rle(rle)
        return masks


class Search:
    """Finds everything in the views of a picture.

    Args:
        calls: runs the graphs.
        grid: point grid, filters and suppression.
        options: of the prediction on the points that are kept.
        is_wanted: by semantic embeddings float32 [n, E], which regions to keep, bool [n]; None
            keeps all.
    """

    def __init__(
        self,
        calls: GraphCalls,
        grid: GridOptions,
        options: PredictOptions,
        is_wanted: Filter | None,
    ) -> None:
        self._calls, self._grid, self._options = calls, grid, options
        self._is_wanted = is_wanted
        self._size = calls.config.low_res_mask_size

    def run(self, lane: Lane, views: Iterable[View], report: OnProgress) -> Everything:
        """Find the points to keep in all views, then predict on them.

        The kept points are decoded a second time: this takes less memory than holding the logits
        of all points until the suppression decides.

        Args:
            lane: runs the graphs.
            views: the whole picture, then its crops; taken one at a time.
            report: called with the points done.
        """
        done, total = 0, num_points(self._grid)
        seen: list[View] = []
        found: list[Found] = []
        for view in views:
            [request] = self._calls.encode(lane, [view.request])
            seen.append(dataclasses.replace(view, request=request))
            found.append(self._search(lane, seen[-1], seen[0], _onward(report, done, total)))
            done += len(request.prompts)
        if len(seen) > 1:
            found = self._across_views(seen, found)
        if self._is_wanted is not None:
            found = [_rows(one, np.flatnonzero(self._is_wanted(one.embeddings))) for one in found]
        return self._answer(lane, seen, [one.points for one in found], report)

    def _search(self, lane: Lane, view: View, picture: View, report: OnProgress) -> Found:
        """Decode the grid of a view and return what filters and suppression keep, best first."""
        parts = []
        for chunk, decoded in self._calls.decode_chunks(lane, view.request, report):
            for start in range(0, len(decoded.mask_index), _GROUP):
                group = _rows(decoded, slice(start, start + _GROUP))
                parts.append(self._filtered(view, picture, chunk.start + start, group))
            del decoded, group  # before the next chunk needs as much memory
        found = _joined(parts)
        order = np.argsort(-found.scores, kind="stable")
        thresholds = self._grid.box_nms_thresh, self._grid.mask_nms_thresh
        return _rows(found, suppressed(found.boxes, found.bits, order, *thresholds))

    def _filtered(self, view: View, picture: View, first: int, decoded: DecodedPrompts) -> Found:
        """Return the points of a group whose masks are good, stable, and not cut off by a crop."""
        grid, frame = self._grid, view.request.frame
        rows, columns = low_res_size(frame, self._size)
        assert decoded.low_res_masks is not None
        good = np.flatnonzero(decoded.iou_predictions > grid.pred_iou_thresh)
        logits = decoded.low_res_masks[good, :rows, :columns]
        masks = logits > 0
        stable = stability_scores(logits, grid.stability_score_offset)
        boxes = boxes_from_masks(masks)
        passed = (stable >= grid.stability_score_thresh) & masks.any(axis=(1, 2))
        passed &= ~view.cuts_off(boxes, (columns, rows), picture)
        good, cell = good[passed], frame.image_size / self._size / frame.scale  # pixels
        return Found(
            points=good + first,
            scores=decoded.iou_predictions[good],
            boxes=boxes[passed] * cell + [*view.box[:2], *view.box[:2]],
            bits=packed(masks[passed]),
            embeddings=decoded.semantic_embeddings[good],
        )

    def _across_views(self, seen: list[View], found: list[Found]) -> list[Found]:
        """Remove what several views found; regions of smaller crops, seen larger, come first."""
        pairs = list(zip(seen, found, strict=True))
        everywhere = _joined(
            [
                dataclasses.replace(one, bits=view.bits_in(seen[0], one.bits, self._size))
                for view, one in pairs
            ]
        )
        owners = np.repeat(np.arange(len(seen)), [len(one.points) for one in found])
        layers = np.array([view.layer for view in seen])[owners]
        order = np.lexsort((-everywhere.scores, -layers))
        thresholds = self._grid.crop_nms_thresh, self._grid.mask_nms_thresh
        kept = suppressed(everywhere.boxes, everywhere.bits, order, *thresholds)
        return [_rows(everywhere, kept[owners[kept] == owner]) for owner in range(len(seen))]

    def _answer(
        self,
        lane: Lane,
        seen: list[View],
        kept: list[npt.NDArray[np.int64]],
        report: OnProgress,
    ) -> Everything:
        """Predict on the kept points of each view."""
        picture = seen[0]
        prompts, decoded, places = [], [], []
        for view, points in zip(seen, kept, strict=True):
            request = dataclasses.replace(view.request, prompts=_rows(view.request.prompts, points))
            part = self._calls.decode(lane, request, no_progress)
            assert part.low_res_masks is not None
            places += [(view, logits) for logits in part.low_res_masks]
            prompts.append(view.prompts_in_picture(request.prompts))
            decoded.append(
                dataclasses.replace(part, low_res_masks=view.logits_in(picture, part.low_res_masks))
            )
        answers, asked = _joined(decoded), _joined(prompts)
        order = np.argsort(-answers.iou_predictions, kind="stable")
        if (np.diff(order) < 0).any():  # else save the copy of all logits
            answers, asked = _rows(answers, order), _rows(asked, order)
        answer = Answer(
            prompts=asked,
            frame=picture.request.frame,
            decoded=answers,
            ids=self._calls.caption(lane, answers.semantic_tokens, self._options, report),
            masks=None,
            candidates=None,
            path=picture.request.path,
        )
        return Everything(answer=answer, places=[places[row] for row in order])


def name_filter(
    options: PredictOptions, names: Sequence[str] | None, threshold: float
) -> Filter | None:
    """Return a filter for regions with one of these names; None for no names.

    Raises:
        InputError: there is no vocabulary, a name is unknown, or the threshold is out of range.
    """
    require_share("only_thresh", threshold)
    if names is None:
        return None
    vocabulary = options.vocabulary
    if vocabulary is None:
        raise InputError("only needs names, and there is no vocabulary; pass vocabulary=…")
    if isinstance(names, str) or not names:
        raise InputError(f"only is {names!r}; expected a list of names")
    vocabulary.check_names(names)
    return lambda embeddings: vocabulary.matches(names, embeddings, threshold)


def _onward(report: OnProgress, before: int, total: int) -> OnProgress:
    """Return a callback that counts the points of one view on from those of earlier ones."""
    return lambda stage, done, _: report("search points", before + done, total)


def _rows(values: Arrays, rows: npt.NDArray[np.integer[Any]] | slice) -> Arrays:
    """Return the given rows of every array."""
    names = [field.name for field in dataclasses.fields(values)]
    return dataclasses.replace(values, **{name: getattr(values, name)[rows] for name in names})


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """Concatenate every array; a single part is returned without a copy."""
    first = parts[0]
    if len(parts) == 1:
        return first
    names = [field.name for field in dataclasses.fields(first)]
    return dataclasses.replace(
        first, **{name: np.concatenate([getattr(one, name) for one in parts]) for name in names}
    )
