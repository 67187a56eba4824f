"""Writes COCO annotations, COCO results and COCO data sets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tap_deploy.errors import InputError, require_int
from tap_deploy.formats.described import DescribedRegions
from tap_deploy.formats.json_values import json_number
from tap_deploy.masks import Rle, area_from_rle, box_from_rle
from tap_deploy.optional_modules import require_module

NAMELESS = "region"  # category of regions without a name


def coco_dataset(
    pictures: Iterable[tuple[str | os.PathLike[str], DescribedRegions]],
    *,
    category_ids: Mapping[str, int] | None = None,
    first_image_id: int = 1,
    first_annotation_id: int = 1,
) -> dict[str, Any]:
    """Return a COCO data set of many pictures, as ``pycocotools.coco.COCO`` reads it from a file.

    Pictures are consumed one at a time, and only their annotations with compressed masks are
    kept. A large data set can be made in parts: start the ids of each part after those of the
    previous part, and pass the same ``category_ids`` to all.

    Args:
        pictures: pairs of the file name to write into the data set, and the regions.
        category_ids: concept -> unique id; every entry becomes a category. Regions without a
            name use the entry "region". None numbers the names from 1 in order of appearance.
        first_image_id: id of the first picture; the ids of the others follow.
        first_annotation_id: id of the first annotation, at least 1; the ids of the others follow.

    Returns:
        ``info``, ``images`` (``id``, ``file_name``, ``width`` and ``height`` in pixels),
        ``categories`` (``id``, ``name``) and ``annotations``, see ``Regions.to_coco``.

    Raises:
        InputError: the regions of a picture have no masks, a name has no category id, two names
            have the same id, or a first id is too small.
        MissingDependencyError: pycocotools is not installed.
    """
    from tap_deploy import __version__

    require_int("first_image_id", first_image_id, 0)
    require_int("first_annotation_id", first_annotation_id, 1)
    ids = {} if category_ids is None else _distinct(category_ids)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (file_name, regions) in enumerate(pictures, first_image_id):
        if category_ids is None:
            for index in range(len(regions)):
                ids.setdefault(regions.name(index) or NAMELESS, len(ids) + 1)
        size = {"width": regions.image_width, "height": regions.image_height}
        images.append({"id": image_id, "file_name": os.fspath(file_name)} | size)
        try:
            annotations += regions.to_coco(image_id, ids, first_annotation_id + len(annotations))
        except InputError as exc:
            raise InputError(f"{file_name}: {exc}") from exc
    return {
        # Some versions of pycocotools fail in loadRes without this key.
        "info": {"description": f"made by tap_deploy {__version__}"},
        "images": images,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": annotations,
    }


def coco_annotations(
    regions: DescribedRegions,
    rles: Sequence[Rle],
    image_id: int,
    category_ids: Mapping[str, int] | None,
    first_id: int,
) -> list[dict[str, Any]]:
    """Return COCO annotations, see ``Regions.to_coco``; ``rles`` are the masks of the regions."""
    require_int("first_id", first_id, 1)  # COCOeval reads id 0 as "no match"
    annotations = []
    for index, (rle, segmentation) in enumerate(zip(rles, compressed_rles(rles), strict=True)):
        annotation = {
            "id": int(first_id) + index,
            "image_id": int(image_id),
            "category_id": category_id(regions, index, category_ids),
            "bbox": [float(number) for number in box_from_rle(rle)],
            "area": area_from_rle(rle),
            "score": json_number(regions.iou_predictions[index]),
            "iscrowd": 0,
            "segmentation": segmentation,
        }
        if (name := regions.name(index)) is not None:
            annotation["category_name"] = name
        if regions.captions is not None:
            annotation["caption"] = regions.captions[index]
        annotations.append(annotation)
    return annotations


def coco_results(
    regions: DescribedRegions,
    rles: Sequence[Rle],
    image_id: int,
    category_ids: Mapping[str, int] | None,
) -> list[dict[str, Any]]:
    """Return COCO results, see ``Regions.to_coco_results``; ``rles`` are the regions' masks."""
    results = []
    for index, segmentation in enumerate(compressed_rles(rles)):
        score = json_number(regions.iou_predictions[index])
        if score is None:
            raise InputError(
                f"region {index} has the IoU prediction {regions.iou_predictions[index]}; expected "
                "a finite number; check the model with tap-export verify"
            )
        results.append(
            {
                "image_id": int(image_id),
                "category_id": category_id(regions, index, category_ids),
                "segmentation": segmentation,
                "score": score,
            }
        )
    return results


def category_id(
    regions: DescribedRegions, index: int, category_ids: Mapping[str, int] | None
) -> int:
    """Return the category id of a region, 1 without ``category_ids``.

    Raises:
        InputError: the region's likeliest concept has no id; or the region has no concept, and
            "region" has no id.
    """
    if category_ids is None:
        return 1
    name = regions.name(index)
    if (name or NAMELESS) not in category_ids:
        raise InputError(
            f"region {index} is {name!r}, which has no category id"
            if name
            else f"region {index} has no name, and {NAMELESS!r} has no category id; predict with a "
            "vocabulary, or leave out category_ids"
        )
    return int(category_ids[name or NAMELESS])


def _distinct(category_ids: Mapping[str, int]) -> dict[str, int]:
    names: dict[int, str] = {}
    for name, number in category_ids.items():
        if names.setdefault(number, name) != name:
            raise InputError(
                f"categories {names[number]!r} and {name!r} both have id {number}; expected one id "
                "per category"
            )
    return dict(category_ids)


def compressed_rles(rles: Sequence[Rle]) -> list[dict[str, Any]]:
    """Return masks as compressed COCO RLE: ``size``, and ``counts`` as text."""
    require_module("pycocotools", "COCO output", "coco")
    coco_mask = require_module("pycocotools.mask", "COCO output", "coco")
    return [
        {
            "size": rle["size"],
            "counts": coco_mask.frPyObjects(rle, *rle["size"])["counts"].decode("ascii"),
        }
        for rle in rles
    ]
