"""The doctor on recorded file trees of Jetson boards, one per JetPack."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import pytest

from tap_deploy.cli.doctor.doctor import diagnose
from tap_deploy.machine.host import CommandResult, Host
from tap_deploy.machine.jetson import JETPACKS, Clock
from tap_deploy.machine.state import gpu_conditions, machine_state, state_as_dict

TREES = pathlib.Path(__file__).parent / "data" / "jetson"
NAMES = sorted(path.name for path in TREES.iterdir() if path.is_dir())
GIBIBYTE = 1 << 30


def host_of(root: pathlib.Path) -> Host:
    """A board whose programs print what was recorded beside its files."""

    def run(command):
        recorded = root / "commands" / command[0]
        if not recorded.is_file():
            return CommandResult(problem=f"{command[0]} not found")
        return CommandResult(output=recorded.read_text("utf-8"))

    return Host(root=root, run=run)


def board(name):
    return machine_state(host_of(TREES / name)).jetson


def checks_of(root, *, only=None):
    checks = {check.name: check for check in diagnose(machine_state(host_of(root)))}
    return checks if only is None else checks[only]


@pytest.mark.parametrize(
    ("name", "jetpack", "l4t", "sm", "soc"),
    [
        ("jetpack-6.1-orin-nx", "6.1", "36.4.0", "8.7", "tegra234"),
        ("jetpack-6.2-orin-nano", "6.2", "36.4.3", "8.7", "tegra234"),
        ("jetpack-7.0-thor", "7.0", "38.2.0", "11.0", "tegra264"),
        ("jetpack-7.1-thor", "7.1", "38.4.0", "11.0", "tegra264"),
        ("jetpack-7.2-agx-orin", "7.2", "39.2.0", "8.7", "tegra234"),
    ],
)
def test_boards(name, jetpack, l4t, sm, soc):
    found = board(name)
    assert (found.jetpack, found.l4t, found.soc) == (jetpack, l4t, soc)
    assert found.compute_capability == sm
    assert found.model.startswith("NVIDIA Jetson ")
    assert "\0" not in found.model


def test_every_tree_is_tested():
    assert len(NAMES) == 5


@pytest.mark.parametrize(
    ("name", "tensorrt", "cuda"),
    [
        ("jetpack-6.1-orin-nx", "10.3.0.30-1+cuda12.5", "12.6.11"),
        ("jetpack-7.0-thor", None, None),
        ("jetpack-7.1-thor", "10.13.3.9-1+cuda13.0", "13.0.20250820"),
        ("jetpack-7.2-agx-orin", "10.16.2.10-1+cuda13.2", "13.2.1"),
    ],
)
def test_libraries(name, tensorrt, cuda):
    state = machine_state(host_of(TREES / name))
    assert (state.tensorrt_library, state.cuda) == (tensorrt, cuda)


def test_a_removed_package_is_not_installed():
    state = machine_state(host_of(TREES / "jetpack-6.2-orin-nano"))
    assert state.tensorrt_python is None
    assert state.jetson.jetpack_package == "6.2+b77"


@pytest.mark.parametrize(
    ("name", "mode", "remedy"),
    [
        ("jetpack-6.1-orin-nx", "15W; the board can do more", "sudo nvpmodel -m 0"),
        ("jetpack-6.2-orin-nano", "MAXN_SUPER", None),
        ("jetpack-7.0-thor", "120W; the board can do more", "sudo nvpmodel -m 0"),
        ("jetpack-7.2-agx-orin", "MAXN", None),
    ],
)
def test_power_modes(name, mode, remedy):
    """From the status file, or, where there is none, from the program."""
    check = checks_of(TREES / name, only="power mode")
    assert (check.detail, check.remedy) == (mode, remedy)
    assert check.status == ("warning" if remedy else "ok")


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("jetpack-6.1-orin-nx", "warning"),
        ("jetpack-6.2-orin-nano", "ok"),
        ("jetpack-7.0-thor", "warning"),
        ("jetpack-7.1-thor", "ok"),
    ],
)
def test_clocks(name, status):
    check = checks_of(TREES / name, only="clocks")
    assert check.status == status
    assert (check.remedy == "sudo jetson_clocks") == (status == "warning")
    assert "MHz" in check.detail and "CPU" in check.detail


def test_a_clock_in_words():
    clock = Clock(current_hz=306_000_000, min_hz=306_000_000, max_hz=918_000_000, governor="podgov")
    assert str(clock) == "306 MHz (306 to 918 MHz, podgov)"
    held = Clock(current_hz=None, min_hz=918_000_000, max_hz=918_000_000, governor="podgov")
    assert str(held) == "unknown MHz (held at 918 MHz, podgov)"


def test_swap_into_compressed_memory_does_not_count():
    check = checks_of(TREES / "jetpack-6.2-orin-nano", only="swap")
    assert check.status == "warning"
    assert check.detail.startswith("0.0 GiB on disk, 3.7 GiB zram")
    assert check.remedy.startswith("sudo fallocate -l 8G /swapfile && ")
    assert checks_of(TREES / "jetpack-7.2-agx-orin", only="swap").status == "ok"


def test_little_memory():
    check = checks_of(TREES / "jetpack-6.2-orin-nano", only="memory")
    assert check.status == "warning"
    assert check.detail.startswith("2.2 of 7.4 GiB available; building engines")
    assert check.remedy == "sudo systemctl isolate multi-user.target"
    assert checks_of(TREES / "jetpack-6.1-orin-nx", only="memory").status == "ok"


def test_throttling_is_told():
    check = checks_of(TREES / "jetpack-6.2-orin-nano", only="temperature")
    assert check.status == "warning"
    assert check.detail == "55 °C; over-current slowed the board down 3 times since start"
    assert checks_of(TREES / "jetpack-7.1-thor", only="temperature").detail == "52 °C"


def test_a_board_without_its_components_names_the_command():
    checks = checks_of(TREES / "jetpack-7.0-thor")
    install = "sudo apt-get update && sudo apt-get install nvidia-jetpack"
    for name in ("tensorrt library", "cuda toolkit"):
        assert (checks[name].status, checks[name].remedy) == ("missing", install)


def test_an_environment_that_does_not_see_the_module_of_the_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    seen = checks_of(TREES / "jetpack-6.1-orin-nx", only="tensorrt").remedy
    assert seen == "python3 -m venv --system-site-packages .venv"
    absent = checks_of(TREES / "jetpack-6.2-orin-nano", only="tensorrt").remedy
    assert absent == "sudo apt-get install python3-libnvinfer"


@pytest.mark.parametrize("version", [(3, 10), (3, 12)])
def test_the_python_of_the_jetpack(monkeypatch, version):
    class Version(tuple):
        major, minor = version

    monkeypatch.setattr(sys, "version_info", Version((*version, 0)))
    old = checks_of(TREES / "jetpack-6.1-orin-nx", only="jetpack python")
    new = checks_of(TREES / "jetpack-7.2-agx-orin", only="jetpack python")
    wrong, right = (new, old) if version == (3, 10) else (old, new)
    assert right.status == "ok"
    assert wrong.status == "warning"
    wanted = "3.12" if version == (3, 10) else "3.10"
    assert wrong.remedy == f"/usr/bin/python{wanted} -m venv --system-site-packages .venv"


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_not_well_comes_with_a_command(name):
    for check in diagnose(machine_state(host_of(TREES / name))):
        assert (check.remedy is None) == (check.status == "ok"), check
        assert check.detail


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_json(name):
    values = json.loads(json.dumps(state_as_dict(machine_state(host_of(TREES / name)))))
    assert values["title"].startswith("NVIDIA Jetson ")
    assert values["memory"]["total_bytes"] > 7 * GIBIBYTE


def copy_with_release(tmp_path, line):
    root = shutil.copytree(TREES / "jetpack-6.2-orin-nano", tmp_path / "board")
    (root / "etc/nv_tegra_release").write_text(f"{line}\n", "utf-8")
    return root


@pytest.mark.parametrize(
    ("line", "jetpack", "status"),
    [
        ("# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic", "6.2.1", "ok"),
        ("# R36 (release), REVISION: 5.0, GCID: 1", "6.2.2", "ok"),
        ("# R38 (release), REVISION: 2.2, GCID: 42205042", "7.0", "ok"),
        ("# R39 (release), REVISION: 2.1, GCID: 46758480", "7.2.1", "ok"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", "6.0", "missing"),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178", "5.1", "missing"),
        ("# R41 (release), REVISION: 1.0, GCID: 1", None, "warning"),
        ("# R00 (debug)", None, "warning"),
        ("", None, "warning"),
    ],
)
def test_other_releases(tmp_path, line, jetpack, status):
    root = copy_with_release(tmp_path, line)
    assert machine_state(host_of(root)).jetson.jetpack == jetpack
    check = checks_of(root, only="jetpack")
    assert check.status == status
    if status == "missing":
        assert check.remedy == "sdkmanager"


def test_an_older_library_than_the_jetpack_is_a_warning(tmp_path):
    root = copy_with_release(tmp_path, "# R39 (release), REVISION: 2.0")
    check = checks_of(root, only="tensorrt library")
    assert check.status == "warning"
    assert check.detail == "10.3.0.30-1+cuda12.5; JetPack 7.2 comes with 10.16"


def test_a_board_of_which_next_to_nothing_is_known(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_bytes(b"\xff\xfe")
    checks = checks_of(tmp_path)
    assert checks["power mode"].remedy == "sudo nvpmodel -q"
    assert checks["clocks"].detail == "GPU unknown"
    assert "temperature" not in checks


def test_jetpacks_are_listed_in_order():
    assert list(JETPACKS) == sorted(JETPACKS)


def test_elsewhere_there_is_no_board(tmp_path):
    checks = checks_of(tmp_path)
    assert not {"jetpack", "power mode", "clocks"} & set(checks)
    state = machine_state(host_of(tmp_path))
    assert state.jetson is None and state.compute_capability is None


def test_a_server(tmp_path):
    (tmp_path / "commands").mkdir()
    answer = "NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559 MiB\n"
    (tmp_path / "commands/nvidia-smi").write_text(answer, "utf-8")
    state = machine_state(host_of(tmp_path))
    assert state.title == "NVIDIA H100 80GB HBM3, driver 580.95.05, SM 9.0"
    assert state.sm_numbers == (9, 0)


def test_conditions_of_a_gpu(tmp_path):
    (tmp_path / "commands").mkdir()
    answer = "1980 MHz, 1980 MHz, 2619 MHz, 31, 70.15 W, 700.00 W, Enabled\n"
    (tmp_path / "commands/nvidia-smi").write_text(answer, "utf-8")
    conditions = gpu_conditions(host_of(tmp_path))
    assert conditions["clocks.sm"] == "1980 MHz"
    assert conditions["power.limit"] == "700.00 W"
    (tmp_path / "commands/nvidia-smi").write_text("[N/A], [N/A], [N/A], 40, [N/A], [N/A], [N/A]\n")
    assert gpu_conditions(host_of(tmp_path)) == {"temperature.gpu": "40"}
    assert gpu_conditions(host_of(tmp_path / "nowhere")) == {}
