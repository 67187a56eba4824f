"""Calibration and writing of a bundle's int8 graphs, with a record of how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tap_deploy.bundle.bundle import ONNX_FOLDER, Bundle
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.bundle.precision_record import (
    CalibrationRecord,
    Int8GraphRecord,
    PrecisionRecord,
    SmoothingChoice,
)
from tap_deploy.bundle.update import BundleAddition, bundle_addition
from tap_deploy.bundle.variant import Variant, variant_specs
from tap_deploy.engines.calibration.chain import OnProgress, calibrate
from tap_deploy.engines.calibration.pictures import FEW_IMAGES, CalibrationImages
from tap_deploy.engines.calibration.table import CalibrationTable, save_tables
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.engines.int8.deviation import record_deviation
from tap_deploy.engines.int8.options import QuantizeOptions
from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes, tensors_of_selection
from tap_deploy.engines.qdq.graph import qdq_from_ranges
from tap_deploy.engines.smoothing.smoothquant import Smoothing, fold
from tap_deploy.engines.verdict.record import EXCLUSIONS_FILE, VERDICT_PREFIX
from tap_deploy.errors import InputError
from tap_deploy.precisions import (
    FP16,
    FP32,
    INT8,
    INT8_FP32,
    VARIANT_DTYPES,
)
from tap_deploy.storage.json_files import read_json

RANGES_FILE = "calibration/ranges.json"
PICTURES_FILE = "calibration/pictures.json"
MADE_FROM = {INT8: FP16, INT8_FP32: FP32}


def require_room(bundle: Bundle, *, force: bool) -> None:
    """Check that int8 graphs may be written.

    Raises:
        InputError: the bundle has int8 graphs and ``force`` is off.
    """
    present = [variant for variant in _variants(bundle) if variant in bundle.manifest.graphs]
    if present and not force:
        raise InputError(
            f"bundle {bundle.path} has {' and '.join(present)}; pass --force to replace them"
        )


def find_ranges(
    variant: Variant,
    options: QuantizeOptions,
    images: CalibrationImages,
    selected: Mapping[str, ChosenNodes],
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, CalibrationTable]:
    """Calibrate the tensors that the selected nodes need; see ``calibrate``."""
    return calibrate(
        variant,
        images,
        method=options.method,
        samples=options.samples,
        prompts=options.prompts(),
        cache=options.cache,
        tensors=tensors_of_selection(variant, selected),
        force=options.force,
        threads=options.threads,
        on_progress=on_progress,
    )


def write_int8(
    bundle: Bundle,
    options: QuantizeOptions,
    tables: Mapping[str, CalibrationTable],
    selected: Mapping[str, ChosenNodes],
    *,
    images: CalibrationImages,
    smoothings: Mapping[str, Sequence[Smoothing]],
    choices: Mapping[str, Sequence[SmoothingChoice]],
    exclusions: Exclusions,
) -> None:
    """Write the int8 graphs of a bundle from calibrated ranges, and measure their deviation.

    Args:
        bundle: bundle to extend.
        options: options for the graphs and for the record.
        tables: graph name -> ranges, measured on the smoothed graphs.
        selected: graph name -> nodes to quantize.
        images: calibration pictures; recorded so that verdicts exclude them.
        smoothings: graph name -> smoothings to apply first.
        choices: graph name -> decisions at all smoothing points, for the record.
        exclusions: nodes and tensors that stay float, for the record.

    Raises:
        InputError: a node cannot be quantized, or the bundle cannot be written.
        BundleError: another process changed the source graphs or the int8 graphs.
        SessionError: onnxruntime cannot run the int8 graphs.
    """
    variants = _variants(bundle)
    sources = {FP32, *(MADE_FROM[variant] for variant in variants)}
    with bundle_addition(bundle, based_on=sources) as addition:
        addition.dropped = (VERDICT_PREFIX, EXCLUSIONS_FILE)
        ranges = addition.folder / RANGES_FILE
        ranges.parent.mkdir(parents=True)
        save_tables(ranges, tables)
        pictures = json.dumps({"sha256": list(images.digests)}, indent=1)
        (addition.folder / PICTURES_FILE).write_text(pictures + "\n", "utf-8")
        for variant in variants:
            _add_variant(bundle, addition, variant, options, tables, selected, smoothings)
            addition.precisions[variant] = PrecisionRecord(
                made_from=MADE_FROM[variant],
                reduce_range=options.reduce_range,
                calibration=_calibration_record(options, next(iter(tables.values()))),
                graphs={
                    name: Int8GraphRecord(quantized_nodes=p.nodes) for name, p in selected.items()
                },
                smoothquant={name: tuple(points) for name, points in choices.items() if points},
                excluded=dict(exclusions.entries),
            )
    record_deviation(bundle, threads=options.threads)


def pictures_calibrated_on(bundle: Bundle) -> set[str]:
    """Return the SHA-256 of every calibration picture of a bundle's int8 graphs.

    Raises:
        InputError: the list in the bundle cannot be read.
    """
    if PICTURES_FILE not in bundle.manifest.files:
        return set()
    path = bundle.path / PICTURES_FILE
    try:
        return set(read_json(path)["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{path} cannot be read: {exc}; quantize the bundle again") from exc


def _variants(bundle: Bundle) -> list[str]:
    return [v for v, source in MADE_FROM.items() if source in bundle.manifest.graphs]


def few_images_warning(count: int) -> str:
    """Return the warning about a calibration on few pictures."""
    return (
        f"{count} distinct calibration picture{'s' if count != 1 else ''}; ranges from fewer than "
        f"{FEW_IMAGES} are unreliable, use 500 or more"
    )


def _add_variant(
    bundle: Bundle,
    addition: BundleAddition,
    variant: str,
    options: QuantizeOptions,
    tables: Mapping[str, CalibrationTable],
    selected: Mapping[str, ChosenNodes],
    smoothings: Mapping[str, Sequence[Smoothing]],
) -> None:
    made_from = bundle.variant(MADE_FROM[variant])
    addition.graphs[variant] = {}
    for name, spec in variant_specs(bundle.config, variant).items():
        source = made_from.load(name)
        for smoothing in smoothings.get(name, ()):
            fold(source, smoothing)
        model = qdq_from_ranges(
            source,
            tables[name],
            selected[name],
            float_dtype=VARIANT_DTYPES[variant],
            for_cpu=variant == INT8_FP32,
            reduce_range=options.reduce_range,
        )
        file = f"{ONNX_FOLDER}/{variant}/{name}.onnx"
        addition.graphs[variant][name] = save_graph(model, spec, addition.folder, file)


def _calibration_record(options: QuantizeOptions, table: CalibrationTable) -> CalibrationRecord:
    return CalibrationRecord(
        method=table.method,
        num_samples=table.num_samples,
        data_fingerprint=table.data_fingerprint,
        own_prompts=options.prompts_file is not None,
        seed=options.seed,
        ranges=RANGES_FILE,
    )
