"""The folder for what backends compile on this machine."""

from __future__ import annotations

import functools
import logging
import os
import pathlib

logger = logging.getLogger(__name__)


def default_cache_folder() -> pathlib.Path | None:
    """Return the default cache folder in the user's home; None for a user without a home.

    There is no fallback to a shared folder: the cached code is executed, and other users could
    write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return pathlib.Path(base or pathlib.Path.home() / ".cache") / "tap_deploy"
    except RuntimeError:  # no HOME and no passwd entry, as in some containers
        _warn_once()
        return None


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "compiled graphs are not cached, so every start is slow: this user has no home folder; "
        "set XDG_CACHE_HOME or DeviceOptions.cache_folder"
    )
