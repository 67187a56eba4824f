"""The first layer out of tolerance of a graph that failed its verification."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import Golden
from tap_deploy.cli.verify_options import VerifyOptions
from tap_deploy.console.extras import require_quantize_extra
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.precisions import FP32, INT8, INT8_BF16
from tap_deploy.sessions.run_on import ONNXRUNTIME, RunOn
from tap_deploy.verify.comparison import Comparison, Report
from tap_deploy.verify.graph_cases import graph_cases
from tap_deploy.verify.tolerances import FP32_TOLERANCES, Tolerance

if TYPE_CHECKING:
    from tap_deploy.engines.bisect.bisection import Bisection


def require_bisectable(run_on: RunOn, options: VerifyOptions) -> None:
    """Check, before a long job, that there is a graph to compare layers with.

    Raises:
        InputError: the graphs do not run as ONNX files, or fp32 graphs have no reference.
        MissingDependencyError: a package is not installed.
    """
    if run_on.backend != ONNXRUNTIME or not run_on.on_cpu:
        raise InputError(
            "--bisect runs graphs in onnxruntime on the CPU; got another backend or device; "
            "Polygraphy compares layers of TensorRT: tap-export inspect BUNDLE --polygraphy DIR"
        )
    if run_on.precision == FP32 and not options.needs_torch:
        raise InputError(
            "--bisect of fp32 graphs needs PyTorch, which exports graphs to compare with; pass "
            "--against reference or --checkpoint FILE"
        )
    require_quantize_extra()


def bisect_failed_graph(
    bundle: Bundle, run_on: RunOn, options: VerifyOptions, report: Report, golden: Golden
) -> dict[str, Any] | None:
    """Return the first layer out of tolerance of the first graph that failed on its own.

    Args:
        bundle: an opened bundle.
        run_on: what ran the graphs; only its precision and threads are used.
        options: where the reference comes from.
        report: the comparisons.
        golden: inputs of the graphs.

    Returns:
        JSON types; None if every graph is within tolerance on its own.
    """
    failed = [check for check in report.checks if not check.passed and not check.is_chained]
    found = next((c for name in graphs.GRAPH_NAMES for c in failed if c.graph == name), None)
    if found is None:
        return None
    variant = bundle.variant(run_on.variant)
    record = bundle.manifest.precision_record(run_on.variant)
    smoothed = (record.smoothquant or {}).get(found.graph, ())
    with _reference(bundle, options, found.graph) as reference:
        from tap_deploy.engines.bisect.bisect import first_divergence

        cases = graph_cases(variant, found.graph, golden, FP32_TOLERANCES)
        with stage_bar("bisect", 1) as stage:
            stage(found.graph)
            bisection = first_divergence(
                variant.path(found.graph),
                reference,
                [case.inputs for case in cases],
                _tolerance(found, run_on.precision),
                rescaled=[choice.norm for choice in smoothed if choice.kept],
                threads=run_on.threads,
            )
    return _values(found, bisection)


@contextlib.contextmanager
def _reference(bundle: Bundle, options: VerifyOptions, graph: str) -> Iterator[pathlib.Path]:
    """Yield an fp32 graph: that of the bundle, or one that is exported from the checkpoint."""
    if not options.needs_torch:
        yield bundle.variant(FP32).path(graph)
        return
    model = options.model(bundle)
    from tap_deploy.export.bundle_export import export_graphs

    with tempfile.TemporaryDirectory(prefix="tap-export-") as folder:
        records = export_graphs(model, pathlib.Path(folder), lambda text: None)
        yield pathlib.Path(folder) / records[graph].file


def _tolerance(check: Comparison, precision: str) -> Tolerance:
    """Return the tolerance of the output for every layer; in int8, three times its mean error.

    A tensor inside a quantized graph errs by more than the output, where errors average out.
    """
    if precision in (INT8, INT8_BF16) and check.mean_tolerance is not None:
        return Tolerance(max=1.0, mean=3 * check.mean_tolerance, relative=True)
    return Tolerance(max=check.tolerance, mean=check.mean_tolerance, relative=check.relative)


def _values(failed: Comparison, bisection: Bisection) -> dict[str, Any]:
    divergence = bisection.divergence
    if divergence is None:
        return {
            "graph": failed.graph,
            "node": "",
            "op_type": "",
            "tensor": failed.tensor,
            "error": None,
            "tolerance": failed.tolerance,
            "sentence": str(bisection),
        }
    layer = divergence.layer
    return {
        "graph": divergence.graph,
        "node": layer.node,
        "op_type": layer.op_type,
        "tensor": layer.tensor,
        "error": layer.to_dict()["max_rel"],
        "tolerance": failed.tolerance,
        "sentence": str(divergence),
    }
