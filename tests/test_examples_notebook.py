"""The notebook: it runs in a fresh folder, shows what it promises, and is kept without outputs."""

from __future__ import annotations

import ast
import os
import pathlib
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tap_deploy.bundle.bundle import Bundle
from tests.test_docs import command_of

NOTEBOOK = pathlib.Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_kept_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert cell.metadata == {}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # no version of a machine


def test_its_bundle_is_made_by_a_command_that_exists():
    [assigned] = [
        node.value
        for node in ast.walk(ast.parse(code_cells(read())[0].source))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    ]
    words = [getattr(item, "value", None) for item in assigned.elts]
    assert words[1:4] == ["-m", "tap_deploy", "export"]
    command = command_of(words[3:-1])
    with command.make_context("export", [*words[4:-1], "tap_demo"]) as context:
        assert context.params["model"] == "tap_demo"


@pytest.fixture
def ran(demo_bundle: Bundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook after a run in a folder that has a bundle and nothing else."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(home / name))  # a run leaves nothing with the user
    work = tmp_path / "work"
    work.mkdir()
    (work / "tap_demo").symlink_to(demo_bundle.path)
    notebook = read()
    resources = {"metadata": {"path": str(work)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert sorted(os.listdir(work)) == ["found.json", "tap_demo"]
    return notebook


def test_it_runs_and_shows_regions(ran):
    cells = code_cells(ran)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = [output.data for output in outputs if "text/html" in output.get("data", {})]
    assert len(shown) == 4  # points, boxes, a sketch, everything
    for data in shown:
        assert "data:image/jpeg;base64," in data["text/html"]
        assert "masks only" not in data["text/html"]
    assert "a white rabbit left of a monkey" in shown[0]["text/html"]
    assert "fire extinguisher" in shown[1]["text/html"]
    assert "monkey" in shown[2]["text/html"]
    [printed] = [output.text for output in outputs if output.output_type == "stream"]
    assert len(printed.splitlines()) == 3
    assert "[rabbit " in printed and "[monkey " in printed and "[fire extinguisher " in printed
    assert "'name': 'rabbit'" in outputs[-1].data["text/plain"]
