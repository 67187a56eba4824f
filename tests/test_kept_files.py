"""What is kept in pytest's cache is made once, and again when what it was made from changes."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from tests.kept_files import copy_kept

PROJECT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """A folder with a module of the project, and the data that it reads."""
    folder = tmp_path / "sources"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "made_up_module.py").write_text("LETTER = 'a'\n")
    (folder / "data.txt").write_text("1")
    monkeypatch.syspath_prepend(folder)
    (tmp_path / "cache").mkdir()
    return folder


def make(folder):
    """Makes a file that names the process."""
    from tests import made_up_module

    data = pathlib.Path(made_up_module.__file__).parents[1] / "data.txt"
    folder.mkdir()
    text = f"{made_up_module.LETTER}{data.read_text()}"
    (folder / "made.txt").write_text(f"{text} {os.getpid()}")
    return [data]


def make_while_it_is_edited(folder):
    (data,) = make(folder)
    data.write_text("2")
    return [data]


def fail(folder):
    make(folder)
    raise ValueError("not made")


def copied(tmp_path, make=make):
    """Copy what is kept; returns what is in the file, and changes the copy."""
    target = pathlib.Path(tempfile.mkdtemp(dir=tmp_path)) / "copy"
    copy_kept(tmp_path / "cache", make, target)
    text = (target / "made.txt").read_text()
    (target / "made.txt").write_text("changed by a test")
    return text


def test_it_is_made_once(tmp_path):
    first = copied(tmp_path)
    assert first.startswith("a1 ")
    assert str(os.getpid()) not in first
    assert copied(tmp_path) == first


def test_of_two_at_once_one_waits(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first, second = threads.map(copied, [tmp_path, tmp_path])
    assert first == second


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [("tests/made_up_module.py", "LETTER = 'longer'\n", "longer1"), ("data.txt", "23", "a23")],
)
def test_a_changed_file_is_noticed(tmp_path, sources, file, text, expected):
    copied(tmp_path)
    (sources / file).write_text(text)
    assert copied(tmp_path).split()[0] == expected
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["entry", "lock"]


def test_a_removed_file_is_noticed(tmp_path, sources):
    copied(tmp_path)
    (sources / "data.txt").unlink()
    with pytest.raises(FileNotFoundError):
        copied(tmp_path)


def test_a_changed_package_is_noticed(tmp_path, monkeypatch):
    first = copied(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [])
    assert copied(tmp_path) != first


def test_an_edit_while_it_is_made_is_noticed(tmp_path):
    first = copied(tmp_path, make_while_it_is_edited)
    assert copied(tmp_path) != first


def test_what_failed_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="not made"):
        copied(tmp_path, fail)
    assert copied(tmp_path).startswith("a1 ")


def test_fixtures_load_nothing_slow():
    code = "import sys, tests.conftest; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert "tap_deploy.predictor" in loaded.split()
    assert not {"torch", "onnx", "onnxruntime"} & set(loaded.split())
