from __future__ import annotations

import configparser
import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import click
import click.testing
import numpy as np
import pytest

from tap_deploy.cli.doctor import doctor, packages, probe
from tap_deploy.machine import host as machine_host
from tap_deploy.machine.host import CommandResult, Host
from tap_deploy.machine.memory import memory_of
from tap_deploy.machine.state import machine_state

SETUP_CFG = Path(__file__).parent.parent / "setup.cfg"


def check_of(name: str, host: Host | None = None) -> doctor.Finding:
    (check,) = [check for check in doctor.diagnose(machine_state(host)) if check.name == name]
    return check


def invoke(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(doctor.doctor_command, arguments)


def fake_onnxruntime(answers: dict[str, object]) -> types.ModuleType:
    """An onnxruntime whose providers double their input, or raise or return ``answers[name]``."""

    class InferenceSession:
        def __init__(self, model: bytes, options: object, providers: list[str]) -> None:
            self.provider = providers[0]
            if answers[self.provider] == "falls back":
                self.provider = "CPUExecutionProvider"

        def get_providers(self) -> list[str]:
            return [self.provider]

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            answer = answers[self.provider]
            if isinstance(answer, Exception):
                raise answer
            return [np.asarray(answer or 2 * inputs["x"])]

    module = types.ModuleType("onnxruntime")
    module.__spec__ = importlib.machinery.ModuleSpec("onnxruntime", None)
    module.__version__ = "1.32.0"
    module.SessionOptions = module.RunOptions = types.SimpleNamespace
    module.InferenceSession = InferenceSession
    module.get_available_providers = lambda: list(answers)
    return module


def test_a_package_that_is_there():
    check = check_of("numpy")
    assert (check.status, check.detail, check.remedy) == ("ok", np.__version__, None)


@pytest.mark.parametrize(
    ("module", "name", "extra", "use"),
    [
        ("torch", "torch", "export", "export"),
        ("onnx", "onnx", "quantize", "export"),
        ("onnxscript", "onnxscript", "quantize", "quantize"),
        ("onnx_ir", "onnx-ir", "quantize", "quantize"),
        ("jinja2", "Jinja2", "quantize", "report"),
        ("tensorrt", "tensorrt", "tensorrt", "tensorrt"),
        ("tensorrt_rtx", "tensorrt-rtx", "rtx", "rtx"),
        ("pycocotools", "pycocotools", "coco", "coco"),
        ("huggingface_hub", "huggingface_hub", "hub", "hub"),
        ("rasterio", "rasterio", "raster", "raster"),
    ],
)
def test_a_missing_package_names_its_use_and_its_extra(monkeypatch, module, name, extra, use):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    check = check_of(name)
    assert (check.status, check.detail) == ("missing", "not installed")
    assert check.remedy == f'pip install "tap-deploy[{extra}]"'
    assert use in check.required_for.split(", ")


def test_a_missing_base_package_is_mended_by_the_project_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert check_of("sentencepiece").remedy == "pip install tap-deploy"


def test_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: "1.9.2+cpu")
    check = check_of("numpy")
    assert check.status == "missing"
    assert check.detail == "1.9.2+cpu is too old; expected 1.26 or newer"


def test_versions_are_compared_as_numbers():
    package = packages.Package(name="x", minimum="1.9", required_for="run")
    assert package.problem_with("1.10.0") is None
    assert package.problem_with("1.9rc1") is None
    assert package.problem_with("1.8.9") is not None
    assert package.problem_with("") is None  # importable, version unknown


def test_minimal_versions_are_those_of_setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(SETUP_CFG, encoding="utf-8")
    for package in (*packages.PACKAGES, packages.CUDA_PYTHON):
        requirements = parser["options"]["install_requires"]
        if package.extra:
            requirements = parser["options.extras_require"][package.extra]
        assert f"{package.name}>={package.minimum}" in requirements.split(), package.name


def test_the_tiny_model_is_valid():
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(probe.tiny_model()), full_check=True)


def test_the_cpu_provider_really_computes():
    onnxruntime = pytest.importorskip("onnxruntime")
    assert probe.working_providers(onnxruntime)["CPUExecutionProvider"] is None


@pytest.mark.parametrize(
    ("answer", "finding"),
    [
        (RuntimeError("no kernel\nlong trace"), "CPU no kernel"),
        ([0.0, 2.0, 5.0], "CPU wrong result: [0. 2. 5.], expected [0. 2. 4.]"),
    ],
)
def test_an_onnxruntime_that_does_not_compute_is_missing(monkeypatch, answer, finding):
    module = fake_onnxruntime({"CPUExecutionProvider": answer})
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    check = check_of("onnxruntime")
    assert check.status == "missing"
    assert check.detail.endswith(finding)
    assert check.remedy == "pip install --force-reinstall onnxruntime"


def test_other_providers_are_tried_but_not_required(monkeypatch):
    answers = {
        "TensorrtExecutionProvider": RuntimeError("libnvinfer.so not found"),
        "CUDAExecutionProvider": "falls back",
        "AzureExecutionProvider": RuntimeError("must not be tried"),
        "CPUExecutionProvider": None,
    }
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(answers))
    check = check_of("onnxruntime")
    assert check.status == "ok"
    assert check.detail.endswith(
        "Tensorrt libnvinfer.so not found, CUDA listed, but fell back to the CPU, CPU works"
    )


def test_an_onnxruntime_that_cannot_be_imported(monkeypatch):
    def broken(name: str) -> None:
        raise ImportError("libpython is gone\ntrace")

    monkeypatch.setattr(importlib, "import_module", broken)
    check = check_of("onnxruntime")
    assert check.status == "missing"
    assert check.detail.startswith("cannot be loaded: libpython is gone")


