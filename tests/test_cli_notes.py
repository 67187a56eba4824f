"""Log messages of the library go to stderr only while a command runs."""

from __future__ import annotations

import logging

import click
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnx_ir")

from PIL import Image

from tap_deploy.cli import main
from tap_deploy.console.exits import CleanExits

logger = logging.getLogger("tap_deploy.somewhere")


@click.command(cls=CleanExits)
def talk() -> None:
    for _ in range(2):
        logger.info("for\nyour %s", "information")
        logger.warning("mind this")
    logger.debug("never mind")
    click.echo("result")


def test_notes_and_warnings_are_lines_on_stderr_each_once():
    result = CliRunner().invoke(talk)
    assert result.exit_code == 0
    assert result.stdout == "result\n"
    assert result.stderr == "note: for your information\nwarning: mind this\n"
    assert not logging.getLogger("tap_deploy").handlers
    assert logging.getLogger("tap_deploy").level == logging.NOTSET


def test_run_says_how_a_deep_picture_was_scaled(micro_bundle, tmp_path):
    values = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)  # 11 bits in 16
    Image.fromarray(values).save(tmp_path / "deep.png")
    command = ["run", str(micro_bundle.path), str(tmp_path / "deep.png"), "--point", "20,20"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "deep.png' has 16 bits per channel" in refused.stderr
    result = CliRunner().invoke(main, [*command, "--convert", "--json"])
    assert result.exit_code == 0
    note = f"note: image '{tmp_path / 'deep.png'}': samples scaled from 0..2047 to 0..255\n"
    assert result.stderr.count(note) == 1
    assert result.stdout.startswith("{")


@pytest.mark.parametrize("strict", [False, True])
def test_quantize_skips_what_is_no_picture_unless_strict(micro_bundle, tmp_path, strict):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, color in {"a.png": "red", "b.png": "blue"}.items():
        Image.new("RGB", (40, 40), color).save(pictures / name)
    (pictures / "._a.png").write_bytes(b"\0\5\x16\7")
    (pictures / "c.png").write_bytes(b"")
    command = ["quantize", str(micro_bundle.path), "--calibration-data", str(pictures)]
    # These prompts are not there: the command ends where it would begin to calculate.
    command += ["--no-verdict", "--prompts", str(tmp_path / "none.json")]
    result = CliRunner().invoke(main, [*command, *(["--strict"] if strict else [])])
    assert result.exit_code == 2
    assert "._a.png" not in result.stderr
    if strict:
        assert f"error: image '{pictures / 'c.png'}' is empty" in result.stderr
    else:
        assert f"warning: skipped: image '{pictures / 'c.png'}' is empty" in result.stderr
        assert (
            "warning: 1 of 3 pictures skipped; pass --strict to stop at the first error"
            in result.stderr
        )
        assert "none.json" in result.stderr.splitlines()[-1]
