"""The verdict: int8 or float for each graph, with reasons, and whether int8 passed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tap_deploy.engines.verdict.kernels import KernelCount, LayerCount
from tap_deploy.engines.verdict.tally import Agreement
from tap_deploy.errors import InputError
from tap_deploy.precisions import INT8
from tap_deploy.timing import Latency

# With fewer calibration pictures, int8 can pass the other floors by chance on similar pictures.
MIN_CALIBRATION_PICTURES = 8
NOT_KNOWN = "not known without a GPU"
# Name of the float candidate in the timings.
FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floors:
    """Minimum agreement with the fp32 graphs, 0..1 each.

    Attributes:
        mask_iou: minimum mean IoU of the masks.
        concept_top1: minimum share of regions with the same top concept.
        captions_identical: minimum share of captions with identical tokens.

    Raises:
        InputError: a value is out of range.
    """

    mask_iou: float = 0.97
    concept_top1: float = 0.98
    captions_identical: float = 0.95

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise InputError(f"floor {name} is {value}; expected 0 to 1")

    def failures(self, agreement: Agreement) -> list[str]:
        """Return the values below their floors, as parts of a sentence; NaN counts as below."""
        found = {
            "mean mask IoU": (agreement.mask_iou, self.mask_iou),
            "concept top-1 agreement": (agreement.concept_top1, self.concept_top1),
            "share of identical captions": (
                agreement.captions.identical,
                self.captions_identical,
            ),
        }
        return [
            f"{what} is {value:.4f}, expected at least {floor:g}"
            for what, (value, floor) in found.items()
            if value is not None and (math.isnan(value) or value < floor)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """Measurements of one graph.

    Attributes:
        graph: name of the graph.
        agreement: agreement with the reference when only this graph is int8.
        kernels: kernels that really run; None if unknown.
        int8_bytes: size of the int8 graph's files, bytes.
        float_bytes: size of the float graph's files, bytes.
        latency: candidate -> latency of a call; empty if not measured.
        kept_before: whether an earlier verdict has already replaced it by the float graph.
    """

    graph: str
    agreement: Agreement
    kernels: KernelCount | LayerCount | None
    int8_bytes: int
    float_bytes: int
    latency: Mapping[str, Latency] = dataclasses.field(default_factory=dict)
    kept_before: bool = False

    @property
    def speedup(self) -> float | None:
        """Speedup of int8 over float by the medians; None if not measured."""
        return speedup(self.latency)


def speedup(latency: Mapping[str, Latency]) -> float | None:
    """Return median float latency over median int8 latency; None unless both were measured."""
    if INT8 not in latency or FLOAT not in latency:
        return None
    return latency[FLOAT].median_ms / latency[INT8].median_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphVerdict:
    """The decision about one graph.

    Attributes:
        facts: the measurements.
        use_int8: whether the int8 graph is used instead of the float graph.
        sentence: decision and reason, for the report.
        failures: values below their floors; any failure fails the whole verdict.
    """

    facts: GraphFacts
    use_int8: bool
    sentence: str
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        facts, kernels = self.facts, self.facts.kernels
        return {
            "use_int8": self.use_int8,
            "sentence": self.sentence,
            "failures": list(self.failures),
            "int8_kernels": NOT_KNOWN if kernels is None else dataclasses.asdict(kernels),
            "int8_kernels_summary": NOT_KNOWN if kernels is None else kernels.summary,
            "int8_bytes": facts.int8_bytes,
            "float_bytes": facts.float_bytes,
            "speedup": facts.speedup,
            "latency_ms": latency_dict(facts.latency),
            "agreement": facts.agreement.to_dict(),
        }


def _kernels_in_mix(graph: GraphVerdict, float_variant: str) -> str:
    if not graph.use_int8:
        return f"none, it is {float_variant}"
    return NOT_KNOWN if graph.facts.kernels is None else graph.facts.kernels.summary


def latency_dict(latency: Mapping[str, Latency]) -> dict[str, Any]:
    """Return latencies as plain JSON types, each with ``is_noisy``."""
    return {
        name: dataclasses.asdict(value) | {"is_noisy": value.is_noisy}
        for name, value in latency.items()
    }


def graph_verdict(
    facts: GraphFacts, floors: Floors, *, float_name: str, min_speedup: float
) -> GraphVerdict:
    """Decide whether a graph uses int8, by accuracy first and then by speed.

    Args:
        facts: the measurements.
        floors: minimum agreement.
        float_name: name of the alternative for the sentence, FP16 or FP32.
        min_speedup: minimum speedup for int8 to be used.
    """
    failures = tuple(floors.failures(facts.agreement))
    keep = f"keep {float_name} for the {facts.graph}"
    if facts.kept_before:
        why = f"{keep}, because an earlier verdict chose it; quantize again for a new verdict"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why)
    if failures:
        why = f"{keep}, because INT8 changes the answers: {'; '.join(failures)}"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why, failures=failures)
    kernels, gain = facts.kernels, facts.speedup
    if isinstance(kernels, KernelCount) and kernels.integer == 0:
        why = f"{keep}, because INT8 would run without integer kernels"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why)
    if gain is not None and gain < min_speedup:
        why = f"{keep}, because INT8 is not fast enough here: {_pace(facts, float_name)}"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why)
    reasons = [_closeness(facts.agreement)]
    if gain is not None:
        reasons.insert(0, _pace(facts, float_name))
    smaller = facts.float_bytes / max(1, facts.int8_bytes)
    reasons.append(f"its file is {smaller:.1f} times smaller")
    why = f"use INT8 for the {facts.graph}, because {'; '.join(reasons)}"
    return GraphVerdict(facts=facts, use_int8=True, sentence=why)


def _pace(facts: GraphFacts, float_name: str) -> str:
    quick, slow = facts.latency[INT8], facts.latency[FLOAT]
    return (
        f"it takes {quick.median_ms:.3g} ms, {float_name} {slow.median_ms:.3g} ms "
        f"(speedup {facts.speedup:.2f})"
    )


def _closeness(agreement: Agreement) -> str:
    top1 = agreement.concept_top1
    names = "" if top1 is None else f", {top1:.1%} of the names are the same"
    return (
        f"mean mask IoU is {agreement.mask_iou:.4f}{names}, "
        f"{agreement.captions.identical:.1%} of the captions are identical"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on a bundle's int8 graphs.

    Attributes:
        variant: judged variant, see ``tap_deploy.precisions``.
        float_variant: variant that replaces int8 graphs that are not used.
        backend: backend that ran the graphs.
        floors: minimum agreement.
        graphs: graph name -> decision.
        everything_int8: agreement with all graphs in int8.
        mix: agreement of the best mix, with int8 only for graphs that use it.
        whole_latency: candidate -> latency of the whole pipeline, for float and for the mix (named
            ``int8``); empty if not measured.
        calibrated_on: number of calibration pictures; None if unknown.
        min_calibration_pictures: required number of calibration pictures.
    """

    variant: str
    float_variant: str
    backend: str
    floors: Floors
    graphs: Mapping[str, GraphVerdict]
    everything_int8: Agreement
    mix: Agreement
    whole_latency: Mapping[str, Latency] = dataclasses.field(default_factory=dict)
    calibrated_on: int | None = None
    min_calibration_pictures: int = MIN_CALIBRATION_PICTURES

    @property
    def failures(self) -> list[str]:
        """All failures: too few calibration pictures, single graphs, and the best mix."""
        found = []
        if self.calibrated_on is not None and self.calibrated_on < self.min_calibration_pictures:
            found.append(
                f"calibration pictures: {self.calibrated_on}, expected at least "
                f"{self.min_calibration_pictures}; with fewer, INT8 can pass by chance"
            )
        found += [
            f"{name}: {failure}"
            for name, graph in self.graphs.items()
            for failure in graph.failures
        ]
        return found + [f"best mix: {failure}" for failure in self.floors.failures(self.mix)]

    @property
    def passed(self) -> bool:
        """Whether there are graphs and regions, and no failures."""
        return bool(self.graphs) and self.mix.regions > 0 and not self.failures

    @property
    def variants(self) -> dict[str, str]:
        """Graph name -> variant in the best mix."""
        return {
            name: self.variant if graph.use_int8 else self.float_variant
            for name, graph in self.graphs.items()
        }

    @property
    def mix_bytes(self) -> int:
        """Size of the graphs of the best mix, bytes."""
        return sum(
            graph.facts.int8_bytes if graph.use_int8 else graph.facts.float_bytes
            for graph in self.graphs.values()
        )

    @property
    def float_bytes(self) -> int:
        """Size of the float graphs, bytes."""
        return sum(graph.facts.float_bytes for graph in self.graphs.values())

    @property
    def kernels_summary(self) -> str:
        """Integer kernels of the best mix, graph by graph."""
        return "; ".join(
            f"{name}: {_kernels_in_mix(graph, self.float_variant)}"
            for name, graph in self.graphs.items()
        )

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        if not self.passed:
            return (
                f"FAILED: do not use INT8: {'; '.join(self.failures)}; calibrate on "
                "more real pictures, or keep blocks in float (--budget)"
            )
        used = [name for name, graph in self.graphs.items() if graph.use_int8]
        if not used:
            return f"PASSED, but no graph uses INT8: precision int8 uses {self.float_variant}"
        kept = [name for name in self.graphs if name not in used]
        rest = f", {self.float_variant} for {', '.join(kept)}" if kept else ""
        mix = f"INT8 for {', '.join(used)}{rest}"
        return f"PASSED: precision int8 uses {mix}; {_closeness(self.mix)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "passed": self.passed,
            "sentence": self.sentence,
            "failures": self.failures,
            "variant": self.variant,
            "float_variant": self.float_variant,
            "backend": self.backend,
            "floors": dataclasses.asdict(self.floors),
            "calibrated_on": self.calibrated_on,
            "min_calibration_pictures": self.min_calibration_pictures,
            "mix": self.variants,
            "graphs": {name: graph.to_dict() for name, graph in self.graphs.items()},
            "whole": {
                "agreement": self.mix.to_dict(),
                "everything_int8": self.everything_int8.to_dict(),
                "int8_bytes": self.mix_bytes,
                "float_bytes": self.float_bytes,
                "int8_kernels_summary": self.kernels_summary,
                "speedup": speedup(self.whole_latency),
                "latency_ms": latency_dict(self.whole_latency),
            },
        }
