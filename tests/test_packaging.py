"""The installed files and their requirements."""

from __future__ import annotations

import ast
import configparser
import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tap_deploy

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = {
    "tap_deploy": "tap_deploy",
    "export": "tap_deploy/export",
    "engines": "tap_deploy/engines",
}
SCRIPTS = (
    "scripts/venv",
    "scripts/check",
    "scripts/test",
    "scripts/demo",
    "scripts/ship_demo",
    "scripts/train_demo",
    "scripts/test-jetpack6",
    "scripts/test-aarch64",
    "scripts/test-versions",
    "scripts/soak",
    "scripts/test-gpu",
    ".ci/run",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built without the network from a copy: building leaves files behind."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in PROJECT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in (*SOURCES, "benchmarks", "tests"):
        if (PROJECT / name).exists():
            ignore = shutil.ignore_patterns("__pycache__", "data")
            shutil.copytree(PROJECT / name, source / name, ignore=ignore)
    stale = source / "build" / "lib" / "tap_deploy" / "moved.py"  # of an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"tap_deploy-{tap_deploy.__version__}.dist-info/{name}").decode()


def test_the_wheel_holds_every_module_under_its_installed_name(wheel):
    expected = {
        f"{installed}/{path.relative_to(PROJECT / folder).as_posix()}"
        for folder, installed in SOURCES.items()
        for path in (PROJECT / folder).rglob("*.py")
    }
    assert expected == {name for name in wheel.namelist() if name.endswith(".py")}
    assert any(name.startswith("tap_deploy/export/") for name in expected)


def test_nothing_generic_lands_in_site_packages(wheel):
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert top_level == {"tap_deploy", f"tap_deploy-{tap_deploy.__version__}.dist-info"}


def test_types_data_and_licences_are_in_the_wheel(wheel):
    names = wheel.namelist()
    assert {"tap_deploy/py.typed", "tap_deploy/training/words/concept_space.npz"} <= set(names)
    data = [
        *(PROJECT / "tap_deploy/demo").rglob("*"),
        *PROJECT.glob("tap_deploy/report/templates/*"),
        *PROJECT.glob("tap_deploy/server/page/*"),
    ]
    files = {path.relative_to(PROJECT).as_posix() for path in data if path.is_file()}
    assert "tap_deploy/report/templates/base.html" in files and files <= set(names)
    assert metadata_file(wheel, "licenses/LICENSE") == (PROJECT / "LICENSE").read_text("utf-8")
    assert "BAAI" in metadata_file(wheel, "licenses/NOTICE")


def test_the_metadata(wheel):
    metadata = email.message_from_string(metadata_file(wheel, "METADATA"))
    assert metadata["Name"] == "tap-deploy"
    assert metadata["Version"] == tap_deploy.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">")[0] for line in always} == {"numpy", "Pillow", "click", "sentencepiece"}
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras >= {
        "onnxruntime",
        "openvino",
        "export",
        "quantize",
        "tensorrt",
        "rtx",
        "cuda",
        "coco",
        "eval",
        "hub",
        "raster",
        "polygons",
        "report",
        "serve",
        "supervision",
        "train",
        "test",
    }


def test_the_command_is_installed(wheel):
    parser = configparser.ConfigParser()
    parser.read_string(metadata_file(wheel, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == {"tap-export": "tap_deploy.cli:main"}


@pytest.mark.parametrize("module", ["tap_deploy", "tap_deploy.export", "tap_deploy.engines"])
def test_the_wheel_can_be_imported_from(wheel, tmp_path, module):
    wheel.extractall(tmp_path)
    code = f"import importlib.util as u; print(*u.find_spec({module!r}).submodule_search_locations)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert result.stdout.strip() == str(tmp_path.joinpath(*module.split("."))), result.stderr


def test_the_version_can_be_read_without_importing_anything():
    tree = ast.parse((PROJECT / "tap_deploy/__init__.py").read_text("utf-8"))
    versions = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert versions == [tap_deploy.__version__]


def pinned() -> dict[str, list[str]]:
    """Package name, as pip compares it -> the versions that constraints.txt allows here."""
    requirements = pytest.importorskip("packaging.requirements")
    pins: dict[str, list[str]] = {}
    for line in (PROJECT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)  # refuses paths and options
            assert pin.url is None, line
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and "+" not in specifier.version, line
            if pin.marker is None or pin.marker.evaluate():
                pins.setdefault(pin.name.lower().replace("_", "-"), []).append(specifier.version)
    return pins


def test_constraints_pin_every_tested_requirement_once_and_within_its_range():
    requirements = pytest.importorskip("packaging.requirements")
    parser = configparser.ConfigParser()
    parser.read(PROJECT / "setup.cfg", encoding="utf-8")
    extras = parser["options.extras_require"]
    tested = [parser["options"]["install_requires"]]
    names = (
        "onnxruntime",
        "openvino",
        "export",
        "quantize",
        "coco",
        "eval",
        "hub",
        "polygons",
        "polygraphy",
        "raster",
        "report",
        "rtx",
        "serve",
        "supervision",
        "train",
        "test",
    )
    tested += [extras[name] for name in names]
    pins = pinned()
    for line in "\n".join(tested).split():
        requirement = requirements.Requirement(line)
        (version,) = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), line
    assert all(len(versions) == 1 for versions in pins.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_run_and_parsed(script):
    path = PROJECT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text("utf-8")
    subprocess.run(["bash", "-n", str(path)], check=True)
