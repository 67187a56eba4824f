"""Application of SmoothQuant to fp32 graphs: measurement, decision, and temporary files."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping

from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.bundle.manifest import GraphRecord
from tap_deploy.bundle.precision_record import SmoothingChoice
from tap_deploy.bundle.variant import Variant
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.smoothing.channels import ChannelRanges, measure_channels
from tap_deploy.engines.smoothing.smoothquant import Smoothing, choose_smoothings, fold
from tap_deploy.storage.unfinished import temporary_folder

AUTO, ON, OFF = "auto", "on", "off"
SMOOTHQUANT = (AUTO, ON, OFF)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedVariant:
    """fp32 graphs, some of them smoothed.

    Attributes:
        variant: the graphs, with new files for the smoothed ones.
        smoothings: graph name -> smoothings applied to it.
        choices: graph name -> decision and measurement for every smoothing point.
    """

    variant: Variant
    smoothings: dict[str, list[Smoothing]] = dataclasses.field(default_factory=dict)
    choices: dict[str, list[SmoothingChoice]] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def smoothed_variant(
    variant: Variant,
    images: CalibrationImages,
    mode: str,
    *,
    prompts: CalibrationPrompts | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[SmoothedVariant]:
    """Yield the graphs after SmoothQuant; the new files are deleted when the block ends.

    Args:
        variant: the fp32 graphs.
        images: calibration pictures; some are held back for the decision.
        mode: ``auto`` smooths where that lowers the error, ``on`` everywhere, ``off`` nowhere.
        prompts: source of the prompts; None for random prompts.
        threads: CPU threads; None for one per core.
        on_progress: called before each picture with pictures done and the total.

    Raises:
        InputError: a picture cannot be read.
        SessionError: a graph fails to run.
    """
    if mode == OFF:
        yield SmoothedVariant(variant=variant)
        return
    measured = measure_channels(
        variant, images, prompts=prompts, threads=threads, on_progress=on_progress
    )
    with temporary_folder() as folder:
        yield _smoothed(variant, measured, folder, always=mode == ON)


def _smoothed(
    variant: Variant,
    measured: Mapping[str, ChannelRanges],
    folder: pathlib.Path,
    *,
    always: bool,
) -> SmoothedVariant:
    """Choose smoothings, and write the graphs that have any below a folder."""
    found = SmoothedVariant(variant=variant)
    records: dict[str, GraphRecord] = {}
    for graph, ranges in measured.items():
        model = variant.load(graph)
        smoothings, found.choices[graph] = choose_smoothings(
            model, ranges.maxima, ranges.rows, always=always
        )
        if not smoothings:
            continue
        for smoothing in smoothings:
            fold(model, smoothing)
        found.smoothings[graph] = smoothings
        records[graph] = save_graph(model, variant.specs[graph], folder, f"{graph}.onnx")
    return dataclasses.replace(found, variant=variant.with_graphs(folder, records))
