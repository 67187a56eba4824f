"""Results of a prediction, and their conversion to other formats."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.formats.coco import coco_annotations, coco_results
from tap_deploy.formats.detections import detections
from tap_deploy.formats.json_values import DECIMALS, json_number
from tap_deploy.formats.polygons import coco_polygons, feature_collection
from tap_deploy.masks import (
    MasksFromRles,
    Rle,
    area_from_rle,
    box_from_rle,
    mask_from_rle,
    rle_from_mask,
)
from tap_deploy.prompts import Prompts

if TYPE_CHECKING:
    import supervision
    from PIL import Image

    from tap_deploy.pictures.source import ImageSource
    from tap_deploy.visualize import Drawing, LabelTexts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """Results for P prompts on one picture.

    Attributes:
        masks: masks at the size of the original picture, bool [P, H, W]; None unless requested.
        rles: masks as uncompressed COCO run lengths, one per region, see ``rle_from_mask``;
            replaces ``masks`` with ``masks="rle"``.
        candidate_rles: run lengths of the masks of all M tokens per prompt, with
            ``candidates=True``; entry ``mask_index`` is the selected one.
        candidate_iou_predictions: predicted IoU of every candidate mask, float32 [P, M].
        iou_predictions: predicted IoU of the selected mask, float32 [P].
        mask_index: selected mask token, 0..M-1, int64 [P].
        concepts: the most likely (name, probability) pairs of each region, best first; None
            without a vocabulary.
        captions: one text per region; None without a tokenizer.
        caption_ids: BOS, caption, EOS and padding, int64 [P, L-1].
        semantic_tokens: semantic tokens of the selected masks, the input of the captions,
            float32 [P, C].
        semantic_embeddings: semantic embeddings of the selected masks, the input of the concepts,
            float32 [P, E].
        low_res_masks: logits of the selected masks in the model frame, float32 [P, S, S]; None if
            they were not computed, as with ``predict(..., masks=False)``.
        prompts: the P prompts, in pixels of the original picture.
        image_height: H, pixels.
        image_width: W, pixels.
        image_path: path of the picture as passed in; None if it was not a file.
        vocabulary: what the concepts were chosen from; None without one.

    Raises:
        InputError: a field does not have one entry per prompt.
    """

    masks: npt.NDArray[np.bool_] | None
    iou_predictions: npt.NDArray[np.float32]
    mask_index: npt.NDArray[np.int64]
    concepts: list[list[tuple[str, float]]] | None
    captions: list[str] | None
    caption_ids: npt.NDArray[np.int64] | None
    semantic_tokens: npt.NDArray[np.float32]
    semantic_embeddings: npt.NDArray[np.float32]
    low_res_masks: npt.NDArray[np.float32] | None
    prompts: Prompts
    image_height: int
    image_width: int
    rles: list[Rle] | None = None
    candidate_rles: list[list[Rle]] | None = None
    candidate_iou_predictions: npt.NDArray[np.float32] | None = None
    image_path: str | None = None
    vocabulary: Vocabulary | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, (int, str, Prompts, Vocabulary)):
                continue
            if len(value) != len(self.prompts):
                raise InputError(
                    f"regions: {field.name} has {len(value)} entries; expected "
                    f"{len(self.prompts)}, one per prompt"
                )
        size = (self.image_height, self.image_width)
        if self.masks is not None and self.masks.shape[1:] != size:
            raise InputError(
                f"regions: masks have shape {list(self.masks.shape)}; expected [P, {size[0]}, "
                f"{size[1]}], the size of the picture"
            )
        every = [self.rles or [], *(self.candidate_rles or [])]
        for rle in itertools.chain.from_iterable(every):
            if tuple(rle["size"]) != size:
                raise InputError(
                    f"regions: run lengths are of size {rle['size']}; expected {list(size)}, the "
                    "size of the picture"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def mask(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Return the mask of a region, bool [H, W], decoded from its run lengths if necessary."""
        if self.rles is not None:
            return mask_from_rle(self.rles[index])
        mask: npt.NDArray[np.bool_] | None = None if self.masks is None else self.masks[index]
        return mask

    def rle(self, index: int) -> Rle | None:
        """Return the uncompressed COCO run lengths of a region, ``size`` and ``counts``."""
        if self.rles is not None:
            return self.rles[index]
        return None if self.masks is None else rle_from_mask(self.masks[index])

    def box(self, index: int) -> list[int] | None:
        """Return the bounding box of a region's mask, [x, y, width, height] in pixels."""
        rle = self.rle(index)
        return None if rle is None else box_from_rle(rle)

    def area(self, index: int) -> int | None:
        """Return the area of a region's mask, pixels."""
        rle = self.rle(index)
        return None if rle is None else area_from_rle(rle)

    def likeliest(self, index: int) -> tuple[str, float] | None:
        """Return the most likely concept of a region and its probability; None without concepts."""
        return self.concepts[index][0] if self.concepts and self.concepts[index] else None

    def name(self, index: int) -> str | None:
        """Return the most likely concept of a region; None without concepts."""
        likeliest = self.likeliest(index)
        return None if likeliest is None else likeliest[0]

    def matching(self, names: str | Sequence[str], threshold: float) -> Regions:
        """Return the regions that show something with one of these names.

        Args:
            names: a name of the vocabulary, or several, exactly as spelled there.
            threshold: a region is returned if the probability of one of the names is at least
                this, 0 to 1. The probabilities of all names of the vocabulary add up to 1.

        Raises:
            InputError: the regions were predicted without a vocabulary, or a name is unknown.
        """
        if self.vocabulary is None:
            raise InputError("the regions have no names; predict with a vocabulary")
        wanted = [names] if isinstance(names, str) else list(names)
        matches = self.vocabulary.matches(wanted, self.semantic_embeddings, threshold)
        return self.take(np.flatnonzero(matches).tolist())

    def take(self, indices: Sequence[int]) -> Regions:
        """Return the regions at these indices, in this order."""
        taken: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                taken[field.name] = value[np.array(indices, np.intp)]
            elif isinstance(value, list):
                taken[field.name] = [value[index] for index in indices]
        return dataclasses.replace(self, prompts=self.prompts[list(indices)], **taken)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the tensors as plain JSON types.

        ``image`` has ``height`` and ``width`` in pixels. ``regions`` has one object per region:
        ``index``, ``points`` (x, y, label, without padding), ``iou_prediction``, ``mask_index``,
        ``concepts``, ``caption``, ``caption_ids``, ``bbox`` ([x, y, width, height]), ``area``
        (pixels) and ``segmentation`` (uncompressed COCO run lengths); fields that were not
        computed are null. ``candidates`` is present only if requested: one object per mask token
        with ``iou_prediction``, ``bbox``, ``area`` and ``segmentation``.
        """
        return {
            "image": {"height": self.image_height, "width": self.image_width},
            "regions": [self._region_dict(index) for index in range(len(self))],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_coco(
        self,
        image_id: int = 0,
        category_ids: Mapping[str, int] | None = None,
        first_id: int = 1,
    ) -> list[dict[str, Any]]:
        """Return COCO annotations: ``bbox``, ``area``, ``score`` and a compressed RLE.

        ``score`` is the predicted IoU; ``caption`` and ``category_name`` (the most likely
        concept) are present if they were computed. ``tap_deploy.formats.coco.coco_dataset``
        builds a data set from the annotations of many pictures; ``to_coco_results`` returns
        results to evaluate against one. An empty mask has area 0 and box [0, 0, 0, 0].

        Args:
            image_id: id of the picture.
            category_ids: id of every concept, and of "region" for regions without a name. Without
                it, all annotations have category 1, as class-agnostic proposals do.
            first_id: id of the first annotation, at least 1; the others follow. Ids must be unique
                within a data set.

        Raises:
            InputError: the regions have no masks, or a name has no category id.
            MissingDependencyError: pycocotools is not installed.
        """
        return coco_annotations(self, self._all_rles("COCO"), image_id, category_ids, first_id)

    def to_coco_results(
        self, image_id: int, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return COCO results, for ``COCO.loadRes`` and ``COCOeval`` of pycocotools.

        Each result has only ``image_id``, ``category_id``, ``segmentation`` (compressed RLE) and
        ``score`` (the predicted IoU): ``loadRes`` would treat a result with a caption as an image
        caption, and take the area from a box instead of the mask. Concatenate the lists of
        several pictures.

        Args:
            image_id: id of the picture in the data set to evaluate against.
            category_ids: see ``to_coco``.

        Raises:
            InputError: the regions have no masks, a name has no category id, or a score is NaN.
            MissingDependencyError: pycocotools is not installed.
        """
        return coco_results(self, self._all_rles("COCO"), image_id, category_ids)

    def to_polygons(self, tolerance: float = 0.0) -> list[list[list[float]]]:
        """Return the outline of each mask as COCO polygons, ``[[x0, y0, x1, y1, ...], ...]``.

        Coordinates are pixels of the picture. Pixel (x, y) covers (x, y) to (x + 1, y + 1), so
        polygons follow pixel edges. COCO polygons have no holes: a region with holes is cut along
        vertical lines through the holes into non-overlapping polygons. An empty mask has no
        polygons.

        Args:
            tolerance: maximum displacement of the outline when it is simplified, pixels. 0 keeps
                pixel edges: rasterised, the polygons of a region equal its mask. 1 removes the
                staircase of slanted edges.

        Raises:
            InputError: the regions have no masks, or the tolerance is not a number >= 0.
            MissingDependencyError: shapely is not installed.
        """
        return coco_polygons(self._all_rles("polygons"), tolerance)

    def to_geojson(self, tolerance: float = 0.0) -> dict[str, Any]:
        """Return the outlines as a GeoJSON ``FeatureCollection`` (RFC 7946), plain JSON types.

        Each region is a ``Feature``: ``id`` is its index; ``geometry`` is a Polygon or
        MultiPolygon with holes as inner rings, null for an empty mask; ``properties`` are ``name``
        and ``probability`` of the most likely concept, ``caption`` and ``iou_prediction``, null
        if not computed.

        Coordinates are pixels of the picture, not degrees: x to the right, y **down** from the
        upper left corner, see ``to_polygons``. Outer rings are counterclockwise in these
        coordinates, as the RFC requires; a viewer with y pointing up shows the picture flipped.

        Args:
            tolerance: see ``to_polygons``.

        Raises:
            InputError: the regions have no masks, or the tolerance is not a number >= 0.
            MissingDependencyError: shapely is not installed.
        """
        return feature_collection(self, self._all_rles("GeoJSON"), tolerance)

    def to_supervision(
        self, category_ids: Mapping[str, int] | None = None
    ) -> supervision.Detections:
        """Return ``supervision.Detections``, for the annotators and trackers of that package.

        ``xyxy`` float32 [P, 4] are the bounding boxes of the masks in pixels, from the upper left
        corner of the first pixel to the lower right corner of the last; ``mask`` is bool
        [P, H, W]; ``confidence`` float32 [P] are the predicted IoUs; ``class_id`` is int64 [P].
        ``data`` has ``class_name`` (the most likely concepts) and ``caption``, text [P] each, if
        they were computed.

        Args:
            category_ids: class id of every concept. Without it, the names of these regions are
                numbered from 0 in order of appearance, so ids are not comparable between
                pictures. Regions without names have class 0.

        Raises:
            InputError: the regions have no masks, or a name has no class id.
            MissingDependencyError: supervision is not installed.
        """
        return detections(self, self._all_rles("supervision"), category_ids)

    def visualize(
        self,
        image: ImageSource,
        scale: int = 1,
        *,
        font: str | os.PathLike[str] | None = None,
    ) -> Image.Image:
        """Draw masks, prompts and labels on the picture, and return it in mode RGB.

        Args:
            image: the picture that was predicted on.
            scale: factor by which the picture is enlarged first, 1..16; for small pictures.
            font: TrueType or OpenType file for the labels; None for Pillow's own font. Missing
                glyphs come from the system fonts; if no font has them, a warning names the
                package to install.

        Raises:
            InputError: the picture cannot be read or has another size, the scale is out of range,
                or the font cannot be read.
        """
        from tap_deploy.visualize import draw_regions

        return draw_regions(image, self._drawing(), scale, font=font)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the overlay, if the picture was a file, and a table."""
        from tap_deploy.visualize.notebook import TableRow, html_from_drawing

        rows = []
        for index in range(len(self)):
            name, probability = self.likeliest(index) or (None, None)
            caption = None if self.captions is None else self.captions[index]
            iou = float(self.iou_predictions[index])
            rows.append(TableRow(name=name, probability=probability, iou=iou, caption=caption))
        return html_from_drawing(self.image_path, self._drawing(), rows)

    def _drawing(self) -> Drawing:
        from tap_deploy.visualize import Drawing

        return Drawing(
            height=self.image_height,
            width=self.image_width,
            prompts=self.prompts,
            masks=self.masks if self.rles is None else MasksFromRles(self.rles),
            texts=[self._label(index) for index in range(len(self))],
        )

    def _label(self, index: int) -> LabelTexts:
        from tap_deploy.visualize import LabelTexts

        caption = "" if self.captions is None else self.captions[index]
        likeliest = self.likeliest(index)
        if likeliest is None:
            detail = f"IoU {self.iou_predictions[index]:.2f}"
            return LabelTexts(title=f"region {index}", detail=detail, caption=caption)
        name, probability = likeliest
        return LabelTexts(title=name, detail=f"{probability:.2f}", caption=caption)

    def _all_rles(self, reader: str) -> list[Rle]:
        if self.rles is not None:
            return self.rles
        if self.masks is None:
            raise InputError(
                f"the regions have no masks, which {reader} needs; predict with masks=True or 'rle'"
            )
        return [rle_from_mask(mask) for mask in self.masks]

    def _region_dict(self, index: int) -> dict[str, Any]:
        rle = self.rle(index)
        concepts = None if self.concepts is None else self.concepts[index]
        return {
            "index": index,
            "points": self._points(index),
            "iou_prediction": json_number(self.iou_predictions[index]),
            "mask_index": int(self.mask_index[index]),
            "concepts": None
            if concepts is None
            else [{"name": name, "probability": json_number(p)} for name, p in concepts],
            "caption": None if self.captions is None else self.captions[index],
            "caption_ids": None if self.caption_ids is None else self.caption_ids[index].tolist(),
            **_mask_dict(rle),
            **self._candidate_dicts(index),
        }

    def _candidate_dicts(self, index: int) -> dict[str, Any]:
        if self.candidate_rles is None or self.candidate_iou_predictions is None:
            return {}
        scores = self.candidate_iou_predictions[index]
        return {
            "candidates": [
                {"iou_prediction": json_number(score), **_mask_dict(rle)}
                for score, rle in zip(scores, self.candidate_rles[index], strict=True)
            ]
        }

    def _points(self, index: int) -> list[list[float]]:
        labels = self.prompts.labels[index].tolist()
        coords = self.prompts.coords[index].tolist()
        return [
            [round(x, DECIMALS), round(y, DECIMALS), label]
            for (x, y), label in zip(coords, labels, strict=True)
            if label != PointLabel.PADDING
        ]


def _mask_dict(rle: Rle | None) -> dict[str, Any]:
    return {
        "bbox": None if rle is None else box_from_rle(rle),
        "area": None if rle is None else area_from_rle(rle),
        "segmentation": rle,
    }
