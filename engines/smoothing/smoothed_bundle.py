"""Application of SmoothQuant to a bundle: measurement, decision, and a temporary bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir as ir

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.bundle.manifest import GraphRecord
from tap_deploy.bundle.precision_record import SmoothingChoice
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.smoothing.channels import measure_channels
from tap_deploy.engines.smoothing.smoothquant import (
    Smoothing,
    choose_smoothings,
    fold,
)
from tap_deploy.precisions import FP32

AUTO, ON, OFF = "auto", "on", "off"
SMOOTHQUANT = (AUTO, ON, OFF)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedBundle:
    """A bundle with smoothed fp32 graphs.

    Attributes:
        bundle: the original bundle if nothing was smoothed; otherwise a temporary bundle with fp32
            graphs only.
        smoothings: graph name -> smoothings applied to it.
        choices: graph name -> decision and measurement for every smoothing point.
    """

    bundle: Bundle
    smoothings: dict[str, list[Smoothing]] = dataclasses.field(default_factory=dict)
    choices: dict[str, list[SmoothingChoice]] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def smoothed_bundle(
    bundle: Bundle,
    images: CalibrationImages,
    mode: str,
    *,
    prompts: CalibrationPrompts | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[SmoothedBundle]:
    """Yield a temporary bundle with smoothed fp32 graphs, deleted when the block ends.

    Args:
        bundle: bundle with the fp32 graphs.
        images: calibration pictures; some are held back for the decision.
        mode: ``auto`` smooths where that lowers the error, ``on`` everywhere, ``off`` nowhere.
        prompts: source of the prompts; None for random prompts.
        threads: CPU threads; None for one per core.
        on_progress: called before each picture with pictures done and the total.

    Raises:
        InputError: a picture cannot be read.
        SessionError: a graph fails to run.
    """
    found = SmoothedBundle(bundle=bundle)
    if mode == OFF:
        yield found
        return
    measured = measure_channels(
        bundle, images, prompts=prompts, threads=threads, on_progress=on_progress
    )
    for name, ranges in measured.items():
        smoothings, found.choices[name] = choose_smoothings(
            load_graph(bundle.graph_path(name, FP32)), ranges.maxima, ranges.rows, always=mode == ON
        )
        if smoothings:
            found.smoothings[name] = smoothings
    if not found.smoothings:
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        stand_in = _stand_in(bundle, found.smoothings, pathlib.Path(folder))
        yield dataclasses.replace(found, bundle=stand_in)


def _stand_in(
    bundle: Bundle, smoothings: Mapping[str, Sequence[Smoothing]], folder: pathlib.Path
) -> Bundle:
    """Return a bundle with smoothed fp32 graphs; unsmoothed ones are symlinks to the original."""
    for name, record in bundle.manifest.graphs[FP32].items():
        target = folder / record.file
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in smoothings:
            _save_smoothed(bundle.graph_path(name, FP32), smoothings[name], target, record)
            continue
        for file in record.files:
            (folder / file).symlink_to((bundle.path / file).resolve())
    return Bundle(folder, bundle.manifest)


def _save_smoothed(
    source: pathlib.Path,
    smoothings: Sequence[Smoothing],
    target: pathlib.Path,
    record: GraphRecord,
) -> None:
    model = load_graph(source)
    for smoothing in smoothings:
        fold(model, smoothing)
    ir.save(model, target, external_data=f"{target.name}.data" if record.external_data else None)
