"""Prompts: how they are built, padded and checked, and the prompt options of the CLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tap_deploy.cli.prompt_options import load_sketch, parse_box, parse_point
from tap_deploy.errors import InputError
from tap_deploy.prompts import Prompts

GOLDEN = Path(__file__).parent / "data" / "tap_micro_outputs.npz"
WIDTH, HEIGHT = 100, 80


def rows_of(prompts: Prompts) -> list[list[list[float]]]:
    return np.concatenate([prompts.coords, prompts.labels[..., None]], axis=2).tolist()


def problem_of(prompts: Prompts) -> str:
    with pytest.raises(InputError) as caught:
        prompts.check(WIDTH, HEIGHT)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_golden_points_pass_unchanged_and_scale_exactly() -> None:
    with np.load(GOLDEN) as golden:
        for index in range(2):
            rows = slice(4 * index, 4 * index + 4)
            points = golden["points_px"][rows]
            prompts = Prompts.from_points(points)
            height, width = golden[f"image_bgr_{index}"].shape[:2]
            prompts.check(width, height)
            np.testing.assert_array_equal(rows_of(prompts), points)
            expected = golden["points_model"][rows]
            actual = prompts.model_coords(512 / max(height, width))
            assert actual.dtype == np.float32
            np.testing.assert_array_equal(actual, expected[..., :2])
            np.testing.assert_array_equal(prompts.labels, expected[..., 2])


def test_a_lone_point_gets_a_padding_point() -> None:
    prompts = Prompts.from_points([[[5, 6, 1]]])
    assert rows_of(prompts) == [[[5, 6, 1], [0, 0, 4]]]
    assert prompts.coords.dtype == np.float32
    assert prompts.labels.dtype == np.int32


def test_ragged_points_are_padded_to_one_length() -> None:
    prompts = Prompts.from_points([[[5, 6, 1]], [[1, 2, 1], [3, 4, 0], [5, 6, 1]]])
    assert len(prompts) == 2
    assert prompts.labels.tolist() == [[1, 4, 4, 4], [1, 0, 1, 4]]


def test_rows_with_padding_or_a_box_get_none_on_top() -> None:
    assert Prompts.from_points([[[5, 6, 1], [0, 0, 4]]]).labels.tolist() == [[1, 4]]
    assert Prompts.from_points([[[1, 2, 2], [5, 6, 3]]]).labels.tolist() == [[2, 3]]


def test_boxes_are_two_labelled_corners() -> None:
    prompts = Prompts.from_boxes(np.array([[1, 2, 30, 40], [5, 6, 7, 8]]))
    assert rows_of(prompts) == [[[1, 2, 2], [30, 40, 3]], [[5, 6, 2], [7, 8, 3]]]


def test_points_and_boxes_join_row_by_row_box_first() -> None:
    prompts = Prompts.from_points_and_boxes([[[5, 6, 1]], []], [[1, 2, 30, 40], [5, 6, 70, 60]])
    assert prompts.labels.tolist() == [[2, 3, 1], [2, 3, 4]]
    assert prompts.coords[0, 2].tolist() == [5, 6]
    prompts.check(WIDTH, HEIGHT)


def test_unequal_points_and_boxes_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"1 rows of points and 2 boxes.*Prompts\.concatenate"):
        Prompts.from_points_and_boxes([[[5, 6, 1]]], [[1, 2, 3, 4], [1, 2, 3, 4]])


def test_concatenate_pads_to_the_longest() -> None:
    prompts = Prompts.concatenate(
        [Prompts.from_points([[[5, 6, 1]]]), Prompts.from_sketches([[[0, 0], [8, 0]]])]
    )
    assert prompts.labels.tolist() == [[1] + [4] * 9, [1] * 9 + [4]]
    assert len(Prompts.concatenate([])) == 0


def test_a_sketch_is_nine_points_evenly_spaced_by_length() -> None:
    crowded_start = [[0, 0], [0.1, 0], [0.2, 0], [0.3, 0], [10, 0], [10, 6]]
    prompts = Prompts.from_sketches([crowded_start])
    assert prompts.labels.tolist() == [[1] * 9 + [4]]
    steps = [0, 2, 4, 6, 8, 10, 10, 10, 10]
    np.testing.assert_allclose(prompts.coords[0, :9, 0], steps, atol=1e-6)
    np.testing.assert_allclose(prompts.coords[0, :9, 1], [0, 0, 0, 0, 0, 0, 2, 4, 6], atol=1e-6)


def test_a_sketch_of_one_spot_is_nine_times_that_spot() -> None:
    for stroke in ([[3, 4]], [[3, 4], [3, 4]]):
        prompts = Prompts.from_sketches([stroke])
        assert (prompts.coords[0, :9] == (3, 4)).all()


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts.from_points([]),
        Prompts.from_points(np.zeros((0, 3, 3))),
        Prompts.from_boxes([]),
        Prompts.from_boxes(np.zeros((0, 4))),
        Prompts.from_sketches([]),
        Prompts.from_points_and_boxes([], []),
    ],
)
def test_no_prompts_are_fine(prompts: Prompts) -> None:
    assert len(prompts) == 0
    assert prompts.coords.shape == (0, 2, 2)
    prompts.check(WIDTH, HEIGHT)
    assert prompts.model_coords(2.0).shape == (0, 2, 2)


def test_slices_keep_the_number_of_points() -> None:
    prompts = Prompts.from_points([[[5, 6, 1]], [[1, 2, 1], [3, 4, 0]], [[7, 8, 1]]])
    assert prompts[1:].labels.tolist() == [[1, 0, 4], [1, 4, 4]]
    assert rows_of(prompts[-1]) == [[[7, 8, 1], [0, 0, 4], [0, 0, 4]]]
    assert [len(region) for region in prompts] == [1, 1, 1]
    assert len(prompts[3:]) == 0
    with pytest.raises(IndexError):
        prompts[3]


@pytest.mark.parametrize(
    "points",
    [
        [[5, 6, 1]],  # one region, not wrapped
        [[[5, 6]]],  # no label
        [[[5, 6, 1, 0]]],
        [[[5, "x", 1]]],
        [[[5, 6, 1], [5, 6]]],
        5,
        None,
        "5,6,1",
        {"a": 1},
        np.float32(5),
        np.zeros((2, 3)),
    ],
)
def test_points_of_another_shape_are_refused(points: Any) -> None:
    with pytest.raises(InputError, match=r"expected"):
        Prompts.from_points(points)


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3]], [[[1, 2], [3, 4]]], [["a"] * 4], 7])
def test_boxes_of_another_shape_are_refused(boxes: Any) -> None:
    with pytest.raises(InputError, match=r"expected \[P, 4\]"):
        Prompts.from_boxes(boxes)


@pytest.mark.parametrize(
    "strokes", [[[1, 2], [3, 4]], [[]], [[[1, 2, 3]]], [[[1, np.nan]]], [[[1, np.inf], [1, 2]]], 3]
)
def test_strokes_of_another_shape_are_refused(strokes: Any) -> None:
    with pytest.raises(InputError, match=r"expected"):
        Prompts.from_sketches(strokes)


BUILDERS = [
    (Prompts.from_points, [[[5, 6, 1], [7, 8.5, 0]], [[1, 2, 1], [3, 4, 1]]]),
    (Prompts.from_boxes, [[1, 2, 30, 40.5], [5, 6, 7, 8]]),
    (Prompts.from_sketches, [[[0, 0], [8, 0.5]], [[1, 2], [3, 4]]]),
]


class Foreign:
    """Like GPU arrays, it does not convert to NumPy implicitly."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("values are\non a device")

    def tolist(self) -> Any:
        return self._values


