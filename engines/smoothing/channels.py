"""Measurements for SmoothQuant: channel maxima, and held-back rows of activations."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from tap_deploy.bundle.variant import Variant
from tap_deploy.engines.calibration.collecting_session import CollectingSession
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.smoothing.smoothquant import smoothing_points
from tap_deploy.image import load_image
from tap_deploy.predictor import TapPredictor

HELD_BACK = 5  # every fifth picture is held back for rows; the others give the maxima
MAX_IMAGES = 80
_ROWS_PER_CALL = 16
_MAX_ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelRanges:
    """Measurements of one graph.

    Attributes:
        maxima: output of a LayerNormalization -> largest magnitude of each channel, float32 [C].
        rows: output of a LayerNormalization -> rows from held-back pictures, float32 [R, C].
    """

    maxima: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]


class ChannelSession(CollectingSession):
    """Collects channel maxima or sample rows instead of histograms, in bounded memory.

    Attributes:
        keep_rows: whether calls add rows instead of updating the maxima.
        maxima: tensor name -> largest magnitude of each channel, float32 [C].
    """

    def __init__(self, variant: Variant, graph: str, *, threads: int | None = None) -> None:
        super().__init__(variant, graph, _tensors_to_smooth, threads=threads)
        self.keep_rows = False
        self.maxima: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}

    @property
    def ranges(self) -> ChannelRanges:
        """Measurements of the tensors that have both maxima and rows."""
        known = self.maxima.keys() & self._rows.keys()
        return ChannelRanges(
            maxima={name: self.maxima[name] for name in sorted(known)},
            rows={name: np.concatenate(self._rows[name]) for name in sorted(known)},
        )

    def _count(self, name: str, values: np.ndarray) -> None:
        rows = values.reshape(-1, values.shape[-1])
        if not self.keep_rows:
            found = np.abs(rows).max(axis=0)
            self.maxima[name] = np.maximum(self.maxima.get(name, found), found)
            return
        kept = self._rows.setdefault(name, [])
        if sum(map(len, kept)) < _MAX_ROWS:
            places = np.linspace(0, len(rows) - 1, min(_ROWS_PER_CALL, len(rows))).astype(int)
            kept.append(rows[places].copy())


def measure_channels(
    variant: Variant,
    images: CalibrationImages,
    *,
    prompts: CalibrationPrompts | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, ChannelRanges]:
    """Run the fp32 graphs on calibration pictures and measure the smoothable activations.

    Args:
        variant: the fp32 graphs.
        images: calibration pictures; at most 80 are used. With a single picture there are no
            measurements, because none can be held back.
        prompts: source of the prompts; None for random prompts.
        threads: CPU threads; None for one per core.
        on_progress: called before each picture with pictures done and the total.

    Returns:
        Graph name -> measurements.

    Raises:
        InputError: a picture cannot be read.
        SessionError: a graph fails to run.
    """
    prompts = CalibrationPrompts() if prompts is None else prompts
    count = min(len(images), MAX_IMAGES)
    held_back = set(range(HELD_BACK - 1, count, HELD_BACK)) or {count - 1}
    done = itertools.count()
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in variant.specs:
            sessions[name] = ChannelSession(variant, name, threads=threads)
            stack.enter_context(sessions[name])
        predictor = TapPredictor(sessions, variant.config)
        for keep_rows in (False, True):
            for session in sessions.values():
                session.keep_rows = keep_rows
            for index in (i for i in range(count) if (i in held_back) == keep_rows):
                if on_progress is not None:
                    on_progress(next(done), count)
                _look_at(predictor, images, index, prompts)
    return {name: session.ranges for name, session in sessions.items()}


def _tensors_to_smooth(model: ir.Model) -> set[str]:
    return {point.tensor for point in smoothing_points(model)}


def _look_at(
    predictor: TapPredictor,
    images: CalibrationImages,
    index: int,
    prompts: CalibrationPrompts,
) -> None:
    path, digest = images.paths[index], images.digests[index]
    rgb = load_image(path, convert=True)
    height, width = rgb.shape[:2]
    encoded = predictor.encode(rgb)
    for part in prompts.for_image(path, digest, width=width, height=height):
        predictor.predict(encoded, prompts=part, masks="rle")  # runs the whole prompt decoder
