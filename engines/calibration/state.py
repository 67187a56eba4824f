"""The histograms of a calibration that is not finished, in a file: it can be interrupted."""

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
    """Keeps histograms beside a cache, between pictures.

    Attributes:
        path: the file; None keeps nothing.
        identity: what the histograms depend on; those of another calibration are not taken.
    """

    path: pathlib.Path | None
    identity: str
    _saved: float = dataclasses.field(default_factory=time.monotonic)

    def restore(self, histograms: Histograms) -> int:
        """Fill histograms in, and return how many pictures they have seen; 0 for a new start."""
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
            return 0  # nothing is lost but time
        for graph, tensors in found.items():
            for name, histogram in tensors.items():
                histograms[graph][name].copy_from(histogram)
        return done

    def save(self, histograms: Histograms, done: int, *, always: bool = False) -> None:
        """Write the file if the last time is a while ago.

        Raises:
            InputError: it cannot be written.
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
        """Delete the file: the calibration is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def identity(**parts: object) -> str:
    """Return one text for everything that a state depends on."""
    return json.dumps(parts, sort_keys=True, default=str)


def _read(arrays: Mapping[str, np.ndarray], prefix: str) -> MagnitudeHistogram:
    return MagnitudeHistogram.from_arrays(
        {key: arrays[f"{prefix}/{key}"] for key in ("counts", "numbers", "amax")}
    )
