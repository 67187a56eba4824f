"""Jetson boards: model, JetPack, power mode, clocks."""

from __future__ import annotations

import dataclasses
import re

from tap_deploy.machine.host import Host

RELEASE_FILE = "/etc/nv_tegra_release"
# SoC name in the device tree -> compute capability of its GPU.
COMPUTE_CAPABILITIES = {
    "tegra194": "7.2",
    "tegra234": "8.7",
    "tegra264": "11.0",
}
# Jetson Linux (L4T) -> JetPack. A missing point release maps to the JetPack of the one before it.
JETPACKS = {
    (35, 1): "5.0",
    (35, 2): "5.1",
    (36, 2): "6.0",
    (36, 4): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 5): "6.2.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39, 2): "7.2",
    (39, 2, 1): "7.2.1",
}
# Major and minor JetPack version -> its TensorRT, CUDA and Python versions.
COMPONENTS = {
    "6.1": ("10.3", "12.6", "3.10"),
    "6.2": ("10.3", "12.6", "3.10"),
    "7.0": ("10.13", "13.0", "3.12"),
    "7.1": ("10.13", "13.0", "3.12"),
    "7.2": ("10.16", "13.2", "3.12"),
}
_GPU_CLOCKS = (
    "/sys/class/devfreq/17000000.gpu",  # Orin, JetPack 6 and later
    "/sys/class/devfreq/17000000.ga10b",  # Orin, JetPack 5
    "/sys/class/devfreq/gpu-gpc-0",  # Thor
)
_CPU_CLOCKS = "/sys/devices/system/cpu/cpu0/cpufreq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerMode:
    """A power mode of ``nvpmodel``.

    Attributes:
        id: number of the mode; None if unknown.
        name: name of the mode.
        highest_id: number of the mode without a power limit; None if the board has none.
    """

    id: int | None
    name: str
    highest_id: int | None

    @property
    def is_highest(self) -> bool:
        """Whether the mode has no power limit; the board may still throttle when hot."""
        return self.name.startswith("MAXN")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """A clock and its range.

    Attributes:
        current_hz: current frequency, Hz; None if unknown.
        min_hz: lowest frequency, Hz; equal to ``max_hz`` if ``jetson_clocks`` locks the clock.
        max_hz: highest frequency, Hz.
        governor: frequency governor of the kernel.
    """

    current_hz: int | None
    min_hz: int
    max_hz: int
    governor: str

    @property
    def is_held(self) -> bool:
        """Whether the clock is locked."""
        return self.min_hz == self.max_hz

    def __str__(self) -> str:
        current = "unknown" if self.current_hz is None else f"{self.current_hz / 1e6:.0f}"
        held = "held at" if self.is_held else f"{self.min_hz / 1e6:.0f} to"
        return f"{current} MHz ({held} {self.max_hz / 1e6:.0f} MHz, {self.governor})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jetson:
    """A Jetson board.

    Attributes:
        model: model name in the device tree.
        soc: SoC, such as ``tegra234``.
        l4t: version of Jetson Linux, such as ``36.4.3``.
        jetpack: JetPack of that version; None if it is not in ``JETPACKS``.
        jetpack_package: version of the ``nvidia-jetpack`` package; None if not installed.
        power_mode: power mode; None if unknown.
        gpu_clock: clock of the GPU; None if unknown.
        cpu_clock: clock of CPU 0; None if unknown.
        temperature_c: temperature of the hottest sensor, °C; None if unknown.
        throttle_events: over-current throttling events since boot; None if unknown.
    """

    model: str
    soc: str
    l4t: str
    jetpack: str | None
    jetpack_package: str | None
    power_mode: PowerMode | None
    gpu_clock: Clock | None
    cpu_clock: Clock | None
    temperature_c: float | None
    throttle_events: int | None

    @property
    def compute_capability(self) -> str | None:
        """Compute capability of its GPU; None if the SoC is unknown."""
        return COMPUTE_CAPABILITIES.get(self.soc)

    @property
    def components(self) -> tuple[str, str, str] | None:
        """TensorRT, CUDA and Python versions of its JetPack; None if unknown or not supported."""
        return COMPONENTS.get(".".join((self.jetpack or "").split(".")[:2]))


