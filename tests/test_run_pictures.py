"""``tap-export run`` on several pictures: answers, skipped pictures, exit codes, files."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tap_deploy.cli import main

POINT = ("--point", "90,60", "--max-new-tokens", "3")


@pytest.fixture
def run(micro_bundle):
    """Run on pictures; returns the result, with stdout parsed where it is JSON."""

    def run_on(*args, stdin=None):
        arguments = ["run", micro_bundle.path, *args]
        return CliRunner().invoke(main, [str(arg) for arg in arguments], input=stdin)

    return run_on


@pytest.fixture
def folder(pictures, tmp_path):
    """Pictures in two folders, other files, and files that a search skips."""
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    shutil.copy(pictures / "a.png", folder / "a.png")
    shutil.copy(pictures / "b.png", folder / "deeper" / "a.png")
    shutil.copy(pictures / "b.png", folder / ".hidden" / "b.png")
    (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (folder / "notes.txt").write_text("no picture", "utf-8")
    return folder


def lines(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_each_picture_gets_its_answers(run, pictures, predictor):
    a, b = pictures / "a.png", pictures / "b.png"
    found = lines(run(b, a, *POINT, "--json"))
    for values, path in zip(found, (b, a), strict=True):
        regions = predictor.predict(path, [[[90, 60, 1]]], max_new_tokens=3)
        assert values == {"file": str(path), **json.loads(regions.to_json())}


def test_a_folder_is_searched(run, folder):
    found = lines(run(folder, *POINT, "--json"))
    assert [values["file"] for values in found] == [
        str(folder / "a.png"),
        str(folder / "deeper" / "a.png"),
    ]
    text = run(folder, *POINT).stdout.splitlines()
    assert text[0] == str(folder / "a.png")
    assert text[1].startswith("region 0  IoU ")


def test_broken_pictures_of_a_folder_are_named_and_skipped(run, folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "empty.jpg").touch()
    result = run(folder, *POINT, "--json")
    assert len(lines(result)) == 2
    broken, empty, _ = result.stderr.splitlines()
    assert broken.startswith(f"warning: skipped: image '{folder / 'broken.png'}' ")
    assert empty.startswith(f"warning: skipped: image '{folder / 'empty.jpg'}' ")
    assert result.stderr.splitlines()[-1] == "pictures: 2, regions: 2, skipped: 2"
    strict = run(folder, *POINT, "--json", "--strict")
    assert strict.exit_code == 2
    assert f"error: image '{folder / 'broken.png'}' " in strict.stderr


def test_broken_pictures_asked_for_by_name_end_with_2(run, folder, tmp_path):
    """The other pictures are still predicted."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    result = run(broken, folder / "a.png", *POINT, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["file"] == str(folder / "a.png")
    assert f"warning: skipped: image '{broken}' " in result.stderr
    nothing = run(broken, tmp_path / "nowhere.png", *POINT)
    assert nothing.exit_code == 2
    assert "error: none of 2 pictures could be used" in nothing.stderr


def test_boxes_by_picture(run, folder, tmp_path, predictor):
    two = [[10, 10, 90, 80], [5, 5, 60, 60]]
    boxes = {"a.png": two, "deeper/a.png": [], "x.png": [[1, 2, 3, 4]]}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes), "utf-8")
    result = run(folder, "--boxes", path, "--json", "--no-captions")
    first, second = lines(result)
    expected = predictor.predict(folder / "a.png", boxes=boxes["a.png"], captions=False)
    assert first["regions"] == json.loads(expected.to_json())["regions"]
    assert second["regions"] == []
    assert f"{path} has boxes for pictures that were not found: x.png" in result.stderr
    both = lines(run(folder / "a.png", folder, "--boxes", path, "--json", *POINT))
    assert [len(values["regions"]) for values in both] == [3, 3, 1]


def test_a_name_that_two_pictures_have_is_of_the_one_that_it_names_whole(run, folder, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text('{"a.png": [[10, 10, 90, 80]]}', "utf-8")
    result = run(folder, "--boxes", path, "--json", "--no-captions")
    assert [values["file"] for values in lines(result)] == [str(folder / "a.png")]
    alone = run(folder / "deeper", "--boxes", path, "--json", "--no-captions")
    assert len(lines(alone)) == 1


def test_clip_says_of_which_picture(run, folder):
    result = run(folder, "--box", "-1,-1,90,80", "--clip", "--no-captions")
    # Threads read the pictures, so either may come first.
    assert sorted(line for line in result.stderr.splitlines() if "clip" in line) == [
        f"warning: image '{folder / name}': clipped 1 of 1 prompts to the picture"
        for name in ("a.png", "deeper/a.png")
    ]


def test_a_prompt_that_does_not_fit_is_skipped_with_the_name_of_the_picture(run, folder):
    result = run(folder, "--box", "0,0,340,190", "--no-captions", "--json")
    assert "the picture" in result.stderr
    assert f"warning: skipped: {folder / 'a.png'}: region 0, bottom-right corner" in result.stderr


def test_boxes_for_every_picture_and_for_none(run, folder, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text("[[10, 10, 90, 80]]", "utf-8")
    assert [len(v["regions"]) for v in lines(run(folder, "--boxes", path, "--json"))] == [1, 1]
    path.write_text('{"deeper/a.png": [[10, 10, 90, 80]]}', "utf-8")
    result = run(folder, "--boxes", path, "--json")
    assert [values["file"] for values in lines(result)] == [str(folder / "deeper" / "a.png")]
    assert f"warning: skipped: {folder / 'a.png'}: {path} has no boxes for it" in result.stderr
    assert run(folder, "--boxes", path, "--strict").exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "cannot be read"),
        ("3", "expected a list"),
        ('{"a.png": 3}', "of 'a.png': expected a list"),
        ('{"a.png": [[1, 2, 3]]}', "of 'a.png': boxes: shape is [1, 3]; expected [P, 4]"),
        ('[["a", 1, 2, 3]]', "not an array of numbers"),
    ],
)
def test_boxes_that_are_none(run, folder, tmp_path, text, message):
    path = tmp_path / "boxes.json"
    path.write_text(text, "utf-8")
    result = run(folder, "--boxes", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_results_in_a_folder(run, folder, tmp_path):
    output = tmp_path / "out"
    result = run(folder, *POINT, "-o", output, "--overlays", "--json")
    assert lines(result) == [{"pictures": 2, "regions": 2, "skipped": []}]
    files = sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file())
    assert files == ["a.png.json", "a.png.png", "deeper/a.png.json", "deeper/a.png.png"]
    values = json.loads((output / "deeper" / "a.png.json").read_text("utf-8"))
    assert values["file"] == str(folder / "deeper" / "a.png")
    with Image.open(folder / "a.png") as original, Image.open(output / "a.png.png") as drawn:
        assert drawn.size == original.size
        assert (np.asarray(drawn) != np.asarray(original)).any()
    again = run(folder, *POINT, "-o", output)
    assert again.exit_code == 2
    assert "already exists; pass --force" in again.stderr
    assert run(folder, *POINT, "-o", output, "--force").stdout == (
        "pictures: 2, regions: 2, skipped: 0\n"
    )