class Held(Foreign):
    def tolist(self) -> Any:
        raise RuntimeError("values are lost")


class ArrayOnly:
    def __init__(self, values: Any) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self._values, dtype)


def as_tuples(values: Any) -> Any:
    return tuple(map(as_tuples, values)) if isinstance(values, list) else values


@pytest.mark.parametrize(("build", "values"), BUILDERS)
def test_whatever_is_an_array_will_do(build: Any, values: Any) -> None:
    expected = rows_of(build(values))
    makers: list[Any] = [as_tuples, np.array, Foreign, ArrayOnly]
    for make in makers:
        assert rows_of(build(make(values))) == expected
        assert rows_of(build([make(row) for row in values])) == expected


@pytest.mark.parametrize(("build", "values"), BUILDERS)
def test_tensors_of_any_dtype_and_graph_will_do(build: Any, values: Any) -> None:
    torch = pytest.importorskip("torch")
    expected = rows_of(build(values))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for graph in (False, True):
            tensor = torch.tensor(values, dtype=dtype, requires_grad=graph)
            assert rows_of(build(tensor)) == expected
            assert rows_of(build(list(tensor))) == expected
            assert rows_of(build(tuple(tensor.unbind()))) == expected
            assert rows_of(build([list(row) for row in tensor])) == expected
    whole = torch.tensor(values).long()
    assert rows_of(build(whole)) == rows_of(build(whole.tolist()))
    assert len(build(torch.zeros(0, *whole.shape[1:]))) == 0


@pytest.mark.parametrize(("build", "values"), BUILDERS)
def test_arrays_that_hold_no_plain_numbers_are_refused(build: Any, values: Any) -> None:
    for wrong in (Held(values), [Held(values)], np.array(values, complex), np.array(values[0])[0]):
        with pytest.raises(InputError, match=r"; expected ") as caught:
            build(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [build for build, _ in BUILDERS])