def jetson_of(host: Host, packages: dict[str, str]) -> Jetson | None:
    """Return the Jetson board of a host; None for other machines.

    Args:
        host: the machine.
        packages: installed Debian packages, name -> version.
    """
    release = host.text(RELEASE_FILE)
    compatible = (host.text("/proc/device-tree/compatible") or "").split("\n")
    soc = next((name[7:] for name in compatible if name.startswith("nvidia,tegra")), "unknown SoC")
    if release is None and soc == "unknown SoC":
        return None
    l4t = _l4t_version(release or "")
    return Jetson(
        model=host.text("/proc/device-tree/model") or "unknown Jetson",
        soc=soc,
        l4t=".".join(map(str, l4t)) or "unknown",
        jetpack=_jetpack(l4t),
        jetpack_package=packages.get("nvidia-jetpack"),
        power_mode=_power_mode(host),
        gpu_clock=next(filter(None, (_clock(host, path) for path in _GPU_CLOCKS)), None),
        cpu_clock=_cpu_clock(host),
        temperature_c=_temperature(host),
        throttle_events=_throttle_events(host),
    )


def _l4t_version(release: str) -> tuple[int, ...]:
    """Parse ``# R36 (release), REVISION: 4.3, …``."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    return (int(match[1]), *map(int, match[2].strip(".").split("."))) if match else ()


def _jetpack(l4t: tuple[int, ...]) -> str | None:
    """Return the newest JetPack of the same major version that is not newer than this L4T."""
    known = [version for version in JETPACKS if version <= l4t and version[0] == l4t[0]]
    return JETPACKS[max(known)] if known else None


def _power_mode(host: Host) -> PowerMode | None:
    modes = dict(
        re.findall(
            r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", host.text("/etc/nvpmodel.conf") or ""
        )
    )
    highest = next((int(id) for id, name in modes.items() if name.startswith("MAXN")), None)
    status = re.search(r"pmode:(\d+)", host.text("/var/lib/nvpmodel/status") or "")
    if status:
        name = modes.get(str(int(status[1])), f"mode {int(status[1])}")
        return PowerMode(id=int(status[1]), name=name, highest_id=highest)
    answer = host.run(["nvpmodel", "-q"])
    found = re.search(r"NV Power Mode: *(\S+)(?:\s+(\d+))?", answer.output)
    if found is None:
        return None
    return PowerMode(id=int(found[2]) if found[2] else None, name=found[1], highest_id=highest)


def _clock(host: Host, path: str) -> Clock | None:
    low, high = host.number(f"{path}/min_freq"), host.number(f"{path}/max_freq")
    if low is None or high is None:
        return None
    governor = host.text(f"{path}/governor") or "unknown governor"
    current = host.number(f"{path}/cur_freq")
    return Clock(current_hz=current, min_hz=low, max_hz=high, governor=governor)


def _cpu_clock(host: Host) -> Clock | None:
    kilohertz = [
        host.number(f"{_CPU_CLOCKS}/scaling_{name}_freq") for name in ("cur", "min", "max")
    ]
    current, low, high = (None if value is None else 1000 * value for value in kilohertz)
    if low is None or high is None:
        return None
    governor = host.text(f"{_CPU_CLOCKS}/scaling_governor") or "unknown governor"
    return Clock(current_hz=current, min_hz=low, max_hz=high, governor=governor)


def _temperature(host: Host) -> float | None:
    zones = host.folders("/sys/class/thermal/thermal_zone*")
    millidegrees = [host.number(f"{zone}/temp") for zone in zones]
    return max((value / 1000 for value in millidegrees if value is not None), default=None)


def _throttle_events(host: Host) -> int | None:
    counts = [host.number(path) for path in host.folders("/sys/class/hwmon/hwmon*/oc*_event_cnt")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
