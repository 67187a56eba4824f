"""Masks: token choice, logits to full-size masks, run lengths and boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.masks import matrices
from tap_deploy.errors import InputError
from tap_deploy.image import Frame
from tap_deploy.masks import (
    area_from_rle,
    box_from_mask,
    box_from_rle,
    mask_from_rle,
    masks_from_logits,
    rle_from_mask,
    rles_from_logits,
    select_mask_token,
)

GOLDEN = Path(__file__).parent / "data" / "tap_micro_outputs.npz"


def test_the_token_choice_equals_the_golden_one() -> None:
    with np.load(GOLDEN) as golden:
        labels = golden["points_px"][..., 2].astype(np.int32)
        chosen = select_mask_token(golden["iou_predictions"], labels)
        assert chosen.dtype == np.int64
        np.testing.assert_array_equal(chosen, golden["mask_index"])


def test_boxes_take_token_0_and_points_the_best_of_the_others() -> None:
    iou = np.array([[0.1, 0.9, 0.8, 0.7], [0.9, 0.1, 0.2, 0.3], [0.9, 0.3, 0.3, 0.2]], np.float32)
    labels = np.array([[2, 3], [1, 4], [0, 4]], np.int32)
    before = iou.copy()
    assert select_mask_token(iou, labels).tolist() == [0, 3, 1]
    np.testing.assert_array_equal(iou, before)
    assert select_mask_token(iou[:0], labels[:0]).shape == (0,)


def test_full_size_masks_equal_the_golden_ones() -> None:
    with np.load(GOLDEN) as golden:
        for index in range(2):
            rows = np.arange(4 * index, 4 * index + 4)
            shape = tuple(golden[f"mask_shape_{index}"])
            bits = np.unpackbits(golden[f"mask_bits_{index}"], count=np.prod(shape))
            expected = bits.reshape(shape).astype(bool)
            logits = golden["low_res_masks"][rows, golden["mask_index"][rows]]
            masks = masks_from_logits(logits, Frame.for_image(*shape[1:], 512))
            assert masks.dtype == np.bool_
            assert masks.shape == shape
            assert 0.02 < expected.mean() < 0.98  # a mask of one value would prove nothing
            assert (masks != expected).mean() <= 1e-4


@pytest.mark.parametrize(
    ("height", "width"),
    [(2, 2), (7, 64), (31, 97), (96, 96), (97, 96), (128, 300), (601, 40), (1, 5), (333, 400)],
)
@pytest.mark.parametrize("image_size", [64, 96, 100])
def test_masks_agree_with_two_torch_resizes(height: int, width: int, image_size: int) -> None:
    torch = pytest.importorskip("torch")
    resize = torch.nn.functional.interpolate
    frame = Frame.for_image(height, width, image_size)
    logits = np.random.default_rng(height * width).normal(size=(3, 16, 16)).astype(np.float32)
    full = resize(torch.from_numpy(logits)[None], (image_size, image_size), mode="bilinear")
    full = full[..., : frame.scaled_height, : frame.scaled_width]
    full = resize(full, (height, width), mode="bilinear")[0].numpy()
    masks = masks_from_logits(logits, frame)
    certain = np.abs(full) > 1e-4
    assert certain.mean() > 0.9
    np.testing.assert_array_equal(masks[certain], full[certain] > 0)


def speckled(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """Logits float32 [2, size, size] of a kind of mask."""
    noise = rng.normal(size=(2, size, size)).astype(np.float32)
    if kind == "noise":
        return noise
    ys, xs = np.mgrid[:size, :size]
    y, x, radius = rng.uniform(0, size, 3)
    oval = (radius / 2 - np.hypot(ys - y, (xs - x) * rng.uniform(0.5, 2))).astype(np.float32)
    return {"oval": oval + 0.1 * noise, "ring": 2 - np.abs(oval) + 0 * noise}.get(
        kind, {"full": 9.0, "empty": -9.0}.get(kind, 0) + noise
    )


SHAPES = [(2, 2), (7, 64), (96, 97), (128, 300), (601, 40), (1, 5), (5, 1), (400, 333), (90, 700)]
KINDS = ["noise", "oval", "ring", "full", "empty"]


def dense_logits(logits: np.ndarray, frame: Frame) -> np.ndarray:
    """Return logits float32 [H, W] at the size of the picture, by the rule: two whole resizes."""
    rows, columns = matrices(frame, len(logits))
    wide: np.ndarray = (rows @ logits) @ columns.T
    return wide


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(("size", "image_size"), [(16, 64), (64, 96), (16, 100)])
def test_masks_are_those_of_the_whole_matrices(
    kind: str, height: int, width: int, size: int, image_size: int
) -> None:
    frame = Frame.for_image(height, width, image_size)
    logits = speckled(np.random.default_rng(height + width), kind, size)
    masks = masks_from_logits(logits, frame)
    for single, mask in zip(logits, masks, strict=True):
        exact = dense_logits(single, frame)
        # A BLAS may add in another order for another size; then only logits of 0 are open.
        certain = np.abs(exact) > 1e-5
        np.testing.assert_array_equal(mask[certain], exact[certain] > 0)
    assert rles_from_logits(logits, frame) == [rle_from_mask(mask) for mask in masks]


def test_no_more_pixels_than_before_differ_from_two_torch_resizes() -> None:
    torch = pytest.importorskip("torch")
    resize = torch.nn.functional.interpolate
    found, before = 0, 0
    for seed, (height, width) in enumerate([(480, 640), (1080, 1920), (333, 500)]):
        frame = Frame.for_image(height, width, 1024)
        logits = speckled(np.random.default_rng(seed), "noise", 256)
        full = resize(torch.from_numpy(logits)[None], (1024, 1024), mode="bilinear")
        full = full[..., : frame.scaled_height, : frame.scaled_width]
        expected = resize(full, (height, width), mode="bilinear")[0].numpy() > 0
        found += np.count_nonzero(masks_from_logits(logits, frame) != expected)
        dense = [dense_logits(single, frame) > 0 for single in logits]
        before += np.count_nonzero(np.array(dense) != expected)
    assert found <= before + 2  # a BLAS may round a logit of 0 to either side


def test_run_lengths_of_no_regions() -> None:
    assert rles_from_logits(np.zeros((0, 16, 16), np.float32), Frame.for_image(5, 6, 64)) == []


def test_no_regions_give_no_masks() -> None:
    masks = masks_from_logits(np.zeros((0, 16, 16), np.float32), Frame.for_image(5, 6, 64))
    assert masks.shape == (0, 5, 6)


def test_half_precision_logits_are_fine() -> None:
    logits = np.ones((1, 16, 16), np.float16)
    assert masks_from_logits(logits, Frame.for_image(5, 6, 64)).all()


@pytest.mark.parametrize("shape", [(16, 16), (2, 4, 16, 16), (2, 16, 8)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[P, S, S\]"):
        masks_from_logits(np.zeros(shape, np.float32), Frame.for_image(5, 6, 64))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 30)])
def test_run_lengths_restore_the_mask(density: float, shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).random(shape) < density
    rle = rle_from_mask(mask)
    assert rle["size"] == list(shape)
    values = np.arange(len(rle["counts"])) % 2 == 1
    restored = np.repeat(values, rle["counts"]).reshape(shape, order="F")
    np.testing.assert_array_equal(restored, mask)
    assert all(count > 0 for count in rle["counts"][1:])
    assert all(type(count) is int for count in rle["counts"])


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_can_be_read_back(density: float) -> None:
    mask = np.random.default_rng(1).random((7, 11)) < density
    np.testing.assert_array_equal(mask_from_rle(rle_from_mask(mask)), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": [1, 2]}, "add up to 3 pixels; expected 2 x 3"),
        ({"size": [2, 3], "counts": [-1, 7]}, "expected 2 x 3"),
        ({"size": [2], "counts": [2]}, "no size"),
        ({"size": [2, 3]}, "no size"),
        ({"size": [2, 3], "counts": "PPYo1"}, "no size"),
    ],
)
def test_run_lengths_that_are_none_are_refused(rle: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mask_from_rle(rle)


# pycocotools does not speak NumPy 2's __array__ yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_agree_with_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    for seed in range(5):
        mask = np.random.default_rng(seed).random((23, 17)) < 0.4
        compressed = coco.frPyObjects(rle_from_mask(mask), 23, 17)
        np.testing.assert_array_equal(coco.decode(compressed), mask)
        assert coco.toBbox(compressed).tolist() == box_from_mask(mask)


def striped(height: int, width: int, seed: int) -> np.ndarray:
    """A mask with runs that go on from column to column, at the borders or not."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] ^= True
    mask[:, rng.integers(0, width)] |= bool(seed % 2)
    return mask


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (5, 7), (40, 30)])
def test_run_lengths_equal_those_of_the_definition(shape: tuple[int, int]) -> None:
    for seed in range(40):
        mask = striped(*shape, seed)
        flat = mask.ravel(order="F")
        expected = np.diff(np.flatnonzero(np.diff(flat)) + 1, prepend=0, append=flat.size).tolist()
        rle = rle_from_mask(mask)
        assert rle == {"size": list(shape), "counts": [0, *expected] if flat[0] else expected}
        assert box_from_rle(rle) == box_from_mask(mask)
        assert area_from_rle(rle) == np.count_nonzero(mask)


def test_runs_of_length_0_are_no_part_of_the_box() -> None:
    rle = {"size": [4, 5], "counts": [0, 0, 6, 2, 12, 0]}
    assert box_from_rle(rle) == box_from_mask(mask_from_rle(rle)) == [1, 2, 1, 2]


def test_box_of_a_mask() -> None:
    mask = np.zeros((10, 12), bool)
    assert box_from_mask(mask) == [0, 0, 0, 0]
    mask[3, 4] = True
    assert box_from_mask(mask) == [4, 3, 1, 1]
    mask[8, 2] = True
    assert box_from_mask(mask) == [2, 3, 3, 6]
    assert box_from_mask(np.ones((10, 12), bool)) == [0, 0, 12, 10]
