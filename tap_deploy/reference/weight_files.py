"""Readers and writers of the weight file formats: pickle, torch, safetensors.

Readers never execute code from the file and do not check its content otherwise. Writers take
tensors by name.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tap_deploy.errors import (
    CheckpointError,
    MissingDependencyError,
    UnsafeCheckpointError,
    first_line,
)
from tap_deploy.storage.regular_files import open_regular
from tap_deploy.storage.unpickle import load_pickle, printable, refusal

_ZIP_MAGIC = b"PK\x03\x04"
# Files of torch before 1.6 start with pickle protocol 2 and a ten-byte integer.
_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def detect_format(path: Path) -> str:
    """Return the format of a file, from its first bytes: ``pickle``, ``torch``, ``safetensors``.

    Raises:
        CheckpointError: the file cannot be opened, or is empty.
    """
    try:
        with open_regular(path) as file:
            head = file.read(16)
    except OSError as exc:
        raise CheckpointError(
            f"cannot read checkpoint {printable(path)}: {exc.strerror or printable(exc)}"
        ) from exc
    if not head:
        raise CheckpointError(f"checkpoint {printable(path)} is empty: download it again")
    if head.startswith((_ZIP_MAGIC, _LEGACY_TORCH_MAGIC)):
        return "torch"
    # A safetensors file starts with the length of a JSON object (8 bytes) and the object.
    return "safetensors" if head[8:9] == b"{" else "pickle"


def read_torch(path: Path) -> Any:
    """Read a file of ``torch.save``; tensors in a zip archive are memory-mapped.

    Raises:
        UnsafeCheckpointError: the file asks for more than tensors and plain containers.
        CheckpointError: the file is corrupt, or another kind of zip archive.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickle protocols
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            with path.open("rb") as file:  # with the path, torch would read safetensors
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        found = _REFUSED_GLOBAL.search(str(exc))
        what = printable(found[1]) if found else "an instruction that weights do not need"
        raise UnsafeCheckpointError(refusal(what, printable(path), "tensors")) from exc
    except Exception as exc:  # torch raises anything on corrupt files
        reason = printable(first_line(exc))
        raise CheckpointError(
            f"{printable(path)} is not a complete torch file ({reason}); download it again"
        ) from exc


def _check_zip(path: Path) -> None:
    """Verify the checksums, which torch skips for memory-mapped files."""
    with zipfile.ZipFile(path) as archive:
        # torch stores records uncompressed; a compressed one could expand to any size.
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records overlap")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed; expected a file of torch.save")
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"record {broken} has a wrong checksum")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is corrupt.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors_torch = _import_safetensors()
    try:
        tensors: dict[str, torch.Tensor] = safetensors_torch.load_file(path)
    except Exception as exc:  # SafetensorError, or an error of torch on a corrupt header
        raise CheckpointError(
            f"{printable(path)} is not a complete safetensors file ({printable(exc)}); "
            "download it again"
        ) from exc
    return tensors


def write_pickle(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write the official format: a pickled dict of NumPy arrays."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    with path.open("wb") as file:
        # Protocol 5 writes arrays directly from their memory; older protocols copy them first.
        pickle.dump(arrays, file, protocol=5)


def write_torch(state: dict[str, Any], path: Path) -> None:
    """Write a torch state dict, or another dict of tensors and plain values.

    Raises:
        OSError: the file cannot be written; ``torch.save`` alone raises a RuntimeError about its
            own positions.
    """
    with _Writer(io.FileIO(path, "w")) as file:
        try:
            torch.save(state, file)
        except RuntimeError as exc:
            if file.error is None:
                raise
            raise file.error from exc


class _Writer(io.BufferedWriter):
    """Keeps the error of a write, which torch replaces with its own."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as exc:
            self.error = exc
            raise


def write_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        CheckpointError: the file cannot be written, or two entries share memory.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors_torch = _import_safetensors()
    try:
        safetensors_torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    except Exception as exc:  # SafetensorError, which is imported lazily
        reason = printable(first_line(exc))
        raise CheckpointError(f"cannot write {printable(path)}: {reason}") from exc


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as exc:
        raise MissingDependencyError(
            "safetensors is not installed; run pip install 'tap-deploy[export]'"
        ) from exc
    return safetensors.torch


READERS: dict[str, Callable[[Path], Any]] = {
    "pickle": load_pickle,
    "torch": read_torch,
    "safetensors": read_safetensors,
}
WRITERS: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    ".pkl": write_pickle,
    ".pth": write_torch,
    ".pt": write_torch,
    ".safetensors": write_safetensors,
}
