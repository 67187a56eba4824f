"""Region descriptions of Visual Genome, in both formats."""

from __future__ import annotations

import dataclasses
import pathlib

from tap_deploy.evaluation.data_pictures import DataPicture, located
from tap_deploy.evaluation.json_files import BOX, ID, NAME, NUMBER, TEXT, Entry, JsonFile

_FOLDERS = ("", "VG_100K/", "VG_100K_2/")  # of the official download
_REGION = {"x": NUMBER, "y": NUMBER, "width": NUMBER, "height": NUMBER, "phrase": TEXT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phrase:
    """An annotated region.

    Attributes:
        box: [x, y, width, height], pixels.
        caption: its description.
    """

    box: tuple[float, float, float, float]
    caption: str


def read_phrases(
    path: pathlib.Path, images: pathlib.Path, *, limit: int | None = None
) -> tuple[tuple[DataPicture, ...], dict[int, list[Phrase]]]:
    """Read region descriptions and locate their pictures.

    Args:
        path: ``test.json`` of the public script (``images`` and ``annotations`` with captions, as
            in COCO), or Visual Genome's own ``region_descriptions.json``.
        images: folder of the pictures, or of the folders VG_100K and VG_100K_2.
        limit: only this many pictures, the first of the file; None for all.

    Returns:
        The pictures, and the regions by picture.

    Raises:
        InputError: the file is malformed, or a picture is missing.
    """
    file = JsonFile(
        path, "pass test.json or region_descriptions.json of Visual Genome in --annotations"
    )
    read = _own_format if isinstance(file.content, list) else _coco_format
    pictures, phrases = read(file)
    chosen = located(pictures[:limit], images)
    if not any(phrases[picture.id] for picture in chosen):
        raise file.error(f"none of the {len(chosen)} pictures to evaluate has a region")
    return chosen, phrases


def _coco_format(file: JsonFile) -> tuple[list[DataPicture], dict[int, list[Phrase]]]:
    listed = file.entries("images", {"id": ID, "file_name": NAME})
    annotations = file.entries("annotations", {"image_id": ID, "bbox": BOX, "caption": TEXT})
    by_id = file.distinct_ids(listed, "images")
    file.check_known(annotations, "annotations", "image_id", by_id)
    phrases: dict[int, list[Phrase]] = {picture: [] for picture in by_id}
    for entry in annotations:
        phrases[entry["image_id"]].append(
            Phrase(box=tuple(entry["bbox"]), caption=entry["caption"])
        )
    pictures = [
        DataPicture(id=entry["id"], names=(entry["file_name"],), size=None) for entry in listed
    ]
    return pictures, phrases


def _own_format(file: JsonFile) -> tuple[list[DataPicture], dict[int, list[Phrase]]]:
    listed = file.entries(None, {"id": ID})
    file.distinct_ids(listed, "entry")
    phrases: dict[int, list[Phrase]] = {}
    for index, entry in enumerate(listed):
        regions = entry.get("regions")
        if not isinstance(regions, list):
            raise file.error(f"entry[{index}] has no list 'regions'")
        file.check(regions, f"entry[{index}].regions", _REGION)
        phrases[entry["id"]] = [_phrase(file, index, region) for region in regions]
    pictures = [
        DataPicture(
            id=entry["id"],
            names=tuple(f"{folder}{entry['id']}.jpg" for folder in _FOLDERS),
            size=None,
        )
        for entry in listed
    ]
    return pictures, phrases


def _phrase(file: JsonFile, index: int, region: Entry) -> Phrase:
    box = (region["x"], region["y"], region["width"], region["height"])
    if not BOX.fits(list(box)):
        raise file.error(f"entry[{index}] has a region with the box {box}; expected {BOX.text}")
    return Phrase(box=box, caption=region["phrase"])
