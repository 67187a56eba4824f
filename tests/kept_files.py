"""Files that take long to make are kept in pytest's cache until what made them changes."""

from __future__ import annotations

import concurrent.futures
import fcntl
import importlib.metadata
import json
import multiprocessing
import pathlib
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable

from tap_deploy.storage.files import sha256_of_file

ENTRY = "entry"
CONTENT = "content"
RECORD = "made_from.json"
OURS = ("tap_deploy", "benchmarks", "tests")
Make = Callable[[pathlib.Path], Iterable[pathlib.Path]]


def copy_kept(cache: pathlib.Path, make: Make, target: pathlib.Path) -> None:
    """Copy the folder that ``make`` makes; it is made if there is none, or one out of date.

    It is out of date when a source file of the project that was loaded to make it, a data file
    or an installed package has changed. Of several processes one makes it, the others wait.

    Args:
        cache: a folder for the files of this ``make`` alone.
        make: a function of a module, called in a process of its own: what it loads is what it
            needs. It creates the folder it is given, and returns the data files that it read.
        target: where the copy goes; tests may do to it what they like.
    """
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entry = cache / ENTRY
        if not _is_current(entry):
            for old in cache.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            new = pathlib.Path(tempfile.mkdtemp(dir=cache))
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                pool.submit(_make, make, new, time.time()).result()
            new.rename(entry)
        shutil.copytree(entry / CONTENT, target)


def _is_current(entry: pathlib.Path) -> bool:
    try:
        record = json.loads((entry / RECORD).read_text("utf-8"))
        return record["versions"] == _versions() and all(
            sha256_of_file(file) == digest for file, digest in record["files"].items()
        )
    except FileNotFoundError:
        return False


def _versions() -> dict[str, str]:
    packages = importlib.metadata.distributions()
    return {"python": platform.python_version(), **{each.name: each.version for each in packages}}


def _make(make: Make, folder: pathlib.Path, started: float) -> None:
    warnings.simplefilter("error")  # as in the tests
    data = make(folder / CONTENT)
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] in OURS]
    sources = [pathlib.Path(module.__file__) for module in modules if module.__file__]
    files = sorted({*data, *sources})
    record = {
        "versions": _versions(),
        "files": {str(file): sha256_of_file(file) for file in files},
    }
    # A file that was edited meanwhile may have been read before that: without a record, the next
    # process makes all of it again.
    if all(file.stat().st_mtime < started for file in files):
        (folder / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
