"""On-disk state of an unfinished calibration, so that it can resume after an interruption."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.storage.files import atomic_file

Histograms = Mapping[str, Mapping[str, MagnitudeHistogram]]  # graph -> tensor -> histogram
SAVE_INTERVAL_SECONDS = 30.0


@dataclasses.dataclass(kw_only=True)
class CalibrationState:
    """Saves and restores the histograms of a calibration.

    Attributes:
        path: the state file; None to save nothing.
        identity: identifier of everything that the histograms depend on; a state with another
            identity is ignored.
    """

    path: pathlib.Path | None
    identity: str
    _saved: float = dataclasses.field(default_factory=time.monotonic)

    def restore(self, histograms: Histograms) -> int:
        """Restore the histograms and return how many pictures they cover, 0 without a state."""
        if self.path is None or not self.path.is_file():
            return 0
        try:
            with np.load(self.path) as arrays:
                if str(arrays["identity"]) != self.identity:
                    return 0
                found = {
                    graph: {name: _read(arrays, f"{graph}/{name}") for name in tensors}
                    for graph, tensors in histograms.items()
                }
                done = int(arrays["done"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return 0  # start over with an unreadable state
        for graph, tensors in found.items():
            for name, histogram in tensors.items():
                histograms[graph][name].copy_from(histogram)
        return done

    def save(self, histograms: Histograms, done: int, *, always: bool = False) -> None:
        """Write the file, at most once per ``SAVE_INTERVAL_SECONDS`` unless ``always``.

        Raises:
            InputError: the file cannot be written.
        """
        now = time.monotonic()
        if self.path is None or (not always and now - self._saved < SAVE_INTERVAL_SECONDS):
            return
        arrays: dict[str, Any] = {
            f"{graph}/{name}/{key}": array
            for graph, tensors in histograms.items()
            for name, histogram in tensors.items()
            for key, array in histogram.to_arrays().items()
        }
        arrays |= {"identity": np.array(self.identity), "done": np.array(done)}
        with atomic_file(self.path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file, once the calibration is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def identity(**parts: object) -> str:
    """Return the identity of a state as JSON text."""
    return json.dumps(parts, sort_keys=True, default=str)


def _read(arrays: Mapping[str, np.ndarray], prefix: str) -> MagnitudeHistogram:
    return MagnitudeHistogram.from_arrays(
        {key: arrays[f"{prefix}/{key}"] for key in ("counts", "numbers", "amax")}
    )
