"""CPUs and memory that a process may use, and the CPUs that its threads run on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tap_deploy.console import extras
from tap_deploy.errors import InputError
from tap_deploy.machine.cpu import usable_cores, usable_cpus
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import memory_of
from tap_deploy.sessions.opening import create_session

EIGHT = frozenset(range(8))


@pytest.fixture
def machine(tmp_path):
    """A machine with eight CPUs, two per core, made from the given files."""

    def with_files(files=()):
        topology = {
            f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}"
            for n in EIGHT
        }
        for name, content in (topology | dict(files)).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return Host(root=tmp_path)

    return with_files


@pytest.mark.parametrize(
    ("allowed", "cpus", "cores"),
    [(EIGHT, 8, 4), ({0, 4}, 2, 1), ({0, 1, 2}, 3, 3), ({3}, 1, 1), ({1, 2, 5, 6}, 4, 2)],
)
def test_threads_of_a_core_count_once(machine, allowed, cpus, cores):
    host = machine()
    assert (usable_cpus(host, allowed), usable_cores(host, allowed)) == (cpus, cores)


def test_without_a_topology_every_cpu_is_a_core(tmp_path):
    assert usable_cores(Host(root=tmp_path), {0, 1, 2}) == 3


MEMORY = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8000 kB"}
GROUP = "sys/fs/cgroup/a"
GROUP_V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "available_bytes"),
    [
        ({}, 8_192_000),
        ({f"{GROUP}/memory.max": "max", f"{GROUP}/memory.current": "7000"}, 8_192_000),
        ({f"{GROUP}/memory.max": "9000", f"{GROUP}/memory.current": "7000"}, 2000),
        (
            {
                f"{GROUP}/memory.max": "9000",
                f"{GROUP}/memory.current": "7000",
                f"{GROUP}/memory.stat": "active_file 50\ninactive_file 600\nshmem 4",
            },
            2600,
        ),
        ({f"{GROUP}/memory.max": "9000", f"{GROUP}/memory.current": "9500"}, 0),
        ({f"{GROUP}/memory.max": "99000000", f"{GROUP}/memory.current": "7000"}, 8_192_000),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/y",
                f"{GROUP_V1}/memory.limit_in_bytes": "5000",
                f"{GROUP_V1}/memory.usage_in_bytes": "1000",
                f"{GROUP_V1}/memory.stat": "inactive_file 9\ntotal_inactive_file 200",
            },
            4200,
        ),
    ],
)
def test_available_memory_is_what_the_control_groups_leave(machine, files, available_bytes):
    host = machine(MEMORY | {"proc/self/cgroup": "0::/a/b"} | files)
    assert memory_of(host).available_bytes == available_bytes


V1 = "sys/fs/cgroup/cpu"
V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "cpus", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "200000 100000"}, 2, 2),
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "150000 100000"}, 2, 2),
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "10000 100000"}, 1, 1),
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "600000 100000"}, 6, 4),
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "max 100000"}, 8, 4),
        # The group above is the narrower one; a container sees its own as the root.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                f"{V2}/a/b/cpu.max": "800000 100000",
                f"{V2}/a/cpu.max": "300000 100000",
            },
            3,
            3,
        ),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "50000 25000"}, 2, 2),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/id\n0::/",
                f"{V1}/cpu.cfs_quota_us": "250000",
                f"{V1}/cpu.cfs_period_us": "100000",
            },
            3,
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a",
                f"{V1}/a/cpu.cfs_quota_us": "-1",
                f"{V1}/a/cpu.cfs_period_us": "100000",
            },
            8,
            4,
        ),
        # A cpuset has no quota, and its name only begins like the other.
        (
            {
                "proc/self/cgroup": "3:cpuset:/a",
                f"{V1}/a/cpu.cfs_quota_us": "100000",
                f"{V1}/a/cpu.cfs_period_us": "100000",
            },
            8,
            4,
        ),
        ({"proc/self/cgroup": "nonsense", f"{V2}/cpu.max": "nonsense"}, 8, 4),
    ],
)
def test_quotas_of_control_groups(machine, files, cpus, cores):
    host = machine(files)
    assert (usable_cpus(host, EIGHT), usable_cores(host, EIGHT)) == (cpus, cores)


PROGRAM = """
import os, pathlib, re, sys, time
allowed = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, allowed)
from tap_deploy import TapPredictor
def threads():
    return {int(task.name): (task / "status").read_text()
            for task in pathlib.Path("/proc/self/task").iterdir()}
before = set(threads())
predictor = TapPredictor.from_bundle(sys.argv[1])
predictor.predict(sys.argv[2], points=[[[9, 9, 1]]])
for _ in range(500):  # a joined thread is listed until the system has ended it
    found = threads()
    if set(found) <= before:
        break
    time.sleep(0.01)
print(len(set(found) - before))
print({re.search(r"Cpus_allowed_list:\\s+(\\S+)", text)[1] for text in found.values()}
      == {str(cpu) for cpu in allowed})
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to choose from")
def test_threads_stay_on_the_cpus_of_the_process(micro_bundle, photo):
    """Each session runs on the caller's thread only; no thread stays, or is pinned elsewhere."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(micro_bundle.path), str(photo)],
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.stderr) == ("0\nTrue\n", "")


def test_far_more_threads_than_cpus_are_refused(monkeypatch, micro_bundle):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    spec = micro_bundle.variant("fp32").specs["prompt_decoder"]
    with pytest.raises(InputError, match="expected 1 to 4, or None for one per core"):
        create_session("onnxruntime", "graph.onnx", spec, threads=5)


def test_pytorch_uses_no_more_cores_than_it_may(monkeypatch):
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    try:
        extras.require_export_extra()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
