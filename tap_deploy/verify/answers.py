"""What differences of tensors do to the answers: masks, names and captions of the chain."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.concepts import Vocabulary
from tap_deploy.image import Frame
from tap_deploy.masks import boundary_f, mask_iou, masks_from_logits
from tap_deploy.verify.recorder import at_first_difference, choice_margins
from tap_deploy.verify.tolerances import Tolerance

TOP = 5
BOUNDARY_PIXELS = 2
# Regions with the lowest IoU that are kept as pictures.
WORST = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionDifference:
    """The first token in which a caption differs from the reference's.

    Attributes:
        region: name of the sample and row of the prompt.
        step: position of the token, 1 for the first after BOS.
        expected: id of the reference's token.
        actual: id of this token.
        margin: distance between the logits of both.
        near_tie: whether the tolerance allows that distance, so that it is no fault.
    """

    region: str
    step: int
    expected: int
    actual: int
    margin: float
    near_tie: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WorstRegion:
    """One of the regions with the lowest mask IoU.

    Attributes:
        region: name of the sample and row of the prompt.
        iou: IoU of the masks.
        boundary_f: F-measure of their boundaries.
        image: picture in the model frame, uint8 ``[S, S, 3]`` RGB.
        expected: mask of the reference, bool ``[S, S]``.
        actual: this mask, bool ``[S, S]``.
        expected_ids: caption of the reference, int64 ``[T]``.
        actual_ids: this caption, int64 ``[T]``.
    """

    region: str
    iou: float
    boundary_f: float
    image: np.ndarray
    expected: np.ndarray
    actual: np.ndarray
    expected_ids: np.ndarray
    actual_ids: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerFloors:
    """Least agreement of the answers with those of the reference.

    Attributes:
        mask_iou: mean IoU of the masks.
        concept_top1: share of regions with the same likeliest concept.
        captions_identical: share of identical captions.
        near_ties: whether a caption that first differs in a near-tie counts as identical.
    """

    mask_iou: float
    concept_top1: float
    captions_identical: float
    near_ties: bool = False


# fp32 answers are those of the reference, except that a few pixels at the edge of a mask may change
# sides, and a concept that is nearly tied.
FP32_FLOORS = AnswerFloors(
    mask_iou=0.999, concept_top1=0.99, captions_identical=1.0, near_ties=True
)


class AnswerTally:
    """Counts how far the answers of a chain of graphs agree with the reference's.

    Masks are compared in the model frame, for the mask token that the reference selects.

    Attributes:
        ious: IoU of each region's masks.
        boundary_fs: F-measure of their boundaries, at ``BOUNDARY_PIXELS``.
        same_token: whether the graph selects the same mask token, for each region.
        same_top1: whether the likeliest concept is the same, for each region; empty without a
            vocabulary.
        top5_overlap: share of the reference's five likeliest concepts among this one's.
        same_caption: whether the captions are equal, for each region.
        differences: where the others differ first.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        caption_tolerance: Tolerance,
        *,
        only_pictures: bool = False,
    ) -> None:
        """Start without regions.

        Args:
            vocabulary: concepts that regions are classified into; None without.
            caption_tolerance: bound on the margin of a near-tie.
            only_pictures: leave out made samples, whose prompts mean nothing.
        """
        self._vocabulary, self._caption_tolerance = vocabulary, caption_tolerance
        self._only_pictures = only_pictures
        self.ious: list[float] = []
        self.boundary_fs: list[float] = []
        self.same_token: list[bool] = []
        self.same_top1: list[bool] = []
        self.top5_overlap: list[float] = []
        self.same_caption: list[bool] = []
        self.differences: list[CaptionDifference] = []
        self._worst: list[tuple[float, int, WorstRegion]] = []

    def add(
        self,
        sample: GoldenSample,
        outputs: Mapping[str, np.ndarray],
        actual_ids: np.ndarray,
        expected_ids: np.ndarray,
        logits: np.ndarray | None,
    ) -> None:
        """Compare the regions of a sample.

        Args:
            sample: picture, prompts and the reference's outputs.
            outputs: outputs of the prompt decoder for all tokens, ``[P, M, ...]``, and
                ``mask_index``, ``[P]``.
            actual_ids: captions, int64 ``[P, T]``, padded after EOS.
            expected_ids: captions of the reference, as ``actual_ids``.
            logits: logits measured on the reference's captions, float32 ``[P, T - 1, V]``; None if
                all captions are equal.
        """
        if self._only_pictures and not sample.picture:
            return
        self.same_token += (outputs[graphs.MASK_INDEX] == sample.mask_index).tolist()
        self._add_names(sample, outputs[graphs.SEMANTIC_EMBEDDINGS])
        self.same_caption += (actual_ids == expected_ids).all(axis=1).tolist()
        if logits is not None:
            self._add_differences(sample.name, actual_ids, expected_ids, logits)
        self._add_masks(sample, outputs[graphs.LOW_RES_MASKS], actual_ids, expected_ids)

    @property
    def worst(self) -> list[WorstRegion]:
        """The regions with the lowest IoU, lowest first, without those with equal masks."""
        return [region for *_, region in sorted(self._worst, key=lambda entry: -entry[0])]

    def failures(self, floors: AnswerFloors) -> list[str]:
        """Return the agreements below their floors, as parts of a sentence."""
        alike = sum(self.same_caption)
        if floors.near_ties:
            alike = len(self.same_caption) - sum(not found.near_tie for found in self.differences)
        found: dict[str, tuple[float, float]] = {
            "mean mask IoU": (float(np.mean(self.ious)), floors.mask_iou),
            "share of equal captions": (alike / len(self.same_caption), floors.captions_identical),
        }
        if self.same_top1:
            found["share of equal names"] = (float(np.mean(self.same_top1)), floors.concept_top1)
        return [
            f"{what} is {value:.4f}, expected at least {floor:g}"
            for what, (value, floor) in found.items()
            if not value >= floor
        ]

    def _add_names(self, sample: GoldenSample, embeddings: np.ndarray) -> None:
        if self._vocabulary is None:
            return
        rows, top = np.arange(len(sample.mask_index)), min(TOP, len(self._vocabulary))
        expected, actual = (
            np.argsort(-self._vocabulary.scores(array[rows, sample.mask_index]), axis=1)[:, :top]
            for array in (sample.semantic_embeddings, embeddings)
        )
        self.same_top1 += (expected[:, 0] == actual[:, 0]).tolist()
        self.top5_overlap += [
            len(np.intersect1d(a, b)) / top for a, b in zip(expected, actual, strict=True)
        ]

    def _add_differences(
        self, name: str, actual: np.ndarray, expected: np.ndarray, logits: np.ndarray
    ) -> None:
        at_first = at_first_difference(actual, expected)
        choice, wanted = (np.where(at_first, ids[:, 1:], 0) for ids in (actual, expected))
        margins = choice_margins(logits, choice, wanted)
        most = self._caption_tolerance.max
        if self._caption_tolerance.relative:
            most *= float(np.abs(logits).max(initial=0.0))
        for row, column in np.argwhere(at_first):
            self.differences.append(
                CaptionDifference(
                    region=f"{name}, prompt {row}",
                    step=int(column) + 1,
                    expected=int(wanted[row, column]),
                    actual=int(choice[row, column]),
                    margin=float(margins[row, column]),
                    near_tie=bool(margins[row, column] <= most),
                )
            )

    def _add_masks(
        self,
        sample: GoldenSample,
        low_res_masks: np.ndarray,
        actual_ids: np.ndarray,
        expected_ids: np.ndarray,
    ) -> None:
        side = sample.images.shape[1]
        frame = Frame.for_image(side, side, side)
        image = np.ascontiguousarray(sample.images[0, ..., ::-1])
        for row, index in enumerate(sample.mask_index):
            logits = np.stack([sample.low_res_masks[row, index], low_res_masks[row, index]])
            expected, actual = masks_from_logits(logits, frame)
            iou = mask_iou(actual, expected)
            boundary = boundary_f(actual, expected, BOUNDARY_PIXELS)
            self.ious.append(iou)
            self.boundary_fs.append(boundary)
            if iou == 1:
                continue
            region = WorstRegion(
                region=f"{sample.name}, prompt {row}",
                iou=iou,
                boundary_f=boundary,
                image=image,
                expected=expected,
                actual=actual,
                expected_ids=expected_ids[row],
                actual_ids=actual_ids[row],
            )
            entry = (-iou, len(self.ious), region)  # the number breaks ties
            if len(self._worst) < WORST:
                heapq.heappush(self._worst, entry)
            else:
                heapq.heappushpop(self._worst, entry)
