"""``tap-export run --everything``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from tap_deploy.cli import main
from tap_deploy.predictor import TapPredictor

LOOSE = ("--pred-iou-thresh", "-0.45", "--stability-score-thresh", "0", "--box-nms-thresh", "1")
SMALL = ("--everything", "--points-per-side", "5", *LOOSE, "--max-new-tokens", "2")
ARGUMENTS = {
    "points_per_side": 5,
    "pred_iou_thresh": -0.45,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}


@pytest.fixture
def run(micro_bundle):
    def run_on(*args):
        return CliRunner().invoke(main, [str(arg) for arg in ("run", micro_bundle.path, *args)])

    return run_on


@pytest.fixture
def arguments(monkeypatch):
    """The arguments of the latest ``everything``."""
    found = {}
    everything = TapPredictor.everything

    def recorded(self, image, **given):
        found.clear()
        found.update(given)
        return everything(self, image, **given)

    monkeypatch.setattr(TapPredictor, "everything", recorded)
    return found


def test_everything_of_a_picture(run, pictures, predictor, tmp_path):
    result = run(pictures / "a.png", *SMALL, "--json", "--overlay", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    expected = predictor.everything(pictures / "a.png", **ARGUMENTS, max_new_tokens=2)
    assert len(expected) > 1
    assert json.loads(result.stdout) == json.loads(expected.to_json())
    with Image.open(tmp_path / "a.png") as drawn, Image.open(pictures / "a.png") as picture:
        assert drawn.size == picture.size
        assert drawn.tobytes() != picture.convert("RGB").tobytes()


def test_everything_of_a_folder(run, pictures, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes((pictures / name).read_bytes())
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    result = run(tmp_path / "in", *SMALL, "-o", tmp_path / "out", "--overlays")
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.png.json", "a.png.png", "b.png.json", "b.png.png"]
    assert "pictures: 2, " in result.stdout
    assert "skipped: 1" in result.stdout
    values = json.loads((tmp_path / "out" / "b.png.json").read_text("utf-8"))
    [alone] = [json.loads(run(pictures / "b.png", *SMALL, "--json").stdout)]
    assert values["regions"] == alone["regions"]


def test_options_arrive(run, pictures, arguments, micro_bundle):
    first, second = micro_bundle.vocabulary().names[:2]
    result = run(
        pictures / "a.png",
        *SMALL,
        *("--mask-nms-thresh", 0.25, "--crop-n-layers", 1, "--no-captions", "--top-k", 2),
        *("--only", f" {first}, {second}", "--only-thresh", 0.01),
    )
    assert result.exit_code == 0, result.output
    del arguments["on_progress"]
    assert arguments == ARGUMENTS | {
        "mask_nms_thresh": 0.25,
        "crop_n_layers": 1,
        "only": [first, second],
        "only_thresh": 0.01,
        "top_k": 2,
        "masks": "rle",
        "captions": False,
        "vocabulary": None,
        "max_new_tokens": 2,
        "temperature": 0.0,
        "seed": None,
    }


def test_defaults_are_those_of_the_python_api(run, pictures, arguments):
    assert run(pictures / "a.png", "--everything").exit_code == 0
    assert set(arguments) == {
        *("top_k", "masks", "captions", "vocabulary", "max_new_tokens", "temperature", "seed"),
        "on_progress",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--everything", "--point", "9,9"), "--everything finds the regions itself; leave out"),
        (("--everything", "--box", "1,1,9,9"), "--everything finds the regions itself"),
        (("--everything", "--clip"), "--everything finds the regions itself"),
        (("--everything", "--candidates"), "--candidates is for prompts"),
        (("--everything", "--only", "zzz"), "'zzz' is none of the"),
        (("--everything", "--only", ""), "'' is none of the"),
        (("--point", "9,9", "--only", "dog"), "--only belongs to --everything"),
        (("--point", "9,9", "--points-per-side", "8"), "--points-per-side belongs to --everything"),
        ((), "no prompt: pass --point, --box, --sketch, --boxes or --everything"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_refused(run, pictures, options, message, count):
    result = run(*[pictures / "a.png", pictures / "b.png"][:count], *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
