"""Reads NumPy ``.npz`` archives from untrusted sources."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def arrays_from_npz(
    path: str | os.PathLike[str], names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of an ``.npz`` archive by name; pickled arrays are rejected.

    Raises:
        ValueError: the file is missing, corrupt or not an archive, or an array is missing or does
            not fit into memory; the message has one line.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not an .npz archive, or truncated")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
    # NumPy, zipfile and zlib raise many types on corrupt files. A false shape in a header raises
    # MemoryError.
    except Exception as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ValueError(" ".join(reason.split()) or type(exc).__name__) from exc
