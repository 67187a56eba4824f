"""Inputs of calibration (pictures, prompts), and the resulting tables."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.calibration.table import CalibrationTable, load_tables, save_tables
from tap_deploy.errors import InputError
from tap_deploy.pictures.folders import find_pictures

TABLE = CalibrationTable(
    graph="image_encoder",
    method="max",
    ranges={"a": 1.5, "b": 0.0},
    onnx_sha256="1" * 64,
    data_fingerprint="2" * 64,
    num_samples=3,
)


def test_a_folder_is_searched_to_its_depths(pictures, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(pictures / "b.png", tmp_path / "deep" / "er" / "1.PNG")
    shutil.copy(pictures / "a.png", tmp_path / "2.png")
    (tmp_path / "notes.md").write_text("no picture")
    found = CalibrationImages.from_path(tmp_path)
    assert [path.name for path in found.paths] == ["2.png", "1.PNG"]


def test_a_picture_and_lists_of_paths(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "list.txt").write_text("# two\npictures/b.png\n\npictures/a.png\n")
    (tmp_path / "list.json").write_text('["pictures/b.png", "pictures/a.png"]')
    from_text = CalibrationImages.from_path(tmp_path / "list.txt")
    assert [path.name for path in from_text.paths] == ["b.png", "a.png"]
    assert CalibrationImages.from_path(tmp_path / "list.json") == from_text
    assert len(CalibrationImages.from_path(pictures / "a.png")) == 1


def test_the_fingerprint_is_of_contents_and_order(pictures, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([str(pictures / n) for n in ("b.png", "a.png")]))
    forwards = CalibrationImages.from_path(pictures)
    backwards = CalibrationImages.from_path(tmp_path / "list.json")
    assert forwards.fingerprint != backwards.fingerprint
    shutil.copytree(pictures, tmp_path / "moved")
    assert CalibrationImages.from_path(tmp_path / "moved").fingerprint == forwards.fingerprint


def test_copies_of_a_picture_count_once(pictures, tmp_path):
    for name in ("1.png", "2.png"):
        shutil.copy(pictures / "a.png", tmp_path / name)
    assert len(CalibrationImages.from_path(tmp_path)) == 1


def test_some_of_many_are_drawn_from_a_seed(pictures, tmp_path):
    from PIL import Image

    for value in range(9):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / f"{value}.png")
    drawn = [CalibrationImages.from_path(tmp_path, samples=4, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4
    assert list(drawn[0].paths) == sorted(drawn[0].paths)


def test_hidden_files_and_folders_are_passed_over(pictures, tmp_path):
    (tmp_path / ".thumbnails").mkdir()
    for name in ("a.png", ".hidden.png", ".thumbnails/a.png"):
        shutil.copy(pictures / "a.png", tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # as a Mac leaves it on a USB stick
    assert find_pictures(tmp_path) == [tmp_path / "a.png"]
    hidden = tmp_path / ".thumbnails"  # asked for by its name
    assert CalibrationImages.from_path(hidden, strict=True).paths == (hidden / "a.png",)


@pytest.mark.parametrize("kind", ["folder", "list.txt", "list.json"])
def test_broken_pictures_are_named_counted_and_skipped(pictures, tmp_path, caplog, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(pictures / name, folder / name)
    (folder / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    paths = [f"folder/{name}" for name in ("a.png", "b.png", "cut.png", "empty.png")]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    (tmp_path / "list.json").write_text(json.dumps(paths))
    found = CalibrationImages.from_path(tmp_path / kind)
    assert [path.name for path in found.paths] == ["a.png", "b.png"]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert [text[:9] for text in caplog.messages[:-1]] == ["skipped: "] * 2
    assert "cut.png" in caplog.messages[0] and "empty.png" in caplog.messages[1]
    assert caplog.messages[2] == "2 of 4 pictures skipped; pass --strict to stop at the first error"
    with pytest.raises(InputError, match=r"cut\.png"):
        CalibrationImages.from_path(tmp_path / kind, strict=True)


def test_others_are_drawn_in_place_of_broken_pictures(tmp_path):
    from PIL import Image

    for value in range(5):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / f"{value}.png")
        (tmp_path / f"broken{value}.png").write_bytes(b"")
    assert len(CalibrationImages.from_path(tmp_path, samples=5)) == 5


def test_a_folder_of_broken_pictures_is_refused(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 2 pictures can be read; first error: .*1\.png"):
        CalibrationImages.from_path(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "does not exist; expected a folder of pictures"),
        ("broken.png", "no picture", "broken.png"),
        ("list.txt", "# nothing\n", "is empty"),
        ("list.json", '{"a": 1}', "is not a list"),
        ("list.json", "[", "cannot be read"),
        ("list.txt", "missing.png", "missing.png"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        CalibrationImages.from_path(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="contains no pictures"):
        CalibrationImages.from_path(tmp_path)


def test_drawn_prompts_fit_and_repeat(pictures):
    path, digest = pictures / "a.png", "ab" * 32
    prompts = CalibrationPrompts(seed=3)
    for width, height in [(640, 480), (33, 900), (2, 2)]:
        parts = prompts.for_image(path, digest, width, height)
        for part in parts:
            part.check(width, height)
        assert [part.coords.shape[1] for part in parts] == [2, 2, 10]  # N of each kind
    again = CalibrationPrompts(seed=3).for_image(path, digest, 640, 480)
    other = CalibrationPrompts(seed=4).for_image(path, digest, 640, 480)
    first = prompts.for_image(path, digest, 640, 480)
    assert all(np.array_equal(a.coords, b.coords) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].coords, other[0].coords)


def test_prompts_of_the_user(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('{"a.png": {"boxes": [[1, 2, 30, 40]], "points": [[[5, 6, 1], [7, 8, 0]]]}}')
    prompts = CalibrationPrompts.from_file(file)
    boxes, points = prompts.for_image(tmp_path / "x" / "a.png", "0" * 64, 100, 100)
    assert boxes.labels.tolist() == [[2, 3]]
    assert points.coords[0, :2].tolist() == [[5, 6], [7, 8]]
    assert len(prompts.for_image(tmp_path / "b.png", "0" * 64, 100, 100)) == 3  # drawn
    assert prompts.fingerprint != CalibrationPrompts().fingerprint
    with pytest.raises(InputError, match="outside"):
        prompts.for_image(tmp_path / "a.png", "0" * 64, 20, 20)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"a.png": {"lines": []}}', '{"a.png": []}'])
def test_bad_prompt_files(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(InputError, match=r"prompts .*prompts\.json"):
        CalibrationPrompts.from_file(tmp_path / "prompts.json")


def test_tables_come_back(tmp_path):
    other = dataclasses.replace(TABLE, graph="text_decoder", ranges={"c": 2.0})
    save_tables(tmp_path / "cache", {"image_encoder": TABLE, "text_decoder": other})
    assert load_tables(tmp_path / "cache") == {"image_encoder": TABLE, "text_decoder": other}
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ('{"schema_version": 9}', "schema version 9"), ("[]", "None")],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "cache").write_text(text)
    with pytest.raises(InputError, match=message):
        load_tables(tmp_path / "cache")


def test_tables_with_other_fields(tmp_path):
    save_tables(tmp_path / "cache", {"image_encoder": TABLE})
    values = json.loads((tmp_path / "cache").read_text())
    del values["tables"]["image_encoder"]["method"]
    (tmp_path / "cache").write_text(json.dumps(values))
    with pytest.raises(InputError, match="lacks a field"):
        load_tables(tmp_path / "cache")
    with pytest.raises(InputError, match="range of a is nan"):
        dataclasses.replace(TABLE, ranges={"a": float("nan")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mse"}, "has method max, expected mse"),
        ({"onnx_sha256": "3" * 64}, "has onnx_sha256 111111111111…, expected 333333333333…"),
        ({"data_fingerprint": "3" * 64}, "has data_fingerprint 222222222222…"),
        ({"tensors": {"a", "z"}}, "has no range of z"),
    ],
)
def test_a_stale_table_says_what_differs(change, message):
    wanted = {
        "method": "max",
        "onnx_sha256": "1" * 64,
        "data_fingerprint": "2" * 64,
        "tensors": {"a"},
    }
    TABLE.require(**wanted)
    with pytest.raises(InputError, match=message):
        TABLE.require(**(wanted | change))


def test_what_cannot_be_looked_at_is_passed_over(pictures, tmp_path):
    shutil.copy(pictures / "a.png", tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("b" * 300)  # a name that no file may have
    assert find_pictures(tmp_path) == [tmp_path / "a.png"]