def test_tensors_that_hold_no_plain_numbers_are_refused(build: Any) -> None:
    torch = pytest.importorskip("torch")
    values = torch.ones(2, 4)
    for wrong in (values.to("meta"), values.to_sparse(), values.to(torch.complex64), values[0, 0]):
        for given in (wrong, [wrong]):
            with pytest.raises(InputError, match=r"; expected ") as caught:
                build(given)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [1.5, np.nan, np.inf, 1e30, None])
def test_labels_that_are_no_whole_numbers_are_refused(label: Any) -> None:
    with pytest.raises(InputError, match=r"region 1, point 0 has label"):
        Prompts.from_points([[[5, 6, 1]], [[5, 6, label]]])


@pytest.mark.parametrize("label", [-1, 5, 7, 2**31 - 1])
def test_unknown_labels_are_refused(label: int) -> None:
    message = problem_of(Prompts.from_points([[[5, 6, 1], [7, 8, label]]]))
    assert f"region 0, point 1 (7, 8) has label {label}" in message
    assert "4 padding" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_and_infinity_are_refused(value: float) -> None:
    message = problem_of(Prompts.from_points([[[5, 6, 1]], [[5, value, 1]]]))
    assert "region 1, point 0" in message
    assert "finite" in message
    # The model multiplies padding by 0, and 0 * NaN is NaN.
    assert "point 1" in problem_of(Prompts.from_points([[[5, 6, 1], [value, 0, 4]]]))


@pytest.mark.parametrize(("x", "y"), [(-0.5, 5), (5, -1), (WIDTH + 1, 5), (5, HEIGHT + 0.25)])
def test_points_outside_the_picture_are_refused(x: float, y: float) -> None:
    message = problem_of(Prompts.from_points([[[5, 6, 1]], [[1, 1, 1], [x, y, 0]]]))
    assert f"region 1, point 1 ({x:g}, {y:g})" in message
    assert "0..100" in message
    assert "0..80" in message
    assert "clip" in message


@pytest.mark.parametrize(
    ("x", "shown"),
    [(100.00001, "100.00001"), (-0.1, "-0.1"), (-1e-9, "-1e-09"), (1e30, "1e+30"), (101, "101")],
)
def test_a_point_just_outside_does_not_read_as_inside(x: float, shown: str) -> None:
    message = problem_of(Prompts.from_points([[[x, 5, 1]]]))
    assert f"({shown}, 5) lies outside the picture; expected x in 0..100 " in message


def test_a_label_that_is_nearly_whole_does_not_read_as_whole() -> None:
    with pytest.raises(InputError, match=r"has label 1\.0000000001; expected one of"):
        Prompts.from_points([[[5, 6, 1 + 1e-10]]])


@pytest.mark.parametrize("build", [Prompts.from_points, Prompts.from_boxes, Prompts.from_sketches])
def test_huge_integers_and_deep_lists_are_refused(build: Any) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for values in ([[[10**400, 1, 1]]], [[10**400, 1, 1, 1]], [[[10**400, 1]]], deep):
        with pytest.raises(InputError, match="expected") as caught:
            build(values)
        assert "\n" not in str(caught.value)


def test_the_border_belongs_to_the_picture_and_padding_may_stand_anywhere() -> None:
    Prompts.from_points([[[0, 0, 1], [WIDTH, HEIGHT, 0]]]).check(WIDTH, HEIGHT)
    Prompts.from_points([[[5, 6, 1], [-9, 999, 4]]]).check(WIDTH, HEIGHT)
    Prompts.from_boxes([[0, 0, WIDTH, HEIGHT]]).check(WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "labels", [[2, 4], [3, 4], [2, 1], [3, 2], [1, 2, 3], [2, 3, 2, 3], [4, 2, 3], [2], [3]]
)
def test_incomplete_or_misplaced_boxes_are_refused(labels: list[int]) -> None:
    row = [[10 + 10 * i, 10 + 10 * i, label] for i, label in enumerate(labels)]
    assert "first two points" in problem_of(Prompts.from_points([[[5, 6, 1]], row]))


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5]])
def test_boxes_without_area_are_refused(box: list[int]) -> None:
    message = problem_of(Prompts.from_boxes([[1, 2, 3, 4], box]))
    assert "region 1" in message
    assert "x0 < x1" in message


def test_a_region_of_padding_only_is_refused() -> None:
    assert "region 1" in problem_of(Prompts.from_points([[[5, 6, 1]], []]))


