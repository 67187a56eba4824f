"""Control groups of Linux, by which containers are given a share of a machine."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from tap_deploy.machine.host import Host


def group_folders(host: Host, controller: str) -> Iterator[tuple[int, str]]:
    """Yield the folders where a controller says what this process may use, its own group first.

    Args:
        host: the machine.
        controller: ``cpu`` or ``memory``.

    Yields:
        The version of control groups, 1 or 2, and the folder. It need not exist.
    """
    groups = re.findall(r"^\d+:(.*):(/.*)$", host.text("/proc/self/cgroup") or "", re.MULTILINE)
    for controllers, path in groups:
        if controllers and controller not in controllers.split(","):
            continue
        version, root = (
            (1, f"/sys/fs/cgroup/{controller}") if controllers else (2, "/sys/fs/cgroup")
        )
        # A container may see its own group as the root, though its path is that outside.
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            yield version, f"{root}{group}"