def test_results_within_the_folder_are_no_pictures(run, folder):
    for _ in range(2):
        result = run(folder, *POINT, "-o", folder / "out", "--overlays", "--force")
        assert result.stdout == "pictures: 2, regions: 2, skipped: 0\n"


def test_results_of_one_name(run, folder, tmp_path):
    pair = (folder / "a.png", folder / "deeper" / "a.png")
    result = run(*pair, *POINT, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "have the same name, and so would their results" in result.stderr
    twice = run(pair[0], pair[0], *POINT, "-o", tmp_path / "out")
    assert f"picture {pair[0]} is named twice" in twice.stderr
    assert len(lines(run(*pair, *POINT, "--json"))) == 2


def test_a_picture_on_stdin(run, folder, predictor):
    data = (folder / "a.png").read_bytes()
    expected = predictor.predict(folder / "a.png", [[[90, 60, 1]]], max_new_tokens=3)
    assert lines(run("-", *POINT, "--json", stdin=data)) == [json.loads(expected.to_json())]
    found = lines(run("-", folder / "a.png", *POINT, "--json", stdin=data))
    assert [values["file"] for values in found] == ["-", str(folder / "a.png")]
    assert found[0]["regions"] == found[1]["regions"]
    assert "- is named twice" in run("-", "-", *POINT, stdin=data).stderr
    refused = run("-", *POINT, stdin=b"nonsense")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: image from ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--overlay", "x.png"], "for several pass -o FOLDER --overlays"),
        (["--overlays"], "pass -o FOLDER as well"),
        (["--bands", "1,2"], "expected r,g,b"),
        (["--bands", "0,1,2"], "expected r,g,b"),
    ],
)
def test_options_that_do_not_fit(run, folder, args, message):
    result = run(folder, *POINT, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_folder_without_pictures(run, tmp_path):
    result = run(tmp_path, *POINT)
    assert result.exit_code == 2
    assert "contains no pictures" in result.stderr


def test_options_reach_the_answers(run, folder):
    box = ("--box", "-0.001,10,90,80", "--no-captions")
    assert run(folder / "a.png", *box).exit_code == 2
    result = run(folder / "a.png", *box, "--clip", "--candidates", "--json")
    assert "image: clipped 1 of 1 prompts to the picture" in result.stderr
    [region] = lines(result)[0]["regions"]
    assert len(region["candidates"]) == 4
    assert region["segmentation"] == region["candidates"][region["mask_index"]]["segmentation"]
    bare = lines(run(folder / "a.png", *POINT, "--no-masks", "--json"))[0]["regions"][0]
    assert bare["segmentation"] is None
    assert bare["bbox"] is None
    refused = run(folder / "a.png", *POINT, "--max-pixels", 100)
    assert refused.exit_code == 2
    assert "--max-pixels" in refused.stderr


def test_grey_pictures_among_many(run, folder):
    buffer = io.BytesIO()
    with Image.open(folder / "a.png") as picture:
        picture.convert("L").save(buffer, "PNG")
    (folder / "grey.png").write_bytes(buffer.getvalue())
    assert len(lines(run(folder, *POINT, "--json"))) == 2
    assert len(lines(run(folder, *POINT, "--json", "--convert"))) == 3


def test_prompts_given_nowhere(run, folder):
    result = run(folder)
    assert result.exit_code == 2
    assert "no prompt: pass --point, --box, --sketch, --boxes or --everything" in result.stderr


def test_a_font_is_looked_at_before_the_work(run, folder, tmp_path):
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    for font in (tmp_path / "bad.ttf", tmp_path, tmp_path / "nowhere.ttf"):
        result = run(folder, *POINT, "-o", tmp_path / "out", "--overlays", "--font", font)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: font {font} cannot be read: ")
        assert not (tmp_path / "out").exists()


def test_a_folder_of_nothing_but_results(run, folder):
    result = run(folder, *POINT, "-o", folder)
    assert result.exit_code == 2
    assert f"there are no pictures but those in {folder}" in result.stderr
