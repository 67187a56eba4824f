"""Linux control groups, which limit the CPUs and the memory of containers."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from tap_deploy.machine.host import Host


def group_folders(host: Host, controller: str) -> Iterator[tuple[int, str]]:
    """Yield the control group folders that limit this process, its own group first.

    Args:
        host: the machine.
        controller: ``cpu`` or ``memory``.

    Yields:
        The cgroup version, 1 or 2, and the folder, which may not exist.
    """
    groups = re.findall(r"^\d+:(.*):(/.*)$", host.text("/proc/self/cgroup") or "", re.MULTILINE)
    for controllers, path in groups:
        if controllers and controller not in controllers.split(","):
            continue
        version, root = (
            (1, f"/sys/fs/cgroup/{controller}") if controllers else (2, "/sys/fs/cgroup")
        )
        # In a container, the group may be mounted as the root although its path is the host's.
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            yield version, f"{root}{group}"
