"""COCO: the annotations of one picture, results to evaluate, and data sets of many pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tap_deploy.errors import InputError, require_int
from tap_deploy.formats.described import DescribedRegions
from tap_deploy.formats.json_values import json_number
from tap_deploy.masks import Rle, area_from_rle, box_from_rle
from tap_deploy.optional_modules import require_module

NAMELESS = "region"  # the category of regions without a name


def coco_dataset(
    pictures: Iterable[tuple[str | os.PathLike[str], DescribedRegions]],
    *,
    category_ids: Mapping[str, int] | None = None,
    first_image_id: int = 1,
    first_annotation_id: int = 1,
) -> dict[str, Any]:
    """Return a COCO data set of many pictures: what ``pycocotools.coco.COCO`` reads as a file.

    Pictures are taken one at a time, and of their regions the annotations are kept, whose masks
    are compressed. Parts of a large data set have ids of their own, and can be joined, if each
    begins its ids where the one before ended, and all are given the same ``category_ids``.

    Args:
        pictures: pairs of a file name, as it shall stand in the data set, and the regions.
        category_ids: the id of every concept, all different, of which all become categories. A
            region without a name has that of "region". Without it the names that occur are
            numbered from 1 in the order in which they come.
        first_image_id: the id of the first picture; the others count on.
        first_annotation_id: the id of the first annotation, at least 1; the others count on.

    Returns:
        ``info``, ``images`` (``id``, ``file_name``, ``width`` and ``height`` in pixels),
        ``categories`` (``id``, ``name``) and ``annotations``, see ``Regions.to_coco``.

    Raises:
        InputError: the regions of a picture have no masks, a name has no category id, two names
            have the same one, or an id cannot be used.
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
        # Some versions of pycocotools fail in loadRes without it.
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
    """See ``Regions.to_coco``; ``rles`` are the run lengths of the regions."""
    require_int("first_id", first_id, 1)  # COCOeval takes id 0 for "nothing found"
    annotations = []
    for index, (rle, segmentation) in enumerate(zip(rles, _compressed(rles), strict=True)):
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
    """See ``Regions.to_coco_results``; ``rles`` are the run lengths of the regions."""
    results = []
    for index, segmentation in enumerate(_compressed(rles)):
        score = json_number(regions.iou_predictions[index])
        if score is None:
            raise InputError(
                f"region {index} has the IoU prediction {regions.iou_predictions[index]}; COCO "
                "results need a number; check the model with tap-export verify"
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
        InputError: its likeliest concept has no id; or it has no concept, and "region" has none.
    """
    if category_ids is None:
        return 1
    name = regions.name(index)
    if (name or NAMELESS) not in category_ids:
        raise InputError(
            f"region {index} is {name!r}, which has no category id"
            if name
            else f"region {index} has no name, and {NAMELESS!r} no category id; predict with a "
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


def _compressed(rles: Sequence[Rle]) -> list[dict[str, Any]]:
    """Return run lengths as COCO compresses them: ``size``, and ``counts`` as text."""
    require_module("pycocotools", "COCO output", "coco")
    coco_mask = require_module("pycocotools.mask", "COCO output", "coco")
    return [
        {
            "size": rle["size"],
            "counts": coco_mask.frPyObjects(rle, *rle["size"])["counts"].decode("ascii"),
        }
        for rle in rles
    ]
