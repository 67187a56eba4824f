"""File names that are not UTF-8, and outputs with another encoding than UTF-8."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shlex
import shutil

import pytest

from tap_deploy.config import TapConfig
from tap_deploy.console.exits import _accept_any_text
from tap_deploy.engines.fp16.samples import picture_inputs
from tap_deploy.export.bundle_export import checkpoint_record
from tap_deploy.reference.checkpoint import read_checkpoint
from tap_deploy.storage.json_files import json_text, parse_json
from tests.commands import invoke
from tests.micro_files import CONFIG, DATA

NAME = os.fsdecode(b"caf\xe9.jpg")  # Latin-1


@pytest.fixture
def picture(tmp_path):
    return pathlib.Path(shutil.copyfile(DATA / "coffee.jpg", tmp_path / NAME))


@pytest.mark.parametrize("output", [(), ("--json",), ("-o", "FOLDER", "--overlays")])
def test_run(micro_bundle, picture, tmp_path, output):
    """Two pictures, so that their names are printed."""
    (tmp_path / "b.jpg").write_bytes(picture.read_bytes())
    folder = tmp_path / "results"
    words = [folder if word == "FOLDER" else word for word in output]
    pictures = (picture, tmp_path / "b.jpg")
    result = invoke("run", micro_bundle.path, *pictures, "--point", "9,9", *words)
    assert result.exit_code == 0, result.output
    if "--json" in output:
        assert result.stdout.isascii()
        assert json.loads(result.stdout.splitlines()[0])["file"] == str(picture)
    elif output:
        assert (folder / f"{NAME}.png").exists()
        text = (folder / f"{NAME}.json").read_text("utf-8")
        assert json.loads(text)["file"] == str(picture)
    else:
        assert b"caf\xe9.jpg\n" in result.stdout_bytes


def test_report(micro_bundle, assets, picture, tmp_path):
    bundle, page = shutil.copytree(micro_bundle.path, tmp_path / "bundle"), tmp_path / "report.html"
    words = ("--checkpoint", assets["checkpoint"], "--images", picture, "--report", page)
    result = invoke("verify", bundle, *words)
    assert result.exit_code == 0, result.output
    assert r"caf\udce9.jpg" in page.read_text("utf-8")


def test_commands_of_polygraphy(micro_bundle, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    result = invoke("inspect", micro_bundle.path, "--polygraphy", folder)
    assert result.exit_code == 0, result.output
    assert os.fsencode(shlex.quote(str(folder / "fp32/image_encoder/inputs.json"))) in (
        result.stdout_bytes
    )


def test_names_in_a_manifest_can_be_read_again(assets, picture):
    record = checkpoint_record(NAME, read_checkpoint(pathlib.Path(assets["checkpoint"])))
    config = TapConfig.from_dict(json.loads(CONFIG.read_text("utf-8"))["config"])
    for name in (record.file, picture_inputs(picture, config, seed=0).name):
        assert parse_json(json.dumps(name)) == name == r"caf\udce9.jpg"


def test_json_keeps_letters_and_escapes_bytes():
    assert json_text({"a": f"né {NAME}"}) == r'{"a": "né caf\udce9.jpg"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(float("nan"))


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("latin-1", "strict", rb"[\u2713] caf\udce9.jpg"),
        ("utf-8", "strict", "[✓] caf".encode() + b"\xe9.jpg"),
        ("ascii", "replace", b"[?] caf?.jpg"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding, errors, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    _accept_any_text(stream)
    stream.write(f"[✓] {NAME}")
    stream.flush()
    assert stream.buffer.getvalue() == expected
