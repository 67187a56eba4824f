"""The timing cache: what the builder measured of its kernels, kept for the next build.

It belongs to one TensorRT version and one GPU. It makes builds shorter and repeatable; it is not a
calibration cache, and it changes no number.
"""

from __future__ import annotations

import pathlib
from typing import Any

from tap_deploy.storage.files import atomic_file
from tap_deploy.storage.folder_lock import locked_folder


def attach_timing_cache(config: Any, path: pathlib.Path) -> str | None:
    """Attach the cache in a file, or an empty one, to a builder config.

    Returns:
        why the file could not be used, if it is there and could not.
    """
    cache, problem = None, None
    if path.is_file():
        cache = config.create_timing_cache(path.read_bytes())
        if cache is None or not config.set_timing_cache(cache, False):
            cache, problem = None, f"timing cache {path} is damaged or of another GPU or version"
    if cache is None:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return problem


def save_timing_cache(config: Any, path: pathlib.Path) -> None:
    """Write what the cache of a config has learnt, whole or not at all.

    What another build has added to the file since it was attached stays in it.

    Raises:
        InputError: the file cannot be written, or another process holds its folder.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return
    with locked_folder(path.parent):
        found = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
        if found is not None:
            cache.combine(found, False)  # refuses one of another GPU or version
        with atomic_file(path) as partial:
            partial.write_bytes(bytes(cache.serialize()))
