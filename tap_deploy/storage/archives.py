"""Archives: NumPy's ``.npz`` files, read without trust."""

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
    """Read arrays of an ``.npz`` archive by name; pickled ones are refused.

    Raises:
        ValueError: the file is missing, broken or no archive, an array is missing or does not
            fit into memory; the message is one line.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("no .npz archive, or cut short")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
    # NumPy, zipfile and zlib raise a dozen kinds on broken files; a MemoryError comes from a
    # shape that is declared but not there.
    except Exception as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ValueError(" ".join(reason.split()) or type(exc).__name__) from exc
