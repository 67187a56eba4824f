"""Addition of fp16 graphs to a bundle: measure, choose islands, convert, verify, write."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from tap_deploy.bundle.bundle import ONNX_FOLDER, Bundle
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.bundle.json_record import record_from_json
from tap_deploy.bundle.manifest import GraphRecord
from tap_deploy.bundle.precision_record import (
    Fp16GraphRecord,
    IslandRecord,
    LargestActivation,
    PrecisionRecord,
    SampleRecord,
    VerificationRecord,
)
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.bundle.variant import variant_specs
from tap_deploy.engines.calibration.maxima import RangeSession
from tap_deploy.engines.fp16.islands import (
    OVERFLOW_LIMIT,
    SCORE_LIMIT,
    Island,
    choose_islands,
    weight_report,
)
from tap_deploy.engines.fp16.rounding import load_rounding
from tap_deploy.engines.fp16.samples import (
    SampleInputs,
    find_samples,
    golden_inputs,
    read_samples,
    run_sample,
)
from tap_deploy.engines.fp16.typed import half_from_single
from tap_deploy.errors import InputError, VerificationError
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.precisions import FP16, FP32
from tap_deploy.verify.comparison import Report
from tap_deploy.verify.graph_check import verify_sessions

MaxAbs = Mapping[str, float]
OnStage = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp16Graphs:
    """The fp16 graphs that were added to a bundle.

    Attributes:
        islands: graph name -> name of an fp32 node -> island.
        report: comparisons with the golden samples.
        record: record of fp16 in the manifest.
    """

    islands: Mapping[str, Mapping[str, Island]]
    report: Report
    record: PrecisionRecord


def num_stages(pictures: Sequence[pathlib.Path]) -> int:
    """Return the maximum number of ``on_stage`` calls for these pictures and folders."""
    return 1 + sum(map(len, find_samples(pictures))) + len(GRAPH_NAMES) + 1


def add_fp16(
    bundle: Bundle,
    *,
    pictures: Sequence[pathlib.Path] = (),
    strict: bool = False,
    force: bool = False,
    threads: int | None = None,
    on_stage: OnStage | None = None,
) -> Fp16Graphs:
    """Convert the fp32 graphs of a bundle to fp16, and add the result to the bundle.

    Args:
        bundle: bundle to extend with the graphs and their record.
        pictures: files and folders to measure activations on, in addition to the golden samples.
        strict: raise for an unreadable picture in a folder instead of skipping it.
        force: replace existing fp16 graphs.
        threads: CPU threads of onnxruntime; None for one per core.
        on_stage: called with the name of each stage before it starts.

    Raises:
        InputError: the bundle has fp16 graphs and ``force`` is off, or a picture cannot be read.
        BundleError: the bundle lacks golden samples or fp32 graphs, or another process changed its
            fp32 or fp16 graphs meanwhile.
        VerificationError: an output exceeds the range of fp16, or the fp16 graphs differ too much
            from the reference; the bundle is unchanged.
        MissingDependencyError: onnxruntime is not installed.
    """
    say = on_stage if on_stage is not None else lambda text: None
    if FP16 in bundle.manifest.graphs and not force:
        raise InputError(f"bundle {bundle.path} has fp16 graphs; pass --force to replace them")
    samples = [*golden_inputs(bundle), *read_samples(pictures, bundle.config, strict=strict)]
    max_abs = measure(bundle, samples, threads=threads, on_stage=say)
    _check_outputs(bundle, max_abs)
    fp32 = bundle.variant(FP32)
    with bundle_addition(bundle, based_on=(FP32,)) as addition:
        graphs, islands, converted = {}, {}, {}
        for name, spec in variant_specs(bundle.config, FP16).items():
            say(f"convert {name}")
            model = fp32.load(name)
            islands[name] = choose_islands(model, max_abs[name])
            largest = _largest_activation(model, islands[name], max_abs[name])
            weights = weight_report(model, islands[name])
            half_from_single(model, spec, islands[name])
            file = f"{ONNX_FOLDER}/{FP16}/{name}.onnx"
            graphs[name] = save_graph(model, spec, addition.folder, file)
            converted[name] = Fp16GraphRecord(
                islands=_island_records(islands[name]),
                largest_fp16_activation=largest,
                weights=weights,
                casts=graphs[name].op_types.get("Cast", 0),
            )
        say("compare with the reference")
        report = _verify(bundle, addition.folder, graphs, threads)
        report.require("the fp16 graphs differ from the reference and were not added")
        record = _record(samples, converted, report)
        addition.graphs[FP16] = graphs
        addition.precisions[FP16] = record
    return Fp16Graphs(islands=islands, report=report, record=record)


def measure(
    bundle: Bundle,
    samples: Sequence[SampleInputs],
    *,
    threads: int | None = None,
    on_stage: OnStage | None = None,
) -> dict[str, MaxAbs]:
    """Measure the largest magnitude of every float tensor of the fp32 graphs on samples.

    Args:
        bundle: bundle with fp32 graphs.
        samples: samples to run, from picture to caption.
        threads: CPU threads; None for one per core.
        on_stage: called with the name of each sample before it runs.

    Returns:
        Graph name -> tensor name -> largest magnitude.

    Raises:
        VerificationError: an fp32 output is not finite.
    """
    fp32 = bundle.variant(FP32)
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in fp32.specs:
            sessions[name] = RangeSession(fp32, name, threads=threads)
            stack.enter_context(sessions[name])
        for sample in samples:
            if on_stage is not None:
                on_stage(f"measure {sample.name}")
            run_sample(sessions, bundle.config, sample)
    return {name: session.max_abs for name, session in sessions.items()}


def _check_outputs(bundle: Bundle, max_abs: Mapping[str, MaxAbs]) -> None:
    """Check that graph outputs fit in fp16; islands do not help, because outputs are fp16.

    Raises:
        VerificationError: an output is too large.
    """
    for name, spec in variant_specs(bundle.config, FP16).items():
        for tensor in spec.outputs:
            largest = max_abs[name].get(tensor.name, 0.0)
            if largest > OVERFLOW_LIMIT:
                raise VerificationError(
                    f"{name} output {tensor.name} reaches {largest:.3g} on a sample; expected at "
                    f"most {OVERFLOW_LIMIT:.0f}, half the fp16 limit; use fp32 for this model"
                )


def _largest_activation(
    model: ir.Model, islands: Mapping[str, Island], max_abs: MaxAbs
) -> LargestActivation:
    """Return the largest activation of an fp32 graph outside its islands."""
    outside = {
        str(value.name): max_abs.get(str(value.name), 0.0)
        for node in model.graph
        if node.name not in islands
        for value in node.outputs
    }
    largest = max(outside, key=lambda name: outside[name], default="")
    return LargestActivation(tensor=largest, max_abs=outside.get(largest, 0.0))


def _island_records(islands: Mapping[str, Island]) -> tuple[IslandRecord, ...]:
    return tuple(
        IslandRecord(
            node=island.node,
            op_type=island.op_type,
            reason=island.reason.value,
            max_abs=island.max_abs,
        )
        for island in islands.values()
    )


def _verify(
    bundle: Bundle,
    folder: pathlib.Path,
    graphs: Mapping[str, GraphRecord],
    threads: int | None,
) -> Report:
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(
                load_rounding(folder / graphs[name].file, spec, threads=threads)
            )
            for name, spec in variant_specs(bundle.config, FP16).items()
        }
        return verify_sessions(
            sessions,
            bundle.config,
            [bundle.golden()],
            backend="onnxruntime",
            precision=FP16,
        )


def _record(
    samples: Sequence[SampleInputs], graphs: Mapping[str, Fp16GraphRecord], report: Report
) -> PrecisionRecord:
    return PrecisionRecord(
        made_from=FP32,
        overflow_limit=OVERFLOW_LIMIT,
        score_limit=SCORE_LIMIT,
        samples=tuple(
            SampleRecord(name=sample.name, prompts=len(sample.point_labels)) for sample in samples
        ),
        graphs=dict(graphs),
        verification=record_from_json(VerificationRecord, report.to_dict()),
    )
