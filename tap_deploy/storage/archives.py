"""Reads NumPy ``.npz`` archives from untrusted sources."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.storage.regular_files import open_regular

LIMIT_BYTES = 1 << 30  # all arrays that are asked for; 200 000 concepts take 820 MB
# Compressed arrays of numbers and names are at least 2 % of their size.
MAX_EXPANSION = 50
SMALL_BYTES = 1 << 26  # small arrays may be all zeros


def arrays_from_npz(
    path: str | os.PathLike[str], names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of an ``.npz`` archive by name; pickled arrays are rejected.

    Sizes are compared before anything is unpacked: those in the directory of the archive with
    the limits, those in the header of each array with the directory.

    Raises:
        ValueError: the file is missing, corrupt or not an archive, or an array is missing, or they
            unpack to more than ``LIMIT_BYTES`` or ``MAX_EXPANSION`` times the size of the file; the
            message has one line.
    """
    try:
        with open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not an .npz archive, or truncated")
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                members = {name: archive.getinfo(f"{name}.npy") for name in names}
                _check_sizes(list(members.values()), size)
                return {name: _array(archive, member) for name, member in members.items()}
    # zipfile, zlib and NumPy raise many types on corrupt files.
    except Exception as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ValueError(" ".join(reason.split()) or type(exc).__name__) from exc


def _check_sizes(members: list[zipfile.ZipInfo], archive_bytes: int) -> None:
    """Check what the members unpack to; zipfile reads no more than the directory says."""
    if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members):
        raise ValueError("it is compressed in another way than NumPy's")
    total = sum(member.file_size for member in members)
    limit = min(LIMIT_BYTES, max(SMALL_BYTES, MAX_EXPANSION * archive_bytes))
    if total > limit:
        raise ValueError(
            f"its arrays unpack to {total} bytes; expected at most {limit} from {archive_bytes}"
        )


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(member) as file:
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            np.lib.format.read_magic(file), np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
        header_bytes = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects; expected numbers or text")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size + header_bytes != member.file_size or not dtype.itemsize:
        raise ValueError(
            f"{member.filename} is {dtype} {list(shape)}, which differs in size from its data"
        )
    with archive.open(member) as file:
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
