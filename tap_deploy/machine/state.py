"""State of a machine: everything that running and timing a model depends on."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

from tap_deploy.machine.cpu import cpu_has_bf16, cpu_int8, cpu_name
from tap_deploy.machine.host import Host
from tap_deploy.machine.jetson import Jetson, jetson_of
from tap_deploy.machine.memory import Memory, memory_of

_GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total")
_GPU_STATE_FIELDS = (
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu"),
    *("power.draw", "power.limit", "persistence_mode"),
)
_NOTHING = ("[N/A]", "N/A", "[Not Supported]", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as reported by ``nvidia-smi``.

    Attributes:
        name: device name.
        driver: driver version; None if unknown.
        compute_capability: compute capability, such as "8.7"; None if unknown.
        memory: total memory with its unit; None if unknown.
    """

    name: str
    driver: str | None
    compute_capability: str | None
    memory: str | None

    def __str__(self) -> str:
        parts = (self.name, self.driver, self.compute_capability, self.memory)
        return ", ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineState:
    """State of a machine that measurements and verdicts depend on.

    Attributes:
        cpu: name of the CPU.
        cpu_int8: int8 instruction set, see ``tap_deploy.machine.cpu.cpu_int8``.
        cpu_bf16: whether the CPU multiplies bf16; False if its flags are unknown.
        jetson: the Jetson board; None for other machines.
        gpus: GPUs that the driver reports.
        gpu_problem: why the driver reports none; None if it reports some.
        cuda: version of the CUDA toolkit in ``/usr/local/cuda``; None if not installed.
        tensorrt_library: version of the Debian package of the TensorRT library; None if not
            installed.
        tensorrt_python: version of the Debian package of its Python module; None if not
            installed.
        memory: memory of the CPU, which the GPU of a Jetson shares.
    """

    cpu: str
    cpu_int8: str | None
    cpu_bf16: bool
    jetson: Jetson | None
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    cuda: str | None
    tensorrt_library: str | None
    tensorrt_python: str | None
    memory: Memory

    @property
    def compute_capability(self) -> str | None:
        """Compute capability of the first GPU, such as ``8.7``; None without a GPU."""
        if self.jetson is not None and self.jetson.compute_capability is not None:
            return self.jetson.compute_capability
        return self.gpus[0].compute_capability if self.gpus else None

    @property
    def sm_numbers(self) -> tuple[int, ...] | None:
        """``compute_capability`` as (major, minor); None if unknown."""
        match = re.fullmatch(r"(\d+)\.(\d+)", self.compute_capability or "")
        return (int(match[1]), int(match[2])) if match else None

    @property
    def title(self) -> str:
        """Board, GPU or CPU in one line."""
        sm = f", SM {self.compute_capability}" if self.compute_capability else ""
        if self.jetson is not None:
            return f"{self.jetson.model}, L4T {self.jetson.l4t}{sm}"
        if self.gpus:
            return f"{self.gpus[0].name}, driver {self.gpus[0].driver}{sm}"
        return self.cpu


def machine_state(host: Host | None = None) -> MachineState:
    """Return the state of a machine, by default this one; unknown fields are None."""
    host = Host() if host is None else host
    packages = _debian_packages(host)
    gpus, problem = _gpus(host)
    libraries = [name for name in packages if re.fullmatch(r"libnvinfer\d+", name)]
    library = max(libraries, key=lambda name: int(name[len("libnvinfer") :]), default="")
    return MachineState(
        cpu=cpu_name(host),
        cpu_int8=cpu_int8(host),
        cpu_bf16=cpu_has_bf16(host),
        jetson=jetson_of(host, packages),
        gpus=gpus,
        gpu_problem=problem,
        cuda=_cuda_version(host),
        tensorrt_library=packages.get(library),
        tensorrt_python=packages.get("python3-libnvinfer"),
        memory=memory_of(host),
    )


@functools.cache
def machine_title(*, on_cpu: bool) -> str:
    """Return the name of what computes here: the CPU, or the board or GPU with its driver."""
    return cpu_name(Host()) if on_cpu else machine_state().title


def gpu_conditions(host: Host | None = None) -> dict[str, str]:
    """Return clocks, temperature and power of the first GPU, as printed by ``nvidia-smi``."""
    host = Host() if host is None else host
    rows = _query(host, _GPU_STATE_FIELDS)
    values = zip(_GPU_STATE_FIELDS, rows[0], strict=True) if rows else ()
    return {name: value for name, value in values if value not in _NOTHING}


def state_as_dict(state: MachineState) -> dict[str, Any]:
    """Return a state as JSON types."""
    return dataclasses.asdict(state) | {
        "title": state.title,
        "compute_capability": state.compute_capability,
    }


def _gpus(host: Host) -> tuple[tuple[Gpu, ...], str | None]:
    answer = host.run(_query_command(_GPU_FIELDS))
    if not answer.succeeded:
        return (), answer.problem
    gpus = []
    for row in _rows(answer.output, len(_GPU_FIELDS)):
        name, *others = (None if value in _NOTHING else value for value in row)
        driver, capability, memory = others
        gpus.append(
            Gpu(
                name=name or "unknown GPU",
                driver=driver,
                compute_capability=capability,
                memory=memory,
            )
        )
    return tuple(gpus), None if gpus else "nvidia-smi found no GPU"


def _query(host: Host, fields: tuple[str, ...]) -> list[list[str]]:
    return _rows(host.run(_query_command(fields)).output, len(fields))


def _query_command(fields: tuple[str, ...]) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]


def _rows(output: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    return [row for row in rows if len(row) == columns]


def _debian_packages(host: Host) -> dict[str, str]:
    """Return the installed Debian packages, name -> version."""
    packages = {}
    for paragraph in re.split(r"\n\s*\n", host.text("/var/lib/dpkg/status") or ""):
        fields = dict(re.findall(r"^(Package|Status|Version): (.+)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed") and "Version" in fields:
            packages[fields["Package"]] = fields["Version"]
    return packages


def _cuda_version(host: Host) -> str | None:
    try:
        version = json.loads(host.text("/usr/local/cuda/version.json") or "")["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(version)
