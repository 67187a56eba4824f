"""Measurement of a bundle's int8 graphs, and the verdict on them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.verdict.agreement import Case, ReferenceAnswers
from tap_deploy.engines.verdict.kernels import (
    KernelCount,
    LayerCount,
    kernels_in_onnxruntime,
    layers_in_engine,
    layers_in_openvino,
)
from tap_deploy.engines.verdict.speed import (
    OtherRuntime,
    SpeedInputs,
    SpeedOptions,
    measure_graphs,
    measure_whole,
)
from tap_deploy.engines.verdict.tally import Agreement
from tap_deploy.engines.verdict.verdict import (
    FLOAT,
    MIN_CALIBRATION_PICTURES,
    Floors,
    GraphFacts,
    GraphVerdict,
    Verdict,
    graph_verdict,
)
from tap_deploy.errors import BundleError
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.precisions import FP16, FP32, INT8, INT8_FP32, variant_for
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.cpu_choice import cpu_backends
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import CPU_BACKENDS, OPENVINO, RunOn
from tap_deploy.timing import Latency

REFERENCE_BACKEND = "onnxruntime"

OnStage = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerdictOptions:
    """Options of a verdict.

    Attributes:
        backend: backend of the int8 graphs and of the float graphs they are timed against.
        floors: minimum agreement with the fp32 graphs.
        speed: options of the timing; None to judge accuracy only.
        min_speedup: minimum speedup over float for an int8 graph to be used.
        min_calibration_pictures: int8 graphs calibrated on fewer pictures fail.
        threads: CPU threads per call; None for one per core.
    """

    backend: str = "onnxruntime"
    floors: Floors = dataclasses.field(default_factory=Floors)
    speed: SpeedOptions | None = dataclasses.field(default_factory=SpeedOptions)
    min_speedup: float = 1.05
    min_calibration_pictures: int = MIN_CALIBRATION_PICTURES
    threads: int | None = None

    @property
    def variant(self) -> str:
        """Graph variant that this backend runs for int8."""
        return variant_for(INT8, on_cpu=self.backend in CPU_BACKENDS)

    @property
    def float_variant(self) -> str:
        """Graph variant that this backend runs without int8."""
        return FP32 if self.variant == INT8_FP32 else FP16


def judge_bundle(
    bundle: Bundle,
    cases: Iterable[Case],
    options: VerdictOptions,
    *,
    calibrated_on: int | None = None,
    others: Mapping[str, OtherRuntime] | None = None,
    on_stage: OnStage | None = None,
) -> Verdict:
    """Compare the int8 graphs of a bundle with its fp32 graphs, and return the verdict.

    Args:
        bundle: bundle with fp32 and int8 graphs.
        cases: pictures outside the calibration data, with prompts.
        options: options of the verdict.
        calibrated_on: number of calibration pictures; None if unknown.
        others: other runtimes to time in the same run, such as PyTorch eager.
        on_stage: called with the name of each stage before it starts.

    Raises:
        BundleError: the bundle lacks a variant.
        InputError: there are no regions.
        SessionError: a graph fails to load or run.
    """
    say = on_stage if on_stage is not None else _say_nothing
    with contextlib.ExitStack() as stack:
        judge = _Judge(bundle, options, stack)
        say("run fp32")
        answers = ReferenceAnswers(
            judge.reference, bundle.config, cases, vocabulary=bundle.vocabulary()
        )
        alone: dict[str, Agreement] = {}
        for graph in GRAPH_NAMES:
            say(f"run the {graph} in INT8")
            alone[graph] = answers.agreement({graph: judge.candidates[graph]})
        say("run all graphs in INT8")
        everything = answers.agreement(judge.candidates)
        latency = judge.time_graphs(answers.cases[0], others, say)
        graphs = judge.decide(alone, latency)
        mix = {name: s for name, s in judge.candidates.items() if graphs[name].use_int8}
        say("run the best mix")
        agreement = everything if len(mix) == len(GRAPH_NAMES) else answers.agreement(mix)
        return Verdict(
            variant=options.variant,
            float_variant=options.float_variant,
            backend=options.backend,
            floors=options.floors,
            graphs=graphs,
            everything_int8=everything,
            mix=agreement,
            whole_latency=judge.time_whole(answers.cases[0], mix, others, say),
            calibrated_on=calibrated_on,
            min_calibration_pictures=options.min_calibration_pictures,
        )


def require_variants(bundle: Bundle, options: VerdictOptions) -> None:
    """Check that a bundle has all graph variants that a verdict needs.

    Raises:
        BundleError: a variant is missing.
    """
    needed = (FP32, options.variant, options.float_variant)
    missing = [variant for variant in needed if variant not in bundle.manifest.graphs]
    if missing:
        raise BundleError(
            f"bundle {bundle.path} has no {missing[0]}, which the verdict needs; it has "
            f"{', '.join(bundle.manifest.graphs)}; add it with: tap-export quantize"
        )


class _Judge:
    """Loads the sessions of one verdict and measures them."""

    def __init__(
        self, bundle: Bundle, options: VerdictOptions, stack: contextlib.ExitStack
    ) -> None:
        self._bundle, self._options = bundle, options
        require_variants(bundle, options)
        self._quantized = bundle.variant(options.variant)
        self._plain = bundle.variant(options.float_variant)
        self.reference = self._load(stack, REFERENCE_BACKEND, FP32)
        self.candidates = self._load(stack, options.backend, INT8)
        same = options.backend == REFERENCE_BACKEND and options.float_variant == FP32
        self._float = (
            self.reference if same else self._load(stack, options.backend, options.float_variant)
        )

    def _load(
        self, stack: contextlib.ExitStack, backend: str, precision: str
    ) -> dict[str, Session]:
        sessions = sessions_from_bundle(self._bundle, self._run_on(backend, precision))
        for session in sessions.values():
            stack.enter_context(session)
        return sessions

    def _run_on(self, backend: str, precision: str) -> RunOn:
        """Return what runs the graphs; those that are marked as failed can be judged again."""
        threads = self._options.threads if backend in CPU_BACKENDS else None
        return RunOn(backend=backend, precision=precision, threads=threads, allow_failed=True)

    def time_graphs(
        self, case: Case, others: Mapping[str, OtherRuntime] | None, say: OnStage
    ) -> dict[str, dict[str, Latency]]:
        if self._options.speed is None:
            return {}
        return measure_graphs(
            {INT8: self.candidates, FLOAT: self._float},
            self._bundle.config,
            self._inputs(case),
            self._options.speed,
            others=others,
            on_stage=lambda graph: say(f"time the {graph}"),
        )

    def time_whole(
        self,
        case: Case,
        mix: Mapping[str, Session],
        others: Mapping[str, OtherRuntime] | None,
        say: OnStage,
    ) -> dict[str, Latency]:
        if self._options.speed is None:
            return {}
        say("time the whole pipeline")
        return measure_whole(
            {INT8: self._float | dict(mix), FLOAT: self._float},
            self._bundle.config,
            self._inputs(case),
            self._options.speed,
            others=others,
        )

    def _inputs(self, case: Case) -> SpeedInputs:
        return SpeedInputs.from_case(self.reference, self._bundle.config, case)

    def decide(
        self,
        alone: Mapping[str, Agreement],
        latency: Mapping[str, Mapping[str, Latency]],
    ) -> dict[str, GraphVerdict]:
        options = self._options
        return {
            graph: graph_verdict(
                self._facts(graph, alone[graph], latency.get(graph, {})),
                options.floors,
                float_name=options.float_variant.upper(),
                min_speedup=options.min_speedup,
            )
            for graph in GRAPH_NAMES
        }

    def _facts(
        self, graph: str, agreement: Agreement, latency: Mapping[str, Latency]
    ) -> GraphFacts:
        quantized, plain = self._quantized, self._plain
        return GraphFacts(
            graph=graph,
            agreement=agreement,
            kernels=self._kernels(graph),
            int8_bytes=quantized.size_bytes(graph),
            float_bytes=plain.size_bytes(graph),
            latency=latency,
            kept_before=quantized.path(graph) == plain.path(graph),
        )

    def _kernels(self, graph: str) -> KernelCount | LayerCount | None:
        backend = self._options.backend
        if backend not in CPU_BACKENDS:
            return layers_in_engine(self._bundle, backend, self._quantized.name, graph)
        run_on, path = self._run_on(backend, INT8), self._quantized.path(graph)
        if cpu_backends(self._bundle.config, run_on)[graph] == OPENVINO:
            return layers_in_openvino(path)
        return kernels_in_onnxruntime(path)


def _say_nothing(stage: str) -> None:
    """Ignore progress; the default callback."""
