"""Whether graphs were verified on this machine, before a predictor uses them."""

from __future__ import annotations

import logging
import pathlib
import shlex
from collections.abc import Collection

from tap_deploy.errors import BundleError
from tap_deploy.hub_address import HubAddress
from tap_deploy.machine.state import machine_title
from tap_deploy.sessions.run_on import RunOn

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def check_verified(machines: Collection[str], run_on: RunOn, subject: str, bundle: str) -> None:
    """Warn, once in a process, about graphs that were never verified on this machine.

    Args:
        machines: names of the machines on which they passed, see ``machine_title``.
        run_on: what runs the graphs.
        subject: the graphs, for the message.
        bundle: path of the bundle.

    Raises:
        BundleError: they were not, and ``run_on`` requires it.
    """
    if machines and machine_title(on_cpu=run_on.on_cpu) in machines:
        return
    address = HubAddress.of_snapshot(pathlib.Path(bundle))
    # The results of tests are not kept in the cache of the model hub.
    copy = "" if address is None else f"tap-export fetch {address} -o DIR && "
    words = ["tap-export", "selftest", bundle if address is None else "DIR", *run_on.words]
    command = copy + shlex.join(words)
    message = f"{subject} was never verified on this machine; do so once with: {command}"
    if run_on.require_verified:
        raise BundleError(message)
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
