"""Calibration of the three graphs on real pictures.

The graphs run in a chain, because each one's inputs come from the previous one: pictures go through
the image encoder, its embeddings and prompts through the prompt decoder, its semantic tokens and
the generated tokens through the text decoder. A ``TapPredictor`` runs the chain.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from tap_deploy.bundle.variant import Variant
from tap_deploy.engines.calibration.collecting_session import CollectingSession
from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.calibration.state import CalibrationState, identity
from tap_deploy.engines.calibration.table import CalibrationTable, load_tables, save_tables
from tap_deploy.engines.calibration.thresholds import threshold
from tap_deploy.errors import InputError, SessionError
from tap_deploy.image import load_image
from tap_deploy.precisions import CALIBRATION_METHODS, DEFAULT_CALIBRATION_METHOD
from tap_deploy.predictor import TapPredictor
from tap_deploy.storage.files import check_file_output

STATE_SUFFIX = ".state.npz"
# Working memory of a graph call, without the tapped tensors.
MEMORY_LIMIT_BYTES = 512 << 20

OnProgress = Callable[[int, int], None]
Tensors = Mapping[str, set[str]]  # graph -> names


def calibrate(
    variant: Variant,
    images: CalibrationImages,
    *,
    tensors: Tensors,
    method: str = DEFAULT_CALIBRATION_METHOD,
    samples: int = 500,
    prompts: CalibrationPrompts | None = None,
    cache: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, CalibrationTable]:
    """Calibrate the activations of the fp32 graphs.

    Makes one pass over the pictures with one histogram per tensor, so that memory does not grow
    with the number of pictures. With a calibration cache, the histograms are saved next to it
    regularly, and an interrupted calibration resumes from them.

    Args:
        variant: the fp32 graphs.
        images: calibration pictures.
        tensors: graph name -> tensor names. Graphs without an entry run but are not calibrated.
        method: method that chooses the ranges, one of ``precisions.CALIBRATION_METHODS``.
        samples: maximum number of pictures, from the first on.
        prompts: source of the prompts; None for random prompts.
        cache: calibration cache, a JSON file with the tables; used if it exists and is current.
        force: replace a stale calibration cache.
        threads: CPU threads; None for one per core.
        on_progress: called with pictures done and the total.

    Returns:
        Graph name -> table.

    Raises:
        InputError: invalid argument, unreadable picture, stale cache, or NaN or infinity in a
            tensor.
        SessionError: a graph fails to run.
    """
    if method not in CALIBRATION_METHODS:
        raise InputError(
            f"unknown method {method!r}; expected one of {', '.join(CALIBRATION_METHODS)}"
        )
    prompts = CalibrationPrompts() if prompts is None else prompts
    images = images.first(samples)
    digests = {name: _digest(variant.digests(name)) for name in variant.specs}
    fingerprint = hashlib.sha256(f"{images.fingerprint}:{prompts.fingerprint}".encode()).hexdigest()
    cache = None if cache is None else pathlib.Path(cache)
    if cache is not None:
        check_file_output(cache, force=True)  # fail before the long calibration
    if cache is not None and cache.exists():
        tables = load_tables(cache)  # raises for a file that is not a cache, even with force
        try:
            return _fitting(cache, tables, tensors, method, digests, fingerprint)
        except InputError:
            if not force:
                raise
    state = CalibrationState(
        path=None if cache is None else cache.with_name(cache.name + STATE_SUFFIX),
        identity=identity(
            digests=digests, data=fingerprint, tensors={g: sorted(t) for g, t in tensors.items()}
        ),
    )
    histograms = collect(variant, images, prompts, tensors, state, threads, on_progress)
    tables = {
        graph: CalibrationTable(
            graph=graph,
            method=method,
            ranges={name: _amax(graph, name, h, method) for name, h in found.items()},
            onnx_sha256=digests[graph],
            data_fingerprint=fingerprint,
            num_samples=len(images),
        )
        for graph, found in histograms.items()
    }
    if cache is not None:
        save_tables(cache, tables)
    state.remove()
    return tables


def collect(
    variant: Variant,
    images: CalibrationImages,
    prompts: CalibrationPrompts,
    tensors: Tensors,
    state: CalibrationState,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, dict[str, MagnitudeHistogram]]:
    """Run the chain on all pictures and return graph name -> tensor name -> histogram."""
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in variant.specs:
            sessions[name] = CollectingSession(
                variant, name, tensors.get(name, set()), threads=threads
            )
            stack.enter_context(sessions[name])
        histograms = {name: sessions[name].histograms for name in sessions if name in tensors}
        done = state.restore(histograms)
        predictor = TapPredictor(sessions, variant.config, memory_limit_bytes=MEMORY_LIMIT_BYTES)
        for index in range(done, len(images)):
            if on_progress is not None:
                on_progress(index, len(images))
            _look_at(predictor, images.paths[index], images.digests[index], prompts)
            state.save(histograms, index + 1)
    if on_progress is not None:
        on_progress(len(images), len(images))
    return histograms


def _look_at(
    predictor: TapPredictor, path: pathlib.Path, digest: str, prompts: CalibrationPrompts
) -> None:
    """Run the predictor on a picture with its prompts."""
    rgb = load_image(path, convert=True)
    parts = prompts.for_image(path, digest, width=rgb.shape[1], height=rgb.shape[0])
    encoded = predictor.encode(rgb)
    for part in parts:
        predictor.predict(encoded, prompts=part, masks="rle")  # runs the whole prompt decoder


def _amax(graph: str, name: str, histogram: MagnitudeHistogram, method: str) -> float:
    if histogram.bad_values:
        raise InputError(
            f"calibration of {graph}: {name} holds NaN or infinity ({histogram.bad_values} "
            "values); the weights are broken, export them again"
        )
    if histogram.total == 0:
        raise SessionError(f"calibration of {graph}: nothing reached {name}; pass more pictures")
    return threshold(histogram, method)


def _fitting(
    cache: pathlib.Path,
    tables: Mapping[str, CalibrationTable],
    tensors: Tensors,
    method: str,
    digests: Mapping[str, str],
    fingerprint: str,
) -> dict[str, CalibrationTable]:
    for graph, names in tensors.items():
        if graph not in tables:
            raise InputError(
                f"calibration cache {cache} is stale: it has no {graph}; delete it, or pass "
                "--force to calibrate again"
            )
        tables[graph].require(
            method=method,
            onnx_sha256=digests[graph],
            data_fingerprint=fingerprint,
            tensors=names,
        )
    return {graph: tables[graph] for graph in tensors}


def _digest(digests: Sequence[str]) -> str:
    """Return one digest for the files of a graph; of a single file, its own."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
