"""Training prompts lie on the right regions."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tap_deploy.config import PointLabel
from tap_deploy.training.objective.prompt_sampling import extra_points, first_prompts, noisy_box

IMAGE_SIZE, SIZE = 64, 16
CELL = IMAGE_SIZE // SIZE


@pytest.fixture
def ring():
    """A mask with a hole, away from the corner: misplaced points would fall out of it."""
    ys, xs = np.mgrid[:40, :60]
    distance = np.hypot(xs - 35, ys - 20)
    return (distance > 8) & (distance < 15)


def test_first_prompts_are_boxes_and_points_half_and_half(ring):
    rng = np.random.default_rng(0)
    box = np.array([21, 6, 50, 35], np.float32)
    prompts = first_prompts([ring] * 400, [box] * 400, 0.1, rng)
    prompts.check(width=60, height=40)
    assert prompts.labels.shape == (400, 2)
    is_box = prompts.labels[:, 0] == PointLabel.BOX_LEFT_TOP
    assert 160 < is_box.sum() < 240
    assert (prompts.labels[is_box] == [2, 3]).all()
    assert (prompts.labels[~is_box] == [PointLabel.FOREGROUND, PointLabel.PADDING]).all()
    x, y = prompts.coords[~is_box, 0].astype(int).T
    assert ring[y, x].all()
    assert len(set(zip(x.tolist(), y.tolist(), strict=True))) > 100
    moved = np.abs(prompts.coords[is_box].reshape(-1, 4) - box)
    assert 2.5 < moved.max() <= 2.9 + 1e-4  # a tenth of the side, in float32
    assert moved.mean() == pytest.approx(1.45, abs=0.2)


def test_noisy_boxes_stay_in_the_picture_and_keep_an_area():
    rng = np.random.default_rng(0)
    boxes = [np.array(b, np.float32) for b in ([0, 0, 60, 40], [0, 0, 3, 2], [57, 38, 60, 40])]
    for box in boxes * 50:
        x0, y0, x1, y1 = noisy_box(box, (40, 60), 0.4, rng)
        assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40


def sample(logits, targets, *, share=0.0, seed=0, max_points=8):
    return extra_points(
        logits,
        targets,
        max_points=max_points,
        sketch_share=share,
        image_size=IMAGE_SIZE,
        generator=torch.Generator().manual_seed(seed),
    )


def low_res(coords):
    """The low-resolution pixel that each point is the centre of."""
    places = (coords + 0.5) / CELL - 0.5
    assert torch.equal(places, places.round())
    return places.long()


@pytest.fixture
def found_and_true():
    """The upper half is true, the left half was found: a quarter is missed, another one wrong."""
    targets = torch.zeros(30, SIZE, SIZE)
    targets[:, : SIZE // 2] = 1
    logits = torch.full((30, SIZE, SIZE), -3.0)
    logits[:, :, : SIZE // 2] = 3
    return logits, targets


@pytest.mark.parametrize("seed", range(5))
def test_extra_points_lie_in_the_error_region_with_the_right_label(found_and_true, seed):
    coords, labels = sample(*found_and_true, seed=seed)
    real = labels != PointLabel.PADDING
    x, y = low_res(coords[real]).T
    foreground = labels[real] == PointLabel.FOREGROUND
    assert ((x >= SIZE // 2) == foreground).all()
    assert ((y < SIZE // 2) == foreground).all()
    assert real[:, 0].all()
    assert (coords[~real] == 0).all()
    assert labels.shape[1] == 1 or (foreground.any() and not foreground.all())


def test_the_number_of_points_varies_within_and_between_calls(found_and_true):
    widths, counts = set(), set()
    for seed in range(60):
        labels = sample(*found_and_true, seed=seed)[1]
        widths.add(labels.shape[1])
        counts |= set((labels != PointLabel.PADDING).sum(dim=1).tolist())
    assert widths == counts == set(range(1, 9))


def test_points_are_drawn_without_replacement():
    targets, logits = torch.zeros(2, 20, SIZE, SIZE)
    targets[:, 3, 4:7] = 1
    logits -= 1
    for seed in range(20):
        coords, labels = sample(logits, targets, seed=seed)
        for row, kinds in zip(coords, labels, strict=True):
            points = {tuple(point) for point in low_res(row[kinds == 1]).tolist()}
            assert len(points) == (kinds == 1).sum() <= 3
            assert points <= {(4, 3), (5, 3), (6, 3)}


def test_sketches_stay_inside_the_object(found_and_true):
    logits, targets = found_and_true
    coords, labels = sample(logits, targets, share=1.0)
    real = labels != PointLabel.PADDING
    assert (labels[real] == PointLabel.FOREGROUND).all()
    x, y = low_res(coords[real]).T
    assert (y < SIZE // 2).all()
    assert (x < SIZE // 2).any() and (x >= SIZE // 2).any()


def test_where_nothing_is_wrong_points_confirm_the_object():
    targets = torch.zeros(4, SIZE, SIZE)
    targets[:, 5:9, 5:9] = 1
    coords, labels = sample(targets * 2 - 1, targets)
    real = labels != PointLabel.PADDING
    assert (labels[real] == PointLabel.FOREGROUND).all() and real[:, 0].all()
    assert ((low_res(coords[real]) >= 5) & (low_res(coords[real]) < 9)).all()


def test_an_object_too_thin_for_the_low_resolution_gets_padding():
    targets = torch.full((2, SIZE, SIZE), 0.2)
    assert (sample(targets - 1, targets)[1] == PointLabel.PADDING).all()


def test_the_same_generator_gives_the_same_points(found_and_true):
    first, second, other = (sample(*found_and_true, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
