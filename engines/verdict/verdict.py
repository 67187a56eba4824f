"""The verdict: use INT8 or keep the float graph, and why; passed or not."""

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

# One real picture can pass every other floor on pictures that look like it, by luck.
MIN_CALIBRATION_PICTURES = 8
NOT_KNOWN = "not known without a GPU"
# Name of the candidate beside INT8 in the timings.
FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floors:
    """The least agreement with the fp32 graphs that passes, 0..1 each.

    Attributes:
        mask_iou: mean IoU of the masks.
        concept_top1: share of regions with the same likeliest concept.
        captions_identical: share of captions that are equal token for token.

    Raises:
        InputError: a value out of range.
    """

    mask_iou: float = 0.97
    concept_top1: float = 0.98
    captions_identical: float = 0.95

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise InputError(f"floor {name} is {value}; expected 0 to 1")

    def failures(self, agreement: Agreement) -> list[str]:
        """Return what falls short, as readable parts of a sentence. What is no number does."""
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
    """What was measured of one graph.

    Attributes:
        graph: its name.
        agreement: with this graph in INT8 and the others as in the reference.
        kernels: what really runs; None where that cannot be known.
        int8_bytes: size of its file.
        float_bytes: size of the file it would replace.
        latency: candidate -> time of a call; empty if speed was not measured.
        kept_before: it is the float graph already, by an earlier verdict.
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
        """How many times faster INT8 is than float, by the medians; None if not measured."""
        return speedup(self.latency)


def speedup(latency: Mapping[str, Latency]) -> float | None:
    """Return median of float / median of INT8, None unless both were measured."""
    if INT8 not in latency or FLOAT not in latency:
        return None
    return latency[FLOAT].median_ms / latency[INT8].median_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphVerdict:
    """The decision about one graph.

    Attributes:
        facts: what it rests on.
        use_int8: else the float graph stays.
        sentence: the decision and its reason, for people.
        failures: where its answers fall below the floors; makes the whole fail.
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
    """Return timings as plain JSON types, with a note on each whether it is noisy."""
    return {
        name: dataclasses.asdict(value) | {"is_noisy": value.is_noisy}
        for name, value in latency.items()
    }


def graph_verdict(
    facts: GraphFacts, floors: Floors, *, float_name: str, min_speedup: float
) -> GraphVerdict:
    """Decide about a graph: accuracy first, then whether it pays.

    Args:
        facts: what was measured.
        floors: the least agreement.
        float_name: what people call the alternative: FP16 or FP32.
        min_speedup: INT8 must be so many times faster to be worth it.
    """
    failures = tuple(floors.failures(facts.agreement))
    keep = f"keep {float_name} for the {facts.graph}"
    if facts.kept_before:
        why = f"{keep}, because an earlier verdict put it there; quantize again to judge anew"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why)
    if failures:
        why = f"{keep}, because INT8 changes the answers: {'; '.join(failures)}"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why, failures=failures)
    kernels, gain = facts.kernels, facts.speedup
    if isinstance(kernels, KernelCount) and kernels.integer == 0:
        why = f"{keep}, because nothing of it would run on integers"
        return GraphVerdict(facts=facts, use_int8=False, sentence=why)
    if gain is not None and gain < min_speedup:
        why = f"{keep}, because INT8 does not pay here: {_pace(facts, float_name)}"
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
        f"it takes {quick.median_ms:.3g} ms against {slow.median_ms:.3g} ms in {float_name} "
        f"({facts.speedup:.2f} times as fast)"
    )


def _closeness(agreement: Agreement) -> str:
    names = f", {agreement.concept_top1:.1%} of names" if agreement.concept_top1 is not None else ""
    return (
        f"masks agree to {agreement.mask_iou:.4f} (mean IoU){names} and "
        f"{agreement.captions.identical:.1%} of captions are the same"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision about a bundle's INT8.

    Attributes:
        variant: the variant that was judged, see ``tap_deploy.precisions``.
        float_variant: what stands in where INT8 is not used.
        backend: what ran the graphs.
        floors: the least agreement.
        graphs: name -> decision.
        everything_int8: agreement with all graphs quantized.
        mix: agreement of the best mix: INT8 where it is used.
        whole_latency: the whole way, float and mix (called ``int8``); empty if not measured.
        calibrated_on: how many pictures the ranges come from; None if that is not known.
        min_calibration_pictures: how many there must be.
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
        """Everything that falls below the floors: calibration data, graphs alone, and the mix."""
        found = []
        if self.calibrated_on is not None and self.calibrated_on < self.min_calibration_pictures:
            found.append(
                f"pictures that calibration saw: {self.calibrated_on}, expected at least "
                f"{self.min_calibration_pictures}; so few say nothing of others"
            )
        found += [
            f"{name}: {failure}"
            for name, graph in self.graphs.items()
            for failure in graph.failures
        ]
        return found + [f"best mix: {failure}" for failure in self.floors.failures(self.mix)]

    @property
    def passed(self) -> bool:
        """True if there were graphs and regions, and no answer falls below the floors."""
        return bool(self.graphs) and self.mix.regions > 0 and not self.failures

    @property
    def variants(self) -> dict[str, str]:
        """Graph -> the variant that is the best mix."""
        return {
            name: self.variant if graph.use_int8 else self.float_variant
            for name, graph in self.graphs.items()
        }

    @property
    def mix_bytes(self) -> int:
        """Size of the graphs of the best mix."""
        return sum(
            graph.facts.int8_bytes if graph.use_int8 else graph.facts.float_bytes
            for graph in self.graphs.values()
        )

    @property
    def float_bytes(self) -> int:
        """Size of the graphs that would be used without INT8."""
        return sum(graph.facts.float_bytes for graph in self.graphs.values())

    @property
    def kernels_summary(self) -> str:
        """What runs on integers in the best mix, graph by graph."""
        return "; ".join(
            f"{name}: {_kernels_in_mix(graph, self.float_variant)}"
            for name, graph in self.graphs.items()
        )

    @property
    def sentence(self) -> str:
        """The whole in one sentence."""
        if not self.passed:
            return (
                f"FAILED: INT8 is not fit for use: {'; '.join(self.failures)}; calibrate on more "
                "and on real pictures, or exclude blocks (--budget)"
            )
        used = [name for name, graph in self.graphs.items() if graph.use_int8]
        if not used:
            return f"PASSED, but INT8 pays for no graph: int8 is {self.float_variant} throughout"
        kept = [name for name in self.graphs if name not in used]
        rest = f", {self.float_variant} for {', '.join(kept)}" if kept else ""
        return f"PASSED: int8 means INT8 for {', '.join(used)}{rest}; {_closeness(self.mix)}"

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
