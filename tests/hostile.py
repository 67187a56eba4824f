"""Hostile inputs: how tests make them, and run what reads them under limits."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import signal
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from click.testing import Result

from tap_deploy.bundle.manifest import FileRecord

PATIENCE_SECONDS = 30


@contextlib.contextmanager
def patience(seconds: int = PATIENCE_SECONDS) -> Iterator[None]:
    """Fail a block that hangs; for the main thread, and code that returns to Python."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"it hangs: nothing after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def law_broken(result: Result) -> str | None:
    """Return what a command did that none may do, whatever its input; None if nothing."""
    if result.exit_code not in (0, 1, 2, 130):
        return f"exit code {result.exit_code}"
    if "Traceback" in result.stderr or "internal error" in result.stderr:
        return result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exit_code == 2 and len(lines) != 1:
        return f"{len(lines)} lines of error for exit code 2: {result.stderr[-500:]}"
    return None


def edit_manifest(folder: pathlib.Path, change: Callable[[Any], Any]) -> None:
    """Change the manifest of a bundle in place."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), "utf-8")


def list_again(folder: pathlib.Path, *names: str) -> None:
    """Bring the records of files up to date, as who makes a hostile bundle would."""

    def change(manifest: Any) -> None:
        for name in names:
            record = FileRecord.of(folder / name)
            manifest["files"][name] = {"size_bytes": record.size_bytes, "sha256": record.sha256}

    edit_manifest(folder, change)


def npz_of(path: pathlib.Path, **members: bytes) -> pathlib.Path:
    """Write a compressed archive with these members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of an array, without its data."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()