def test_either_cuda_binding_will_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    check = check_of("cuda binding")
    assert check.status == "missing"
    assert check.remedy == 'pip install "tap-deploy[cuda]"'

    pycuda = types.ModuleType("pycuda")
    pycuda.__spec__ = importlib.machinery.ModuleSpec("pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda", pycuda)
    check = check_of("cuda binding")
    assert (check.status, check.remedy) == ("ok", None)
    assert check.detail.startswith("pycuda ")


def nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("echo 'NVIDIA H100, 580.1, 9.0, 81559 MiB'", "ok", "NVIDIA H100, 580.1, 9.0, 81559 MiB"),
        ("echo 'cannot talk to the driver' >&2; exit 9", "missing", "cannot talk to the driver"),
        ("exit 0", "missing", "nvidia-smi found no GPU"),
        (None, "missing", "nvidia-smi not found"),
    ],
)
def test_the_driver_is_asked(monkeypatch, tmp_path, script, status, detail):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        nvidia_smi(tmp_path, script)
    check = check_of("nvidia driver", Host(root=tmp_path))
    assert (check.status, check.detail) == (status, detail)
    assert (check.remedy is None) == (status == "ok")


def test_a_driver_that_hangs_is_given_up(monkeypatch, tmp_path):
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(machine_host.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine_host.subprocess, "run", hang)
    check = check_of("nvidia driver", Host(root=tmp_path))
    assert check.detail == "nvidia-smi failed: TimeoutExpired"


def no_programs(command):
    return CommandResult(problem=f"{command[0]} not found")


def test_on_a_jetson_tensorrt_and_the_driver_come_with_the_system(monkeypatch, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.0\n", "utf-8")
    host = Host(root=tmp_path, run=no_programs)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    check = check_of("nvidia driver", host)
    assert (check.status, check.detail) == ("ok", "part of Jetson Linux 36.4.0")
    assert check_of("tensorrt", host).remedy == "sudo apt-get install python3-libnvinfer"


@pytest.mark.parametrize(("sm", "status"), [("7.0", "missing"), ("7.5", "ok"), ("12.0", "ok")])
def test_the_generation_of_the_gpu(tmp_path, sm, status):
    answer = CommandResult(output=f"A GPU, 580.1, {sm}, 16 GiB\n")
    check = check_of("gpu", Host(root=tmp_path, run=lambda command: answer))
    assert check.status == status
    assert check.detail.startswith(f"SM {sm}")


@pytest.mark.parametrize(
    ("cpuinfo", "status", "detail"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni amx_int8 xsave", "ok", "A CPU; bf16: no; int8: AMX"),
        ("flags\t\t: fpu avx512_bf16 avx_vnni", "ok", "A CPU; bf16: yes; int8: AVX-VNNI"),
        ("flags\t\t: fpu avx2 fma", "warning", "A CPU; bf16: no; int8: no VNNI, so 7-bit weights"),
        ("Features\t: fp asimd asimddp", None, None),
    ],
)
def test_how_the_cpu_multiplies_int8(tmp_path, cpuinfo, status, detail):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name\t: A CPU\n{cpuinfo}\n", "utf-8")
    checks = {
        c.name: c for c in doctor.diagnose(machine_state(Host(root=tmp_path, run=no_programs)))
    }
    assert ("cpu" in checks) == (status is not None)
    if status is not None:
        assert checks["cpu"].status == status
        assert checks["cpu"].detail.startswith(detail)
        assert ("--reduce-range" in (checks["cpu"].remedy or "")) == (status == "warning")


def test_little_room_is_a_warning_and_blocks_nothing(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**31, 2**30, 2**30))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2097152 kB\n", "utf-8")
    checks = doctor.diagnose(machine_state(Host(root=tmp_path, run=no_programs)))
    warnings = {check.name: check for check in checks if check.status == "warning"}
    assert set(warnings) == {"disk space", "memory"}
    assert warnings["disk space"].detail.startswith("1.0 GiB available; ")
    assert warnings["memory"].detail.startswith("2.0 GiB available; ")
    assert all(check.remedy for check in warnings.values())
    assert not {"disk space", "memory"} & set(doctor.missing_for("export", checks))


def test_available_memory_is_less_than_what_is_installed():
    memory = memory_of(Host())
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_the_report_names_what_is_missing_and_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke("--for", "export")
    assert result.exit_code == 2
    assert re.search(r"missing +torch +not installed\n", result.output)
    assert 'for export: pip install "tap-deploy[export]"' in result.output
    assert re.search(r"^export: +missing .*torch", result.output, re.MULTILINE)


def test_without_a_use_nothing_is_demanded(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert invoke().exit_code == 0


def test_a_use_that_lacks_nothing_is_ready(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke("--for", "run")
    assert result.exit_code == 0
    assert re.search(r"^run: +ready$", result.output, re.MULTILINE)


def test_json(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke("--json", "--for", "export")
    assert result.exit_code == 2
    report = json.loads(result.output)
    assert set(report["missing"]) == set(packages.USES)
    assert "torch" in report["missing"]["export"]
    (torch,) = [check for check in report["checks"] if check["name"] == "torch"]
    assert torch == {
        "name": "torch",
        "status": "missing",
        "detail": "not installed",
        "remedy": 'pip install "tap-deploy[export]"',
        "required_for": "export",
    }


def test_an_unknown_use_is_refused():
    result = invoke("--for", "cooking")
    assert result.exit_code == 2
    assert "cooking" in result.output


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from tap_deploy.cli.doctor.doctor import doctor_command as doctor;"
        "doctor(['--json'], standalone_mode=False); sys.stdout.write('modules: ');"
        "print({'torch', 'onnx', 'tensorrt', 'tensorrt_rtx', 'sentencepiece'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("\nmodules: set()\n")
    assert result.stderr == ""
