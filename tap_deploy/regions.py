"""Regions: what the model says about each prompt, and the formats to hand it on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.masks import Rle, area_from_rle, box_from_rle, mask_from_rle, rle_from_mask
from tap_deploy.prompts import Prompts

if TYPE_CHECKING:
    from PIL import Image

    from tap_deploy.image import ImageSource

_DECIMALS = 6  # of scores and probabilities in JSON


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """The answers to P prompts on one picture.

    Attributes:
        masks: bool [P, H, W] at the size of the original picture; None if not asked for.
        rles: the same as uncompressed COCO run lengths, one a region, see ``rle_from_mask``;
            there in place of ``masks`` if they were asked for with ``masks="rle"``.
        candidate_rles: run lengths of the masks of all M tokens of each prompt, if they were asked
            for with ``candidates=True``; that of number ``mask_index`` is the answer.
        candidate_iou_predictions: float32 [P, M], how well the model thinks that they fit.
        iou_predictions: float32 [P], how well the model thinks that the mask fits.
        mask_index: int64 [P], the mask token that answered, 0..M-1.
        concepts: per region the (name, probability) of its likeliest concepts, likeliest
            first; None without a vocabulary.
        captions: one text a region; None without a tokenizer.
        caption_ids: int64 [P, L-1], BOS, the caption, EOS and padding.
        semantic_tokens: float32 [P, C] of the chosen token, what captions are made from.
        semantic_embeddings: float32 [P, E] of the chosen token, what concepts are made from.
        low_res_masks: float32 [P, S, S], mask logits of the chosen token in the model frame.
        prompts: the P prompts, in pixels of the original picture.
        image_height: H, pixels.
        image_width: W, pixels.

    Raises:
        InputError: a field does not hold one entry per prompt.
    """

    masks: npt.NDArray[np.bool_] | None
    iou_predictions: npt.NDArray[np.float32]
    mask_index: npt.NDArray[np.int64]
    concepts: list[list[tuple[str, float]]] | None
    captions: list[str] | None
    caption_ids: npt.NDArray[np.int64] | None
    semantic_tokens: npt.NDArray[np.float32]
    semantic_embeddings: npt.NDArray[np.float32]
    low_res_masks: npt.NDArray[np.float32]
    prompts: Prompts
    image_height: int
    image_width: int
    rles: list[Rle] | None = None
    candidate_rles: list[list[Rle]] | None = None
    candidate_iou_predictions: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, (int, Prompts)):
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
        """Return the mask of a region, bool [H, W]; decoded if only its run lengths are there."""
        if self.rles is not None:
            return mask_from_rle(self.rles[index])
        mask: npt.NDArray[np.bool_] | None = None if self.masks is None else self.masks[index]
        return mask

    def rle(self, index: int) -> Rle | None:
        """Return the run lengths of a region, ``size`` and ``counts`` as COCO has them."""
        if self.rles is not None:
            return self.rles[index]
        return None if self.masks is None else rle_from_mask(self.masks[index])

    def box(self, index: int) -> list[int] | None:
        """Return the box around a region's mask, [x, y, width, height] in pixels."""
        rle = self.rle(index)
        return None if rle is None else box_from_rle(rle)

    def area(self, index: int) -> int | None:
        """Return how many pixels a region's mask has."""
        rle = self.rle(index)
        return None if rle is None else area_from_rle(rle)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain JSON types.

        ``image`` holds ``height`` and ``width`` in pixels; ``regions`` one object each: ``index``,
        ``points`` (x, y, label, without padding), ``iou_prediction``, ``mask_index``, ``concepts``,
        ``caption``, ``caption_ids``, ``bbox`` ([x, y, width, height]), ``area`` (pixels) and
        ``segmentation`` (uncompressed COCO run lengths). What was not computed is null, but for
        ``candidates``, which is there if it was asked for: one object per mask token, with
        ``iou_prediction``, ``bbox``, ``area`` and ``segmentation``.
        """
        return {
            "image": {"height": self.image_height, "width": self.image_width},
            "regions": [self._region_dict(index) for index in range(len(self))],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_coco(
        self, image_id: int = 0, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return COCO annotations: ``bbox``, ``area``, ``score`` and a compressed RLE.

        ``score`` is the IoU prediction; ``caption`` and ``category_name`` (the likeliest
        concept) are there if they were computed. Ids count from 1.

        Args:
            image_id: of the picture, for all annotations.
            category_ids: the id of every concept in the data set at hand; without it all
                annotations are of category 1, as those of class-agnostic proposals.

        Raises:
            InputError: the regions have no masks, or a name has no category id.
            MissingDependencyError: pycocotools is not installed.
        """
        if self.masks is None and self.rles is None:
            raise InputError(
                "the regions have no masks, which COCO needs; predict with masks=True or 'rle'"
            )
        try:
            import pycocotools.mask as coco_mask
        except ImportError as exc:
            raise MissingDependencyError(
                'pycocotools is not installed; COCO output needs it: pip install "tap-deploy[coco]"'
            ) from exc
        annotations = []
        for index in range(len(self)):
            rle = self.rle(index)
            assert rle is not None
            compressed = coco_mask.frPyObjects(rle, *rle["size"])
            annotations.append(
                {
                    "id": index + 1,
                    "image_id": image_id,
                    "bbox": [float(number) for number in box_from_rle(rle)],
                    "area": area_from_rle(rle),
                    "score": _number(self.iou_predictions[index]),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": rle["size"],
                        "counts": compressed["counts"].decode("ascii"),
                    },
                }
                | self._coco_words(index, category_ids)
            )
        return annotations

    def _coco_words(self, index: int, category_ids: Mapping[str, int] | None) -> dict[str, Any]:
        words: dict[str, Any] = {"category_id": 1}
        if self.concepts is not None and self.concepts[index]:
            name = words["category_name"] = self.concepts[index][0][0]
            if category_ids is not None:
                if name not in category_ids:
                    raise InputError(f"region {index} is {name!r}, which has no category id")
                words["category_id"] = category_ids[name]
        if self.captions is not None:
            words["caption"] = self.captions[index]
        return words

    def visualize(
        self,
        image: ImageSource,
        scale: int = 1,
        *,
        font: str | os.PathLike[str] | None = None,
    ) -> Image.Image:
        """Draw masks, prompts and labels on the picture that was predicted on, mode RGB.

        Args:
            image: the picture.
            scale: by how much its sides are enlarged first, 1..16; for small pictures.
            font: a TrueType or OpenType file for the labels. What it lacks, or Pillow's own font
                without it, comes from the fonts of the system; of what no font has a warning
                tells the package to install.

        Raises:
            InputError: the picture cannot be read, or has another size; no such scale; or a font
                that cannot be read.
        """
        from tap_deploy.visualize import draw_regions  # it imports this module

        return draw_regions(image, self, scale, font=font)

    def _region_dict(self, index: int) -> dict[str, Any]:
        rle = self.rle(index)
        concepts = None if self.concepts is None else self.concepts[index]
        return {
            "index": index,
            "points": self._points(index),
            "iou_prediction": _number(self.iou_predictions[index]),
            "mask_index": int(self.mask_index[index]),
            "concepts": None
            if concepts is None
            else [{"name": name, "probability": _number(p)} for name, p in concepts],
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
                {"iou_prediction": _number(score), **_mask_dict(rle)}
                for score, rle in zip(scores, self.candidate_rles[index], strict=True)
            ]
        }

    def _points(self, index: int) -> list[list[float]]:
        labels = self.prompts.labels[index].tolist()
        coords = self.prompts.coords[index].tolist()
        return [
            [round(x, _DECIMALS), round(y, _DECIMALS), label]
            for (x, y), label in zip(coords, labels, strict=True)
            if label != PointLabel.PADDING
        ]


def _mask_dict(rle: Rle | None) -> dict[str, Any]:
    return {
        "bbox": None if rle is None else box_from_rle(rle),
        "area": None if rle is None else area_from_rle(rle),
        "segmentation": rle,
    }


def _number(value: Any) -> float | None:
    """Return a number that JSON can write: few digits, and null for NaN and infinity."""
    number = float(value)
    return round(number, _DECIMALS) if math.isfinite(number) else None
