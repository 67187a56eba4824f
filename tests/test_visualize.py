"""Overlays: what is drawn where, on pictures of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tap_deploy.errors import InputError
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.visualize.colors import Box, color_of
from tap_deploy.visualize.drawing import Drawing
from tap_deploy.visualize.labels import Label, LabelStyle, LabelTexts, labels_from_texts
from tap_deploy.visualize.layout import LabelLayout
from tap_deploy.visualize.scaling import scaled_drawing

HEIGHT, WIDTH = 300, 400
GREY = 128


def regions_for(
    prompts: Prompts, height: int, width: int, masks: np.ndarray | None = None, **texts: Any
) -> Regions:
    count = len(prompts)
    return Regions(
        masks=masks,
        iou_predictions=np.full(count, 0.5, np.float32),
        mask_index=np.zeros(count, np.int64),
        concepts=texts.get("concepts"),
        captions=texts.get("captions"),
        caption_ids=None,
        semantic_tokens=np.zeros((count, 4), np.float32),
        semantic_embeddings=np.zeros((count, 4), np.float32),
        low_res_masks=np.zeros((count, 4, 4), np.float32),
        prompts=prompts,
        image_height=height,
        image_width=width,
    )


def drawn(regions: Regions) -> np.ndarray:
    shape = (regions.image_height, regions.image_width, 3)
    picture = regions.visualize(np.full(shape, GREY, np.uint8))
    assert picture.mode == "RGB"
    assert picture.size == (regions.image_width, regions.image_height)
    return np.asarray(picture)


def rectangle(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((1, HEIGHT, WIDTH), np.bool_)
    mask[0, y0:y1, x0:x1] = True
    return mask


def near(pixel: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> bool:
    return bool((np.abs(pixel.astype(int) - color) <= tolerance).all())


def test_a_mask_is_tinted_inside_outlined_and_untouched_far_away() -> None:
    prompts = Prompts.from_points([[[300, 250, 1]]])
    pixels = drawn(regions_for(prompts, HEIGHT, WIDTH, rectangle(150, 290, 200, 390)))
    color = color_of(0)
    middle = pixels[200, 350].astype(int)
    assert (np.sign(middle - GREY) == np.sign(np.array(color) - GREY)).all()
    assert near(pixels[150, 350], color) or near(pixels[149, 350], color)
    assert (pixels[20:100, 20:60] == GREY).all()


def test_the_picture_given_is_not_changed() -> None:
    rgb = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
    prompts = Prompts.from_points([[[300, 250, 1]]])
    regions_for(prompts, HEIGHT, WIDTH, rectangle(9, 99, 9, 99)).visualize(rgb)
    assert (rgb == GREY).all()


def test_foreground_and_background_points_differ() -> None:
    prompts = Prompts.from_points([[[50, 250, 1], [150, 250, 0]]])
    pixels = drawn(regions_for(prompts, HEIGHT, WIDTH)).astype(int)
    foreground, background = pixels[247:254, 47:54], pixels[247:254, 147:154]
    assert (foreground[..., 1] - foreground[..., 0]).max() > 100  # green
    assert (background[..., 0] - background[..., 1]).max() > 100  # red


def test_padding_points_are_not_drawn() -> None:
    alone = Prompts.from_points([[[300, 250, 1]]])
    padded = Prompts.from_points([[[300, 250, 1]] + [[0, 0, 4]] * 5])
    np.testing.assert_array_equal(
        drawn(regions_for(alone, HEIGHT, WIDTH)), drawn(regions_for(padded, HEIGHT, WIDTH))
    )


def test_a_box_is_framed_even_where_the_picture_ends() -> None:
    pixels = drawn(regions_for(Prompts.from_boxes([[200, 100, WIDTH, HEIGHT]]), HEIGHT, WIDTH))
    for y, x in ((100, 350), (HEIGHT - 1, 350), (250, 200), (250, WIDTH - 1)):
        assert near(pixels[y, x], color_of(0), 5)


def test_a_tiny_mask_is_painted_almost_opaque() -> None:
    prompts = Prompts.from_points([[[300, 250, 1]]])
    pixels = drawn(regions_for(prompts, HEIGHT, WIDTH, rectangle(60, 62, 60, 62)))
    assert near(pixels[60, 60], color_of(0))


def test_small_regions_stay_visible_on_large_ones() -> None:
    masks = np.concatenate([rectangle(100, 140, 100, 140), rectangle(10, 290, 10, 390)])
    prompts = Prompts.from_points([[[390, 290, 1]]] * 2)
    pixels = drawn(regions_for(prompts, HEIGHT, WIDTH, masks)).astype(int)
    inside, around = pixels[120, 120], pixels[200, 200]
    assert inside[2] > around[2]  # the first colour is a blue, the second an orange


@pytest.mark.parametrize(("height", "width"), [(2, 2), (9, 300), (64, 64), (64, 96), (900, 60)])
def test_any_size_can_be_drawn(height: int, width: int) -> None:
    masks = np.zeros((2, height, width), np.bool_)
    masks[0, : height // 2] = True
    masks[1, :, : width // 2] = True
    boxes = [[0, 0, width, height], [width - 1, height - 1, width, height]]
    concepts = [[("a rather long name of a concept", 0.5)], [("cup", 1.0)]]
    regions = regions_for(
        Prompts.from_boxes(boxes),
        height,
        width,
        masks,
        concepts=concepts,
        captions=["word " * 38, ""],
    )
    assert (drawn(regions) != GREY).any()


def test_strange_texts_can_be_drawn() -> None:
    prompts = Prompts.from_points([[[99, 99, 1]]] * 4)
    regions = regions_for(
        prompts,
        HEIGHT,
        WIDTH,
        concepts=[[("", 0.5)], [("two\nlines", 0.5)], [("猫" * 99, 0.5)], []],
        captions=["", "line\nbreak", "w" * 999, "  "],
    )
    assert (drawn(regions) != GREY).any()


def test_a_crowd_can_be_drawn() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, [WIDTH, HEIGHT], (60, 1, 2))
    prompts = Prompts.from_points(np.concatenate([points, np.ones((60, 1, 1))], axis=2))
    regions = regions_for(prompts, HEIGHT, WIDTH, captions=["a caption of some length"] * 60)
    assert (drawn(regions) != GREY).any()


def test_greyscale_pictures_are_fine_and_other_sizes_are_not() -> None:
    regions = regions_for(Prompts.from_boxes([[1, 2, 30, 40]]), HEIGHT, WIDTH)
    assert regions.visualize(Image.new("L", (WIDTH, HEIGHT))).mode == "RGB"
    with pytest.raises(InputError, match="expected 400 x 300"):
        regions.visualize(Image.new("RGB", (HEIGHT, WIDTH)))


def test_colors_differ() -> None:
    colors = [color_of(index) for index in range(40)]
    assert len(set(colors)) == 40
    for first in range(10):
        for second in range(first):
            distance = np.abs(np.subtract(colors[first], colors[second])).sum()
            assert distance > 60


def texts(caption: str, title: str = "cup") -> LabelTexts:
    return LabelTexts(title=title, detail="0.97", caption=caption)


def test_labels_fit_and_keep_their_title() -> None:
    style = LabelStyle.for_picture(WIDTH, HEIGHT)
    label = Label.fitted(texts("a white cup of coffee on a wooden table " * 4), style)
    assert (label.title, label.detail) == ("cup", "0.97")
    assert len(label.lines) == 3
    assert label.lines[0].startswith("a white cup")
    assert label.lines[-1].endswith("…")
    assert label.width <= style.max_width
    assert label.plate(color_of(0), style).size == (label.width, label.height)
    narrow = Label.fitted(texts("", title="x" * 99), style)
    assert narrow.title.endswith("…")
    assert narrow.width <= style.max_width


def test_a_short_caption_is_not_cut() -> None:
    style = LabelStyle.for_picture(WIDTH, HEIGHT)
    label = Label.fitted(texts("a white cup of coffee on a table"), style)
    assert " ".join(label.lines) == "a white cup of coffee on a table"


def test_captions_give_way_when_there_are_many() -> None:
    style = LabelStyle.for_picture(WIDTH, HEIGHT)
    few = labels_from_texts([texts("words and words")] * 2, style, WIDTH, HEIGHT)
    many = labels_from_texts([texts("words and words")] * 60, style, WIDTH, HEIGHT)
    assert all(label.lines for label in few)
    assert not any(label.lines for label in many)


def placed(boxes: list[Box], label: Label) -> list[tuple[int, int] | None]:
    covered = np.zeros((HEIGHT, WIDTH), np.bool_)
    layout = LabelLayout(WIDTH, HEIGHT, inset=2, covered=covered, keep=[])
    return [layout.place(label, box, gap=4) for box in boxes]


def test_labels_stay_inside_and_off_each_other() -> None:
    label = Label(title="cup", detail="", lines=(), width=80, height=20)
    boxes = [(0, 0, 50, 40), (380, 280, 399, 299), (10, 10, 60, 50), (0, 0, 400, 300)]
    corners = placed(boxes, label)
    taken = np.zeros((HEIGHT, WIDTH), int)
    for corner in corners:
        assert corner is not None
        x, y = corner
        assert 0 <= x <= WIDTH - label.width
        assert 0 <= y <= HEIGHT - label.height
        taken[y : y + label.height, x : x + label.width] += 1
    assert taken.max() == 1


def test_a_lone_label_stands_right_above_its_region() -> None:
    label = Label(title="cup", detail="", lines=(), width=80, height=20)
    assert placed([(100, 100, 200, 200)], label) == [(100, 76)]


def test_labels_without_room_are_left_out() -> None:
    label = Label(title="cup", detail="", lines=(), width=200, height=100)
    corners = placed([(100, 100, 200, 200)] * 9, label)
    assert corners[0] is not None
    assert corners[-1] is None
    huge = Label(title="cup", detail="", lines=(), width=WIDTH + 1, height=20)
    assert placed([(0, 0, 9, 9)], huge) == [None]


def test_labels_keep_off_points_and_masks() -> None:
    label = Label(title="cup", detail="", lines=(), width=80, height=20)
    covered = np.zeros((HEIGHT, WIDTH), np.bool_)
    covered[:100] = True
    layout = LabelLayout(WIDTH, HEIGHT, inset=2, covered=covered, keep=[])
    corner = layout.place(label, (100, 100, 200, 200), gap=4)
    assert corner is not None
    assert corner[1] >= 100
    free = np.zeros((HEIGHT, WIDTH), np.bool_)
    layout = LabelLayout(WIDTH, HEIGHT, inset=2, covered=free, keep=[(100, 80, 110, 90)])
    corner = layout.place(label, (100, 100, 200, 200), gap=4)
    assert corner is not None
    assert corner != (100, 76)


def test_an_enlarged_overlay_has_everything_in_its_place():
    mask = np.zeros((1, 40, 60), np.bool_)
    mask[0, 10:30, 5:25] = True
    prompts = Prompts.concatenate(
        [Prompts.from_points([[[12, 20, 1]]]), Prompts.from_boxes([[40, 10, 55, 30]])]
    )
    masks = np.concatenate([mask, np.zeros_like(mask)])
    regions = regions_for(prompts, 40, 60, masks)
    large = scaled_drawing(Drawing(height=40, width=60, prompts=prompts, masks=masks, texts=[]), 4)
    assert (large.height, large.width) == (160, 240)
    # The middle of pixel 12 is at 12.5; the corners of a box are edges of pixels.
    assert large.prompts.coords[0, 0].tolist() == [12 * 4 + 1.5, 20 * 4 + 1.5]
    assert large.prompts.coords[1].tolist() == [[160, 40], [220, 120]]
    assert large.prompts.labels.tolist() == prompts.labels.tolist()
    exact = mask[0].repeat(4, axis=0).repeat(4, axis=1)
    assert np.count_nonzero(large.masks[0] != exact) < 0.02 * exact.sum()  # rounder corners
    assert not large.masks[1].any()
    picture = regions.visualize(np.full((40, 60, 3), GREY, np.uint8), scale=4)
    assert picture.size == (240, 160)
    pixels = np.asarray(picture)
    assert near(pixels[80, 20], color_of(0), 60)  # the edge of the mask
    assert near(pixels[80, 160], color_of(1), 60)  # the frame of the box


@pytest.mark.parametrize("scale", [0, -1, 17])
def test_scales_that_are_none_are_refused(scale):
    regions = regions_for(Prompts.from_points([[[1, 1, 1]]]), 4, 4)
    with pytest.raises(InputError, match=f"scale of the overlay is {scale}; expected 1 to 16"):
        regions.visualize(np.zeros((4, 4, 3), np.uint8), scale)
