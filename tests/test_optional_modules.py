"""Optional packages that are broken, installed twice, or partly uninstalled."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tap_deploy.optional_modules import version_of

PROJECT = pathlib.Path(__file__).parent.parent
BASE = ("numpy", "PIL", "click", "sentencepiece")
DOCTOR = "from tap_deploy.cli import main; main(['doctor', '--json'])"


@pytest.fixture
def site(tmp_path):
    """A folder to install into, with nothing but the base packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in BASE:
        module = pathlib.Path(importlib.import_module(name).__file__).parent
        (folder / name).symlink_to(module)
        for libraries in module.parent.glob("*.libs"):
            (folder / libraries.name).unlink(missing_ok=True)
            (folder / libraries.name).symlink_to(libraries)
    return folder


def record(site, name, version, module="onnxruntime"):
    """The metadata that pip writes for a package."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "top_level.txt").write_text(f"{module}\n")


def leave(site, module):
    """Leave the rest of a package after another with the same folder is uninstalled."""
    folder = site / module / "capi"
    folder.mkdir(parents=True)
    (folder / "libprovider.so").write_bytes(b"")


def python(site, code, *arguments):
    """Run a program that finds only what is in the folder."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{PROJECT}"}
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=site,
        timeout=120,
    )


def check_of(site, name="onnxruntime"):
    result = python(site, DOCTOR)
    assert (result.returncode, result.stderr) == (0, "")
    (check,) = [check for check in json.loads(result.stdout)["checks"] if check["name"] == name]
    return check


def test_an_onnxruntime_that_is_not_there(site):
    check = check_of(site)
    assert (check["status"], check["detail"]) == ("missing", "not installed")
    assert check["remedy"] == 'pip install "tap-deploy[onnxruntime]"'


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"])
def test_what_is_left_of_an_onnxruntime(site, name):
    leave(site, "onnxruntime")
    record(site, name, "1.31.0")
    check = check_of(site)
    assert check["status"] == "missing"
    assert f"{site}/onnxruntime has no InferenceSession" in check["detail"]
    assert check["detail"].endswith(f"installed: {name} 1.31.0")
    assert check["remedy"] == f"pip install --force-reinstall {name}"


def test_a_folder_that_nobody_installed(site):
    leave(site, "onnxruntime")
    check = check_of(site)
    assert f"{site}/onnxruntime has no InferenceSession" in check["detail"]
    assert check["remedy"] == "pip install --force-reinstall onnxruntime"


def test_a_package_whose_files_are_gone(site):
    record(site, "onnxruntime-gpu", "1.31.0")
    check = check_of(site)
    assert check["status"] == "missing"
    assert check["remedy"] == "pip install --force-reinstall onnxruntime-gpu"


def test_two_packages_are_one_too_many(site):
    onnxruntime = pytest.importorskip("onnxruntime")
    (site / "onnxruntime").symlink_to(pathlib.Path(onnxruntime.__file__).parent)
    record(site, "onnxruntime", "1.2.3")
    record(site, "onnxruntime-gpu", "1.2.4")
    check = check_of(site)
    assert check["status"] == "warning"
    assert check["detail"].startswith(
        f"{onnxruntime.__version__}: "
    )  # the version of the loaded module
    assert "CPU works; installed: onnxruntime 1.2.3, onnxruntime-gpu 1.2.4, " in check["detail"]
    assert check["remedy"] == (
        "pip uninstall -y onnxruntime onnxruntime-gpu "
        "&& pip install --force-reinstall onnxruntime-gpu"
    )


def test_an_old_one_is_brought_up_to_date_by_its_own_name(site):
    parts = ("InferenceSession", "SessionOptions", "RunOptions", "get_available_providers")
    (site / "onnxruntime.py").write_text(f"{' = '.join(parts)} = None; __version__ = '1.9.0'\n")
    record(site, "onnxruntime-gpu", "1.9.0")
    check = check_of(site)
    assert check["detail"] == "1.9.0 is too old; expected 1.20 or newer"
    assert check["remedy"] == "pip install --upgrade onnxruntime-gpu"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import ctypes; ctypes.CDLL('libnowhere.so.9')", "libnowhere.so.9: cannot open shared"),
        ("raise ImportError('libgone.so: no such file\\n  trace')", "libgone.so: no such file"),
        ("raise AttributeError", "AttributeError"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("", "has no InferenceSession: it is not onnxruntime"),
        ("class InferenceSession: pass", "has no SessionOptions: it is not onnxruntime"),
    ],
)
def test_an_onnxruntime_that_does_not_load(site, micro_bundle, photo, code, reason):
    (site / "onnxruntime.py").write_text(f"{code}\n")
    record(site, "onnxruntime", "1.32.0")
    check = check_of(site)
    assert check["status"] == "missing"
    assert reason in check["detail"]
    program = "from tap_deploy.cli import main; import sys; main(sys.argv[1:])"
    result = python(site, program, "run", micro_bundle.path, photo, "--point", "9,9")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: backend 'onnxruntime' cannot be loaded: ")
    assert reason in line and line.endswith("tap-export doctor says how to fix it")


