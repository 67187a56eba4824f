"""Detections of the package supervision, checked with the package."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tap_deploy import chunks as memory
from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.machine.memory import Memory
from tests.made_regions import HEIGHT, WIDTH, empty, made_up, with_masks, with_rles

# It says so on import where OpenCV is not there; it draws without it.
pytestmark = pytest.mark.filterwarnings("ignore:OpenCV:UserWarning")


def test_supervision_needs_masks_and_names_the_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"supervision needs; predict with masks=True or 'rle'"):
        made_up(masks=None).to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[supervision\]"'):
        made_up().to_supervision()


def test_detections_hold_what_the_regions_do() -> None:
    import supervision

    regions = made_up()
    for detections in (regions.to_supervision(), with_rles().to_supervision()):
        assert isinstance(detections, supervision.Detections)
        np.testing.assert_array_equal(detections.xyxy, [[10, 5, 16, 9], [0, 0, 0, 0]])
        np.testing.assert_array_equal(detections.mask, regions.masks)
        np.testing.assert_array_equal(detections.confidence, regions.iou_predictions)
        assert detections.class_id.tolist() == [0, 1]
        assert detections["class_name"].tolist() == ["Bär", "cup"]
        assert detections["caption"].tolist() == ["a brown bear", "a cup"]


def test_a_class_is_a_name() -> None:
    regions = with_masks(np.ones((3, 4, 5), np.bool_), names=["dog", "cup", "dog"])
    assert regions.to_supervision().class_id.tolist() == [0, 1, 0]
    assert regions.to_supervision({"cup": 4, "dog": 9}).class_id.tolist() == [9, 4, 9]
    with pytest.raises(InputError, match=r"region 1 is 'cup', which has no category id"):
        regions.to_supervision({"dog": 9})


def test_detections_can_be_filtered_and_counted() -> None:
    detections = made_up().to_supervision()
    sure = detections[detections.confidence > 0.5]
    assert (len(sure), sure["caption"].tolist()) == (1, ["a brown bear"])
    assert sure.area.tolist() == [24]
    assert len(empty().to_supervision()) == 0


@pytest.mark.parametrize("concepts", [made_up().concepts, None])
def test_annotators_draw_them(concepts: list[list[tuple[str, float]]] | None) -> None:
    import supervision

    regions = made_up(concepts=concepts)
    detections = regions.to_supervision()[:1]
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    drawn = supervision.MaskAnnotator(opacity=1).annotate(picture.copy(), detections)
    assert regions.masks is not None
    np.testing.assert_array_equal(drawn.any(axis=2), regions.masks[0])
    assert supervision.BoxAnnotator().annotate(picture.copy(), detections).any()
    labels = {"labels": detections["caption"].tolist()}
    for words in ({}, labels):
        assert supervision.LabelAnnotator().annotate(picture.copy(), detections, **words).any()


def test_masks_that_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    available = Memory(total_bytes=1, available_bytes=HEIGHT * WIDTH, swap_bytes=0, zram_bytes=0)
    monkeypatch.setattr(memory, "memory_of", lambda host: available)
    monkeypatch.setattr(memory, "SMALL_BYTES", 0)
    with pytest.raises(InputError, match=r"2 masks of .* pixels take 0\.0 GB; expected at most"):
        with_rles().to_supervision()
