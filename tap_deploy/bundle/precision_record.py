"""The record of a variant in the manifest: how its graphs were made, and their accuracy."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerdictMark:
    """The verdict on INT8 graphs, see ``tap_deploy.engines.verdict``.

    Attributes:
        passed: whether the verdict allows the use of the graphs.
        sentence: the verdict in one sentence.
        backend: the backend that ran the graphs.
        judged: the judged variant; both INT8 variants get the mark.
        report: path of the report, relative to the bundle.
    """

    passed: bool
    sentence: str
    backend: str
    judged: str
    report: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bf16Verdict:
    """The verdict on running graphs in bf16, see ``tap_deploy.engines.verdict.bf16``.

    Attributes:
        passed: whether the answers stay close enough to those of the fp32 graphs.
        backend: the backend that ran the graphs.
        sentence: what was measured, and what is below its floor.
    """

    passed: bool
    backend: str
    sentence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestMark:
    """The result of a self-test or a verification on one machine.

    One that has not ended has ``run`` and no measurements.

    Attributes:
        passed: True if the check ended and all comparisons passed.
        backend: the backend that ran the graphs, see ``marks.mark_name``.
        backend_version: version of its package.
        precision: one of ``precisions.PRECISIONS``.
        device: the machine, see ``machine.state.machine_title``; None if unknown.
        finished_at: UTC, ISO 8601.
        seconds: stage -> wall time, seconds.
        comparisons: number of comparisons.
        failed: the failed comparisons, one line each.
        error: the reason why the check ended early; None if it did not.
        run: random number that identifies a check that has not ended.
    """

    passed: bool
    backend: str | None = None
    backend_version: str | None = None
    precision: str | None = None
    device: str | None = None
    finished_at: str | None = None
    seconds: dict[str, float] | None = None
    comparisons: int | None = None
    failed: tuple[str, ...] | None = None
    error: str | None
    run: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationRecord:
    """The comparison of new graphs with the reference.

    Attributes:
        passed: True if all comparisons passed.
        backend: the backend that ran the graphs.
        precision: one of ``precisions.PRECISIONS``.
        checks: the comparisons, fields of ``verify.comparison.Comparison``.
        device: the machine, see ``machine.state.machine_title``; None if not recorded.
    """

    passed: bool
    backend: str
    precision: str
    checks: tuple[dict[str, Any], ...]
    device: str | None = None


Marks = dict[str, SelftestMark]  # machine, empty if unknown -> result of the last check on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """How the ranges of INT8 graphs were measured.

    Attributes:
        method: one of ``precisions.CALIBRATION_METHODS``.
        num_samples: number of pictures.
        data_fingerprint: SHA-256 of the pictures, their order, the prompts and the seed.
        own_prompts: whether the user passed prompts; otherwise they are random.
        seed: seed of the random pictures and prompts.
        ranges: path of the ranges, relative to the bundle.
    """

    method: str
    num_samples: int
    data_fingerprint: str
    own_prompts: bool
    seed: int
    ranges: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothingChoice:
    """The decision whether to smooth a LayerNormalization, and its measurement.

    Attributes:
        norm: name of the LayerNormalization.
        error: noise of the products that read it, as a share of their energy, without smoothing.
        smoothed_error: the same share with smoothing.
        kept: whether it was smoothed.
    """

    norm: str
    error: float
    smoothed_error: float
    kept: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
    """Difference of one output of INT8 graphs from the reference, on the golden samples.

    Attributes:
        max: largest difference, as a share of the largest magnitude; None if it is not finite.
        mean: mean difference, as a share of the mean magnitude; None if it is not finite.
    """

    max: float | None
    mean: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """A sample for the measurement of activations.

    Attributes:
        name: name of the sample.
        prompts: number of prompts.
    """

    name: str
    prompts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class IslandRecord:
    """A node of an fp16 graph that computes in fp32.

    Attributes:
        node: name of the node.
        op_type: its operator.
        reason: the first reason that applies, see ``tap_deploy.engines.fp16.islands``.
        max_abs: largest magnitude among its measured inputs and outputs.
    """

    node: str
    op_type: str
    reason: str
    max_abs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargestActivation:
    """The largest fp16 activation of a graph.

    Attributes:
        tensor: name of the tensor; empty if there is none.
        max_abs: largest magnitude on the samples.
    """

    tensor: str
    max_abs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Counts over the float weights of a graph that is converted to fp16.

    Attributes:
        num_weights: number of weights.
        num_fp32: number of weights that stay fp32, because only islands read them.
        num_subnormal: number of weights that become subnormal or zero: they are stored to 2**-25
            absolute instead of 2**-11 relative. Harmless next to larger weights of the same
            tensor; tensors without larger ones stay fp32.
        overflowing: tensors with weights beyond 65504; they stay fp32.
        largest: largest magnitude that is stored in fp16.
    """

    num_weights: int
    num_fp32: int
    num_subnormal: int
    overflowing: tuple[str, ...]
    largest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp16GraphRecord:
    """How one graph was converted to fp16.

    Attributes:
        islands: the fp32 nodes, in graph order.
        largest_fp16_activation: the largest activation outside of the islands.
        weights: counts over its weights.
        casts: number of Cast nodes.
    """

    islands: tuple[IslandRecord, ...]
    largest_fp16_activation: LargestActivation
    weights: WeightReport
    casts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8GraphRecord:
    """How one graph was quantized.

    Attributes:
        quantized_nodes: names of the nodes that compute in INT8.
    """

    quantized_nodes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRecord:
    """How the graphs of a variant were made, and their accuracy.

    Fields that are None are absent from the JSON: fp16, int8 and fp32 use different fields, and
    verdicts and self-tests add theirs later.

    Attributes:
        made_from: the variant that was converted or quantized.
        noise_factor: fp32: how much wider the tolerances are than usual, because rounding moves the
            outputs of this model more; None for 1.
        overflow_limit: fp16: nodes with larger magnitudes stay fp32.
        score_limit: fp16: the inputs of a Softmax with larger attention scores stay fp32.
        samples: fp16: samples for the measurement of activations.
        reduce_range: int8: whether weights have 7 bits.
        calibration: int8: how ranges were measured.
        graphs: graph name -> how it was converted or quantized.
        verification: fp16: comparison with the golden samples.
        smoothquant: int8: graph name -> decision for every LayerNormalization that can be smoothed.
        excluded: int8: graph name -> blocks or nodes that stay float.
        golden_deviation: int8: output -> difference from the golden samples.
        verdict: int8: the verdict.
        bf16_verdict: fp32 and int8 on a CPU: the verdict on these graphs in bf16.
        mix: int8: graph name -> its variant, if float graphs replace INT8 graphs.
        selftest: key from ``RunOn.mark_name`` -> self-test results of the ONNX files.
        verified: key from ``RunOn.mark_name`` -> results of ``tap-export verify``.
    """

    made_from: str | None = None
    noise_factor: float | None = None
    overflow_limit: float | None = None
    score_limit: float | None = None
    samples: tuple[SampleRecord, ...] | None = None
    reduce_range: bool | None = None
    calibration: CalibrationRecord | None = None
    graphs: dict[str, Fp16GraphRecord | Int8GraphRecord] | None = None
    verification: VerificationRecord | None = None
    smoothquant: dict[str, tuple[SmoothingChoice, ...]] | None = None
    excluded: dict[str, tuple[str, ...]] | None = None
    golden_deviation: dict[str, Deviation] | None = None
    verdict: VerdictMark | None = None
    bf16_verdict: Bf16Verdict | None = None
    mix: dict[str, str] | None = None
    selftest: dict[str, Marks] | None = None
    verified: dict[str, Marks] | None = None

    @property
    def fp16_graphs(self) -> dict[str, Fp16GraphRecord]:
        """Graph name -> how it was converted; empty unless the variant is fp16."""
        return {
            name: graph
            for name, graph in (self.graphs or {}).items()
            if isinstance(graph, Fp16GraphRecord)
        }

    @property
    def quantized_nodes(self) -> dict[str, tuple[str, ...]]:
        """Graph name -> names of the INT8 nodes; empty unless the variant is int8."""
        return {
            name: graph.quantized_nodes
            for name, graph in (self.graphs or {}).items()
            if isinstance(graph, Int8GraphRecord)
        }