@pytest.mark.parametrize(
    ("module", "check", "remedy"),
    [
        ("tensorrt", "tensorrt", "pip install --force-reinstall tensorrt"),
        ("tensorrt_rtx", "tensorrt-rtx", "pip install --force-reinstall tensorrt-rtx"),
        ("cuda/bindings", "cuda binding", "pip install --force-reinstall cuda-python"),
        ("torch", "torch", "pip install --force-reinstall torch"),
    ],
)
def test_what_is_left_of_others(site, module, check, remedy):
    leave(site, module)
    found = check_of(site, check)
    assert found["status"] == "missing"
    assert f"{site}/{module} is a folder without the package" in found["detail"]
    assert found["remedy"] == remedy


@pytest.mark.parametrize(
    ("module", "call", "reason"),
    [
        ("tensorrt", "versions.import_tensorrt('tensorrt')", "tensorrt has no Runtime"),
        ("cuda/bindings/runtime", "open_memory.open_device_memory()", "has no cudaMalloc"),
        ("pycuda/driver", "open_memory.open_device_memory()", "driver has no Device"),
        (
            "onnxruntime_ep_nv_tensorrt_rtx",
            "provider_libraries.plugin_device(types, 0)",
            "has no get_library_path",
        ),
    ],
)
def test_what_is_left_of_others_is_never_an_internal_error(site, module, call, reason):
    leave(site, module)
    code = (
        "import types\n"
        "from tap_deploy.errors import MissingDependencyError\n"
        "from tap_deploy.sessions.gpu import open_memory\n"
        "from tap_deploy.sessions.ort import provider_libraries\n"
        "from tap_deploy.sessions.trt import versions\n"
        f"try: {call}\n"
        "except MissingDependencyError as exc: print(exc)\n"
    )
    result = python(site, code)
    assert (result.returncode, result.stderr) == (0, "")
    assert reason in result.stdout


def test_a_missing_library_of_a_cuda_binding_is_named(site):
    """The older name of the module is tried, too; that it is not there says nothing."""
    (site / "cuda" / "bindings").mkdir(parents=True)
    (site / "cuda" / "bindings" / "runtime.py").write_text(
        "raise ImportError('libdoor.so: gone')\n"
    )
    code = (
        "from tap_deploy.sessions.gpu.open_memory import open_device_memory\n"
        "try: open_device_memory()\n"
        "except Exception as exc: print(exc)\n"
    )
    assert "cuda-python: libdoor.so: gone" in python(site, code).stdout


def test_versions_are_those_of_whoever_brings_the_module(site):
    record(site, "onnxruntime-gpu", "1.31.0")
    result = python(
        site, "from tap_deploy.optional_modules import version_of; print(version_of('onnxruntime'))"
    )
    assert result.stdout == "1.31.0\n"
    assert version_of("numpy") == importlib.import_module("numpy").__version__
    assert version_of("nowhere_to_be_found") is None


@pytest.mark.parametrize(
    ("module", "code", "call", "extra"),
    [
        ("shapely", "raise OSError('libgeos_c.so: gone')", "to_polygons()", "polygons"),
        ("shapely", "", "to_geojson()", "polygons"),
        ("pycocotools", "raise ValueError('numpy.dtype size changed')", "to_coco()", "coco"),
        ("supervision", "raise RuntimeError('no')", "to_supervision()", "supervision"),
    ],
)
def test_broken_packages_of_formats(tmp_path, monkeypatch, module, code, call, extra):
    (tmp_path / f"{module}.py").write_text(f"{code}\n")
    program = (
        "from tap_deploy.errors import MissingDependencyError\n"
        "from tests.made_regions import made_up\n"
        f"try: made_up().{call}\n"
        "except MissingDependencyError as exc: print(exc)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{module} is broken (")
    assert result.stdout.endswith(f'pip install "tap-deploy[{extra}]" --force-reinstall\n')