def test_the_constructor_checks_shapes_and_dtypes() -> None:
    coords, labels = np.zeros((2, 3, 2), np.float32), np.zeros((2, 3), np.int32)
    assert len(Prompts(coords=coords, labels=labels)) == 2
    for wrong_coords in (coords.astype(np.float64), coords[0], coords[:, :0], coords.tolist()):
        with pytest.raises(InputError, match="coords"):
            Prompts(coords=wrong_coords, labels=labels)  # type: ignore[arg-type]
    for wrong_labels in (labels.astype(np.int64), labels[:1], labels[..., None]):
        with pytest.raises(InputError, match="labels"):
            Prompts(coords=coords, labels=wrong_labels)


def test_parse_point() -> None:
    assert parse_point("5,6") == [[5, 6, 1]]
    assert parse_point("5, 6.5,0") == [[5, 6.5, 0]]
    assert parse_point("5,6;7,8,0") == [[5, 6, 1], [7, 8, 0]]


@pytest.mark.parametrize("text", ["", "5", "5,6,1,2", "a,b", "5;6", "5,6;", "5,,6"])
def test_nonsense_points_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected x,y"):
        parse_point(text)


def test_parse_box() -> None:
    assert parse_box("1,2,3.5,4") == [1, 2, 3.5, 4]


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x"])
def test_nonsense_boxes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected x0,y0,x1,y1"):
        parse_box(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[[1, 2], [3, 4.5]]", [[[1, 2], [3, 4.5]]]),
        (" [[[1, 2]], [[3, 4], [5, 6]]]\n", [[[1, 2]], [[3, 4], [5, 6]]]),
        ("1,2\n3,4.5\n", [[[1, 2], [3, 4.5]]]),
        ("x,y\n1, 2\n\n# a remark\n3 4\n", [[[1, 2], [3, 4]]]),
        ("\ufeff1,2", [[[1, 2]]]),
    ],
)
def test_sketch_files(tmp_path: Path, content: str, expected: list[Any]) -> None:
    path = tmp_path / "sketch"
    path.write_text(content, "utf-8")
    strokes = load_sketch(path)
    assert [stroke.tolist() for stroke in strokes] == expected
    Prompts.from_sketches(strokes).check(WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[[]]",
        "[[1, 2]",
        "[1, 2]",
        "[[1, 2, 3]]",
        '[["a", 2]]',
        "[[[1, 2]], []]",
        "[[[1, 2], [3]]]",
        "[null]",
        '{"x": 1}',
        "1,2,3",
        "hello",
        "1,2\nx,y",
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000,
        "[[1, " + "9" * 400 + "]]",
        "[[1, " + "9" * 5000 + "]]",
    ],
)
def test_nonsense_sketch_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sketch.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"sketch.json.*(expected|valid JSON)"):
        load_sketch(path)


def test_unreadable_sketch_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_sketch(tmp_path / "missing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="not text"):
        load_sketch(tmp_path / "binary")
    with pytest.raises(InputError, match="directory"):
        load_sketch(tmp_path)
    with pytest.raises(InputError, match="characters that no file name has"):
        load_sketch("a\0b")


def test_clip_moves_what_lies_outside_and_nothing_else():
    prompts = Prompts.concatenate(
        [
            Prompts.from_points([[[-1, 5, 1], [3, 4, 0]], [[99, 99, 1]], [[1, 1, 1]]]),
            Prompts.from_boxes([[2, 2, 10.25, 6]]),
        ]
    )
    clipped, moved = prompts.clip(10, 8)
    expected = Prompts.concatenate(
        [
            Prompts.from_points([[[0, 5, 1], [3, 4, 0]], [[10, 8, 1]], [[1, 1, 1]]]),
            Prompts.from_boxes([[2, 2, 10, 6]]),
        ]
    )
    np.testing.assert_array_equal(clipped.coords, expected.coords)
    np.testing.assert_array_equal(clipped.labels, expected.labels)
    assert moved == 3
    clipped.check(10, 8)
    assert clipped.clip(10, 8)[1] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clip_leaves_what_is_no_number_to_check(value):
    prompts, moved = Prompts.from_points([[[value, 5, 1]]]).clip(10, 8)
    assert moved == 0
    with pytest.raises(InputError, match="NaN or infinite"):
        prompts.check(10, 8)


def test_a_box_beside_the_picture_cannot_be_clipped():
    prompts = Prompts.from_boxes([[1, 1, 5, 5], [11, 0, 14, 4]])
    with pytest.raises(InputError, match=r"region 1: box .* lies outside the picture"):
        prompts.clip(10, 8)


def test_corners_are_called_so():
    with pytest.raises(
        InputError, match=r"region 0, bottom-right corner of its box \(14, 4\) lies"
    ):
        Prompts.from_boxes([[1, 0, 14, 4]]).check(10, 8)
