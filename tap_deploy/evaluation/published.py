"""Published results of TAP, to stand beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping

# The notebooks of the public implementation show the output of its scripts for the v1.1 weights:
# COCO val2017 and LVIS v1 val with the boxes of ViTDet-H, LVIS v1 val with ground-truth boxes,
# Visual Genome's test split with ground-truth boxes. The paper reports CIDEr for a captioner that
# was trained further (arXiv 2312.09128, abstract).
PAPER = "paper"
_BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
_COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LVIS = (*_COCO, "APr", "APc", "APf")

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "coco-seg": {
        "TAP-B": dict(zip(_COCO, (45.1, 71.2, 48.1, 28.7, 50.1, 60.6), strict=True)),
        "TAP-L": dict(zip(_COCO, (46.0, 71.8, 49.9, 29.1, 50.9, 62.2), strict=True)),
        "TAP-H": dict(zip(_COCO, (46.3, 72.0, 50.0, 29.5, 51.0, 62.6), strict=True)),
    },
    "lvis-seg": {
        "TAP-B": dict(
            zip(_LVIS, (42.2, 60.9, 45.0, 29.5, 55.0, 64.0, 33.6, 43.1, 45.0), strict=True)
        ),
        "TAP-L": dict(
            zip(_LVIS, (43.0, 61.1, 46.2, 30.2, 55.9, 65.1, 33.7, 44.1, 46.0), strict=True)
        ),
        "TAP-H": dict(
            zip(_LVIS, (43.2, 61.3, 46.3, 30.2, 56.0, 65.4, 33.7, 44.1, 46.3), strict=True)
        ),
    },
    "lvis-cls": {
        "TAP-B": dict(
            zip(_LVIS, (57.4, 57.9, 57.4, 43.1, 70.1, 80.5, 58.6, 56.8, 57.5), strict=True)
        ),
        "TAP-L": dict(
            zip(_LVIS, (59.1, 59.7, 59.1, 44.5, 71.9, 81.7, 61.7, 58.9, 58.3), strict=True)
        ),
        "TAP-H": dict(
            zip(_LVIS, (59.6, 60.2, 59.6, 45.6, 72.2, 83.0, 61.6, 60.0, 58.2), strict=True)
        ),
    },
    "vg-caption": {
        "TAP-B": {"CIDEr": 152.3, "METEOR": 17.7}
        | dict(zip(_BLEU, (37.4, 23.5, 16.5, 12.2), strict=True)),
        "TAP-L": {"CIDEr": 154.7, "METEOR": 17.9}
        | dict(zip(_BLEU, (37.7, 23.8, 16.7, 12.4), strict=True)),
        "TAP-H": {"CIDEr": 154.2, "METEOR": 17.8}
        | dict(zip(_BLEU, (37.7, 23.7, 16.7, 12.4), strict=True)),
        PAPER: {"CIDEr": 164.7},
    },
}
