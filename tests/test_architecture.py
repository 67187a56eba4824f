"""The import law: which wing of the project may use which, and that no imports form a circle."""

from __future__ import annotations

import ast
import functools
import graphlib
import pathlib
from collections.abc import Iterator

import pytest

import tap_deploy

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("tap_deploy", "export", "engines", "benchmarks", "scripts")

# Files that stand for themselves, by wing. All other wings are folders.
FILES = {
    "ground": "errors config graphs precisions timing optional_modules published_files "
    "engines export",
    "nouns": "image prompts prompt_rows masks mask_strips concepts tokenizer chunks regions "
    "hub_address",
    "predictor": "predictor prediction",
    "demo": "demo_model",
    "cli": "__main__",
    "sessions.loading": "sessions.opening sessions.loader sessions.cpu_choice",
}

GROUND = {"ground", "storage", "machine"}
NOUNS = GROUND | {"pictures", "formats", "nouns"}
BACKENDS = {"sessions.gpu", "sessions.openvino", "sessions.ort", "sessions.trt"}
SESSIONS = {"sessions", *BACKENDS, "sessions.loading"}
RUNTIME = NOUNS | SESSIONS | {"bundle"}
JUDGES = RUNTIME | {"predictor", "verify"}
CALIBRATED = JUDGES | {"engines.calibration"}

# Wing -> the wings that it may use beside itself.
LAW: dict[str, set[str]] = {
    "ground": set(),
    "storage": {"ground"},
    "machine": {"ground"},
    "pictures": {"ground"},
    "formats": GROUND | {"nouns"},
    "nouns": GROUND | {"pictures", "formats", "visualize"},
    "visualize": GROUND | {"pictures", "nouns"},
    "report": GROUND | {"nouns", "visualize"},
    "demo": NOUNS,
    "hub": GROUND | {"nouns"},
    "bundle": NOUNS | {"hub"},
    "sessions": NOUNS | {"bundle"},
    "sessions.gpu": NOUNS | {"bundle", "sessions"},
    "sessions.openvino": NOUNS | {"bundle", "sessions"},
    "sessions.ort": NOUNS | {"bundle", "sessions", "sessions.gpu"},
    "sessions.trt": NOUNS | {"bundle", "sessions", "sessions.gpu"},
    "sessions.loading": RUNTIME,
    "console": RUNTIME,
    "predictor": RUNTIME,
    "verify": RUNTIME,
    "reference": NOUNS,
    "export": RUNTIME | {"verify", "reference", "demo"},
    "engines.calibration": JUDGES,
    "engines.estimate": JUDGES,
    "engines.fp16": CALIBRATED,
    "engines.qdq": CALIBRATED,
    "engines.smoothing": CALIBRATED,
    "engines.verdict": CALIBRATED | {"report"},
    "engines.bisect": CALIBRATED | {"engines.fp16", "engines.qdq"},
    "engines.build": CALIBRATED | {"engines.estimate"},
    "engines.int8": CALIBRATED | {"engines.qdq", "engines.smoothing", "engines.verdict"},
    "bench": JUDGES | {"demo", "engines.estimate", "engines.verdict", "export", "reference"},
    "server": RUNTIME | {"predictor"},
    "evaluation": RUNTIME | {"predictor"},
    "training": JUDGES | {"console", "visualize", "demo", "evaluation", "export", "reference"},
}
# These may use everything; nobody else uses them.
TOP = {"cli", "benchmarks", "scripts"}


def module_name(path: pathlib.Path) -> str:
    """Return the name of a module as it is installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["tap_deploy", *parts] if parts[0] in ("export", "engines") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of the project that it imports anywhere, for type checkers as well.

    The package itself is left out: it loads what its menu names when that is asked for.
    """
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    modules = {module_name(path): path for path in paths}
    return {
        name: set(imported(path, set(modules))) - {"tap_deploy"}
        for name, path in modules.items()
        if name != "tap_deploy"
    }


def imported(path: pathlib.Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inner]
        yield from (name for name in names if name in modules)


def wing_of(module: str) -> str:
    """Return the wing of a module: the longest entry of the law or of ``FILES`` that it begins."""
    parts = module.removeprefix("tap_deploy.").split(".")
    homes = {file: wing for wing, files in FILES.items() for file in files.split()}
    for length in range(len(parts), 0, -1):
        begin = ".".join(parts[:length])
        if begin in homes and (length == len(parts) or begin not in ("engines", "export")):
            return homes[begin]
        if begin in LAW or begin in TOP:
            return begin
    raise AssertionError(f"{module} belongs to no wing; give it a folder that the law names")


@pytest.mark.parametrize("wing", sorted(LAW))
def test_a_wing_uses_only_what_the_law_allows(wing: str) -> None:
    found = [
        f"{module} imports {other} ({wing_of(other)})"
        for module, others in sorted(imports().items())
        if wing_of(module) == wing
        for other in sorted(others)
        if wing_of(other) not in LAW[wing] | {wing}
    ]
    assert not found, "\n".join(found)


def test_every_wing_of_the_law_is_there() -> None:
    assert {wing_of(module) for module in imports()} == set(LAW) | TOP


def test_nobody_imports_the_command_line_or_the_benchmarks() -> None:
    found = [
        f"{module} imports {other}"
        for module, others in sorted(imports().items())
        for other in sorted(others)
        if wing_of(other) in TOP - {wing_of(module)}
    ]
    # The benchmark of a GPU runs the commands of the user.
    assert found == ["benchmarks.gpu.engines imports tap_deploy.cli"]


def test_examples_use_only_the_menu() -> None:
    """They are what users copy, and run beside another version than the one they came with."""
    for path in (ROOT / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "tap_deploy":
                assert node.module == "tap_deploy", path
                assert {alias.name for alias in node.names} <= set(tap_deploy.__all__), path


def test_no_imports_form_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


def test_the_file_of_weights_is_named_in_one_place() -> None:
    """Only ``weights_file`` spells the suffix."""
    found = [
        module_name(path)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and str(node.value).endswith(".data")
    ]
    assert found == ["tap_deploy.bundle.manifest"]
