"""Instance segmentation on COCO and LVIS: AP of masks from given boxes, and IoU from clicks."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.evaluation.average_precision import (
    Metric,
    coco_scores,
    library_versions,
    lvis_scores,
    require_library,
)
from tap_deploy.evaluation.boxes import prompts_from_boxes
from tap_deploy.evaluation.clicks import Click, first_click, next_click
from tap_deploy.evaluation.data_pictures import DataPicture
from tap_deploy.evaluation.instances import LVIS, InstanceFormat, Instances
from tap_deploy.evaluation.json_files import Entry
from tap_deploy.evaluation.subject import Encoded, Subject, encoded
from tap_deploy.evaluation.truth_masks import truth_mask
from tap_deploy.formats.coco import compressed_rles
from tap_deploy.masks import mask_iou
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.storage.files import sha256_of_file

CLICKS = (1, 3)  # numbers of points at which the IoU is taken
_PERCENT = 100.0
_DECIMALS = 6


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """Boxes of a detector as prompts, mask token 0 as answer, the detector's scores and classes.

    Each annotated instance is also prompted by 1 and by 3 points, see ``clicks``; the answer is
    the mask of the highest predicted IoU among tokens 1 to 3.

    Attributes:
        form: COCO or LVIS.
        instances: pictures and true masks.
        detections: boxes by picture; None for the IoU from clicks alone.
        key: what the answers depend on, by name.
    """

    form: InstanceFormat
    instances: Instances
    detections: Mapping[int, Sequence[Entry]] | None
    key: Mapping[str, str]

    @classmethod
    def read(
        cls,
        form: InstanceFormat,
        annotations: pathlib.Path,
        images: pathlib.Path,
        detections: pathlib.Path | None = None,
        *,
        limit: int | None = None,
    ) -> Segmentation:
        """Read a data set; see ``Instances`` for the arguments.

        Raises:
            InputError: a file is malformed, or a picture is missing.
            MissingDependencyError: a library of the data set is not installed.
        """
        require_library(form)
        instances = Instances.read(annotations, images, form, limit=limit)
        key = {"annotations": instances.sha256}
        if detections is None:
            return cls(form=form, instances=instances, detections=None, key=key)
        return cls(
            form=form,
            instances=instances,
            detections=instances.detections(detections),
            key=key | {"detections": sha256_of_file(detections)},
        )

    @property
    def name(self) -> str:
        """Name of the protocol."""
        return f"{self.form.name.lower()}-seg"

    @property
    def conditions(self) -> dict[str, str]:
        """What the metrics depend on beside the answers."""
        return library_versions(self.form)

    @property
    def pictures(self) -> tuple[DataPicture, ...]:
        """The pictures to evaluate."""
        return self.instances.pictures

    @property
    def num_regions(self) -> int:
        """Number of boxes, and of instances to click on."""
        boxes = () if self.detections is None else self.detections.values()
        return sum(map(len, boxes)) + sum(map(len, self._truths.values()))

    @functools.cached_property
    def _truths(self) -> dict[int, list[Entry]]:
        every = self.instances.by_picture()
        return {
            picture: [entry for entry in entries if not entry.get("iscrowd")]
            for picture, entries in every.items()
        }

    def answer(self, subject: Subject, picture: DataPicture) -> dict[str, Any]:
        """Return ``masks``, compressed run lengths per detection, and ``ious`` per instance."""
        boxes = () if self.detections is None else self.detections[picture.id]
        truths = self._truths[picture.id]
        if not boxes and not truths:
            return {"masks": [], "ious": {}}
        image = encoded(subject, picture)
        found: list[str] = []
        if boxes:
            prompts = prompts_from_boxes([entry["bbox"] for entry in boxes], image.frame)
            regions = subject.predict(image, prompts=prompts, masks="rle", captions=False)
            assert regions.rles is not None
            found = [rle["counts"] for rle in compressed_rles(regions.rles)]
        return {"masks": found, "ious": click_ious(subject, image, truths)}

    def score(self, answers: Mapping[int, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the metrics in percent; None where no instance counts."""
        scores: dict[str, float | None] = {}
        if self.detections is not None:
            metric = lvis_scores if self.form is LVIS else coco_scores
            scores |= metric(self.instances, self._results(answers), Metric.SEGM)
        for clicks in CLICKS:
            ious = [
                iou for answer in answers.values() for iou in answer["ious"].get(str(clicks), ())
            ]
            scores[f"mIoU {clicks}pt"] = _PERCENT * float(np.mean(ious)) if ious else None
        return scores

    def _results(self, answers: Mapping[int, Mapping[str, Any]]) -> list[Entry]:
        assert self.detections is not None
        return [
            {
                "image_id": picture.id,
                "category_id": entry["category_id"],
                "segmentation": {"size": list(picture.size or ()), "counts": counts},
                "score": entry["score"],
            }
            for picture in self.pictures
            for entry, counts in zip(
                self.detections[picture.id], answers[picture.id]["masks"], strict=True
            )
        ]


def click_ious(
    subject: Subject, image: Encoded, annotations: Sequence[Entry]
) -> dict[str, list[float]]:
    """Return the IoU of the mask of each annotation after each of ``CLICKS`` points.

    Annotations with an empty mask are left out.

    Args:
        subject: the predictor.
        image: the encoded picture.
        annotations: annotations of the picture.
    """
    frame = image.frame
    masks = [truth_mask(entry, frame.height, frame.width) for entry in annotations]
    truths = [mask for mask in masks if mask.any()]
    if not truths:
        return {}
    rows: list[list[Click]] = [[first_click(mask)] for mask in truths]
    ious: dict[str, list[float]] = {}
    for clicks in range(1, max(CLICKS) + 1):
        regions = subject.predict(
            image, prompts=Prompts.from_points(rows), masks="rle", captions=False
        )
        if clicks in CLICKS:
            ious[str(clicks)] = [
                round(mask_iou(_mask(regions, i), truth), _DECIMALS)
                for i, truth in enumerate(truths)
            ]
        if clicks < max(CLICKS):
            for i, truth in enumerate(truths):
                click = next_click(_mask(regions, i), truth)
                rows[i] += [] if click is None else [click]
    return ious


def _mask(regions: Regions, index: int) -> npt.NDArray[np.bool_]:
    mask = regions.mask(index)
    assert mask is not None
    return mask
