"""Instance annotations of COCO and LVIS, and detections to prompt with."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping

from tap_deploy.evaluation.data_pictures import DataPicture, located
from tap_deploy.evaluation.json_files import (
    BOX,
    FLAG,
    FREQUENCY,
    ID,
    IDS,
    NAME,
    NUMBER,
    PIXELS,
    SEGMENTATION,
    Entry,
    JsonFile,
    Kind,
)
from tap_deploy.evaluation.truth_masks import fills
from tap_deploy.storage.files import sha256_of_file

_URL = "coco_url"
_FAR = 2  # sides of the picture; polygons reach out of it by a few pixels
_ANNOTATION = {
    "id": ID,
    "image_id": ID,
    "category_id": ID,
    "bbox": BOX,
    "area": NUMBER,
    "segmentation": SEGMENTATION,
}
_DETECTION = {"image_id": ID, "category_id": ID, "bbox": BOX, "score": NUMBER}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceFormat:
    """The format of an annotation file.

    Attributes:
        name: of the data set.
        file: an official file, for messages.
        image: values of an image beside id, height and width.
        category: values of a category beside id and name.
        annotation: values of an annotation beside those that both data sets have.
    """

    name: str
    file: str
    image: Mapping[str, Kind]
    category: Mapping[str, Kind]
    annotation: Mapping[str, Kind]


COCO = InstanceFormat(
    name="COCO",
    file="instances_val2017.json",
    image={},
    category={},
    annotation={"iscrowd": FLAG},
)
LVIS = InstanceFormat(
    name="LVIS",
    file="lvis_v1_val.json",
    image={"neg_category_ids": IDS, "not_exhaustive_category_ids": IDS},
    category={"frequency": FREQUENCY},
    annotation={},
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Instances:
    """Pictures with annotated instances.

    Attributes:
        pictures: the pictures to evaluate.
        images: their entries in the file.
        categories: all categories, in the order of the file.
        annotations: the annotations of the pictures.
        sha256: of the file, hex digits.
        image_ids: ids of all pictures in the file.
    """

    pictures: tuple[DataPicture, ...]
    images: list[Entry]
    categories: list[Entry]
    annotations: list[Entry]
    sha256: str
    image_ids: frozenset[int]

    @classmethod
    def read(
        cls,
        path: pathlib.Path,
        images: pathlib.Path,
        form: InstanceFormat,
        *,
        limit: int | None = None,
    ) -> Instances:
        """Read an annotation file and locate its pictures.

        Args:
            path: the file.
            images: folder of the pictures, or of COCO's folders train2017 and val2017.
            form: format of the file.
            limit: evaluate only this many pictures, the first of the file; None for all.

        Raises:
            InputError: the file is malformed, or a picture is missing.
        """
        file = JsonFile(path, f"pass {form.name} instances such as {form.file} in --annotations")
        listed = file.entries("images", {"id": ID, "height": PIXELS, "width": PIXELS, **form.image})
        categories = file.entries("categories", {"id": ID, "name": NAME, **form.category})
        annotations = file.entries("annotations", {**_ANNOTATION, **form.annotation})
        by_id = file.distinct_ids(listed, "images")
        file.check_known(annotations, "annotations", "image_id", by_id)
        known = file.distinct_ids(categories, "categories")
        file.check_known(annotations, "annotations", "category_id", known)
        file.distinct_ids(annotations, "annotations")
        _check_masks(file, annotations, by_id)
        chosen = listed[:limit]
        pictures = located([_picture(file, entry) for entry in chosen], images)
        ids = {picture.id for picture in pictures}
        return cls(
            pictures=pictures,
            images=chosen,
            categories=categories,
            annotations=[entry for entry in annotations if entry["image_id"] in ids],
            sha256=sha256_of_file(path),
            image_ids=frozenset(by_id),
        )

    def by_picture(self) -> dict[int, list[Entry]]:
        """Return the annotations of each picture, in the order of the file."""
        return _by_picture(self.pictures, self.annotations)

    def detections(self, path: pathlib.Path) -> dict[int, list[Entry]]:
        """Read detections for the pictures: COCO results, a list, or the same in "annotations".

        Raises:
            InputError: the file is malformed, has pictures or categories that the annotations do
                not have, or none for the pictures to evaluate.
        """
        file = JsonFile(path, "pass detections in the format of COCO results in --detections")
        key = "annotations" if isinstance(file.content, dict) else None
        found = file.entries(key, _DETECTION)
        file.check_known(found, key or "entry", "image_id", dict.fromkeys(self.image_ids))
        known = {entry["id"]: entry for entry in self.categories}
        file.check_known(found, key or "entry", "category_id", known)
        ids = {picture.id for picture in self.pictures}
        chosen = [entry for entry in found if entry["image_id"] in ids]
        if not chosen:
            raise file.error(
                f"none of {len(found)} detections is in the {len(ids)} pictures to evaluate"
            )
        return _by_picture(self.pictures, chosen)


def _by_picture(pictures: tuple[DataPicture, ...], entries: list[Entry]) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = {picture.id: [] for picture in pictures}
    for entry in entries:
        found[entry["image_id"]].append(entry)
    return found


def _picture(file: JsonFile, entry: Entry) -> DataPicture:
    """Return the picture of an entry: LVIS names it only by its URL, in one of COCO's folders."""
    url, name = entry.get(_URL), entry.get("file_name")
    names: tuple[str, ...] = ()
    if isinstance(url, str) and url:
        names = ("/".join(url.split("/")[-2:]), url.split("/")[-1])
    if isinstance(name, str) and name and name not in names:
        names += (name,)
    if not names:
        raise file.error(f"image {entry['id']} has neither {_URL} nor file_name; expected one")
    return DataPicture(id=entry["id"], names=names, size=(entry["height"], entry["width"]))


def _check_masks(file: JsonFile, annotations: list[Entry], images: Mapping[int, Entry]) -> None:
    """Check that masks fit their pictures: COCO's library trusts their numbers.

    It reads beyond run lengths that do not fill the picture, and walks along the edges of polygons
    pixel by pixel, however far away they are.
    """
    for index, entry in enumerate(annotations):
        image, found = images[entry["image_id"]], entry["segmentation"]
        size = [image["height"], image["width"]]
        if isinstance(found, dict) and found["size"] != size:
            raise file.error(
                f"annotations[{index}] has run lengths of size {found['size']}; expected {size}, "
                "the size of its picture"
            )
        if isinstance(found, dict) and isinstance(found["counts"], str):
            if not fills(found["counts"], math.prod(size)):
                raise file.error(
                    f"annotations[{index}] has compressed run lengths that do not fill its picture "
                    f"of {size[1]} x {size[0]} pixels"
                )
        elif isinstance(found, list):
            far = max(abs(number) for polygon in found for number in polygon)
            if far > _FAR * max(size):
                raise file.error(
                    f"annotations[{index}] has a polygon with the coordinate {far:g}; expected "
                    f"pixels of a picture of {size[1]} x {size[0]}"
                )
