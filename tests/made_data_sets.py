"""Small data sets in the formats of COCO, LVIS and Visual Genome, made from labelled scenes."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from PIL import Image

from tap_deploy.masks import rle_from_mask

DETECTION_NOISE = 0.04  # of the sides of a box


class MadeData:
    """Files of the data sets, about the same scenes.

    Attributes:
        images: folder of the pictures, with COCO's and Visual Genome's folders in it.
        coco, lvis, vg_test, vg_regions, detections: annotation files.
        scenes: the scenes.
    """

    def __init__(self, folder: pathlib.Path, source, count: int, names) -> None:
        self.images, self.names = folder / "images", list(names)
        self.scenes = [source.scene(seed) for seed in range(count)]
        self.ids = [1000 + 7 * seed for seed in range(count)]
        self._write_pictures()
        self.coco = self._write(folder / "instances.json", self._instances(self._coco_entry))
        self.lvis = self._write(folder / "lvis.json", self._lvis())
        self.detections = self._write(folder / "detections.json", self._detections())
        self.vg_test = self._write(folder / "test.json", self._vg_test())
        self.vg_regions = self._write(folder / "region_descriptions.json", self._vg_regions())

    def _write_pictures(self) -> None:
        for number, scene in zip(self.ids, self.scenes, strict=True):
            picture = Image.fromarray(scene.image)
            for name in (f"val2017/{number:012}.png", f"{number}.png"):
                (self.images / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(self.images / name)
            picture.save(self.images / f"{number}.jpg", format="PNG")  # exact pixels

    @staticmethod
    def _write(path: pathlib.Path, content) -> pathlib.Path:
        path.write_text(json.dumps(content), "utf-8")
        return path

    def _images(self):
        return [
            {
                "id": number,
                "height": scene.image.shape[0],
                "width": scene.image.shape[1],
                "coco_url": f"http://images.cocodataset.org/val2017/{number:012}.png",
            }
            for number, scene in zip(self.ids, self.scenes, strict=True)
        ]

    def _objects(self):
        for number, scene in zip(self.ids, self.scenes, strict=True):
            for item in scene.objects:
                yield number, item

    def _instances(self, entry):
        return {
            "info": {},
            "images": self._images(),
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.names)],
            "annotations": [
                entry(index + 1, number, item)
                for index, (number, item) in enumerate(self._objects())
            ],
        }

    def _entry(self, index, number, item):
        x0, y0, x1, y1 = map(float, item.box)
        return {
            "id": index,
            "image_id": number,
            "category_id": self.names.index(item.name) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": float(item.mask.sum()),
            "segmentation": rle_from_mask(item.mask),
        }

    def _coco_entry(self, index, number, item):
        """Crowds have run lengths in COCO, and the others polygons: here a box as a polygon."""
        crowd = int(index % 5 == 0)
        entry = self._entry(index, number, item) | {"iscrowd": crowd}
        if index % 5 == 1:
            x, y, width, height = entry["bbox"]
            entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            entry["area"] = width * height
        return entry

    def _lvis(self):
        data = self._instances(self._entry)
        for index, category in enumerate(data["categories"]):
            category["frequency"] = "rcf"[index % 3]
        ids = [category["id"] for category in data["categories"]]
        for image in data["images"]:
            present = {
                entry["category_id"]
                for entry in data["annotations"]
                if entry["image_id"] == image["id"]
            }
            image["neg_category_ids"] = [i for i in ids if i not in present][::2]
            image["not_exhaustive_category_ids"] = sorted(present)[:1]
        return data

    def _detections(self):
        """Boxes with noise, and every fourth of the wrong class."""
        rng = np.random.default_rng(0)
        found = []
        for index, (number, item) in enumerate(self._objects()):
            entry = self._entry(index, number, item)
            x, y, width, height = entry["bbox"]
            dx, dy = rng.normal(0, DETECTION_NOISE, 2) * (width, height)
            category = entry["category_id"]
            if index % 4 == 3:
                category = category % len(self.names) + 1
            found.append(
                {
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x + dx, y + dy, width, height],
                    "score": round(float(rng.uniform(0.2, 1)), 4),
                }
            )
        return found

    def _vg_test(self):
        return {
            "images": [{"id": number, "file_name": f"{number}.png"} for number in self.ids],
            "annotations": [
                {
                    "id": index,
                    "image_id": number,
                    "bbox": self._entry(index, number, item)["bbox"],
                    "caption": item.caption,
                }
                for index, (number, item) in enumerate(self._objects())
            ],
        }

    def _vg_regions(self):
        regions = {number: [] for number in self.ids}
        for index, (number, item) in enumerate(self._objects()):
            x, y, width, height = self._entry(index, number, item)["bbox"]
            regions[number].append(
                {"region_id": index, "image_id": number, "phrase": item.caption}
                | {"x": int(x), "y": int(y), "width": int(width), "height": int(height)}
            )
        return [{"id": number, "regions": found} for number, found in regions.items()]
