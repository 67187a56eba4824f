"""Estimate of a model's time and memory on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from tap_deploy import graphs
from tap_deploy.bundle.manifest import Manifest
from tap_deploy.config import TapConfig
from tap_deploy.engines.estimate.devices import GIBIBYTE, DeviceProfile
from tap_deploy.engines.estimate.memory import (
    MemoryEstimate,
    build_estimate,
    engine_bytes,
    run_estimate,
)
from tap_deploy.engines.estimate.roofline import FACTORS, StageEstimate, stage_estimate
from tap_deploy.engines.estimate.work import graph_works
from tap_deploy.errors import InputError
from tap_deploy.precisions import INT8, INT8_FP32, PRECISIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """The workload to estimate.

    Attributes:
        precision: one of ``PRECISIONS``.
        prompts: prompts per picture.
        points: points per prompt, padding included.
        tokens: caption length, tokens; None for the model's maximum.
        max_prompts: largest P of the optimization profiles.
        max_points: largest N of the optimization profiles.
        workspace_bytes: workspace limit of the builder, bytes.

    Raises:
        InputError: a number is below 1 or beyond the profile, or the precision is unknown.
    """

    precision: str = "fp16"
    prompts: int = 16
    points: int = 2
    tokens: int | None = None
    max_prompts: int = 64
    max_points: int = 16
    workspace_bytes: int = GIBIBYTE

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(
                f"unknown precision {self.precision!r}; expected one of {', '.join(PRECISIONS)}"
            )
        for name in ("prompts", "points", "max_prompts", "max_points"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.points > self.max_points:
            raise InputError(
                f"points is {self.points}; expected at most max_points, {self.max_points}"
            )

    def tokens_of(self, config: TapConfig) -> int:
        """Return the caption length in tokens, checked against the model's maximum.

        Raises:
            InputError: longer than the model's maximum, or below 1.
        """
        longest = config.max_new_tokens
        tokens = longest if self.tokens is None else self.tokens
        if not 1 <= tokens <= longest:
            raise InputError(f"tokens is {tokens}; expected 1 to {longest}")
        return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceEstimate:
    """Estimate for a model on a device.

    Attributes:
        model: name of the model.
        device: the device.
        options: the workload.
        tokens: caption length, tokens.
        mix_of_bundle: whether int8 covers the nodes that a bundle quantizes, instead of all
            weights.
        stages: time of each stage.
        engine_bytes: graph name -> size of its plan, bytes.
        build: memory while building.
        run: memory while running.
    """

    model: str
    device: DeviceProfile
    options: EstimateOptions
    tokens: int
    mix_of_bundle: bool
    stages: tuple[StageEstimate, ...]
    engine_bytes: dict[str, int]
    build: MemoryEstimate
    run: MemoryEstimate

    @property
    def roofline_ms(self) -> float:
        """Lower bound of the time from picture to captions, ms."""
        return sum(stage.roofline_ms for stage in self.stages)

    @property
    def expected_ms(self) -> tuple[float, float]:
        """Time from picture to captions of the best published and of a typical one, ms."""
        return (
            sum(stage.expected_low_ms for stage in self.stages),
            sum(stage.expected_high_ms for stage in self.stages),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, including the figures and factors behind the estimate."""
        low, high = self.expected_ms
        return {
            "is_estimate": True,
            "model": self.model,
            "device": dataclasses.asdict(self.device),
            "options": dataclasses.asdict(self.options) | {"tokens": self.tokens},
            "mix_of_bundle": self.mix_of_bundle,
            "stages": [
                dataclasses.asdict(stage) | {"limited_by": stage.limited_by}
                for stage in self.stages
            ],
            "end_to_end": {
                "roofline_ms": self.roofline_ms,
                "expected_low_ms": low,
                "expected_high_ms": high,
            },
            "engine_bytes": self.engine_bytes,
            "dram": {"build": _memory_dict(self.build), "run": _memory_dict(self.run)},
            "factors": {name: dataclasses.asdict(factor) for name, factor in FACTORS.items()},
        }


def quantized_nodes(manifest: Manifest, variant: str = INT8) -> dict[str, tuple[str, ...]] | None:
    """Return graph name -> names of the nodes that compute in INT8; None without int8 graphs.

    Graphs that a verdict replaced by float ones have none. For engines of a bundle without fp16
    graphs, the nodes of the variant for CPUs count, whatever its verdict says about a CPU.
    """
    record = manifest.precision_record(variant)
    if not record.quantized_nodes:
        return manifest.precision_record(INT8_FP32).quantized_nodes or None
    mix = record.mix or {}
    return {
        graph: nodes
        for graph, nodes in record.quantized_nodes.items()
        if mix.get(graph, variant) == variant
    }


def estimate_for_device(
    model: str,
    config: TapConfig,
    device: DeviceProfile,
    options: EstimateOptions,
    quantized: Mapping[str, Collection[str]] | None = None,
) -> DeviceEstimate:
    """Estimate time and memory of a model on a device from its sizes.

    Args:
        model: name of the model.
        config: sizes of the model.
        device: the device.
        options: the workload.
        quantized: see ``quantized_nodes``; None for all layers with weights.

    Raises:
        InputError: an option is invalid for the model.
    """
    tokens, precision = options.tokens_of(config), options.precision
    prompts = min(options.prompts, options.max_prompts)
    calls = -(-options.prompts // options.max_prompts)  # prompts beyond the profile run in chunks
    # Every step gets the whole cache, for the fixed shapes that CUDA graphs need.
    slots = config.text_seq_len
    works = graph_works(
        config, prompts=prompts, points=options.points, slots=slots, quantized=quantized
    )
    largest = graph_works(
        config,
        prompts=options.max_prompts,
        points=options.max_points,
        slots=slots,
        quantized=quantized,
    )
    loads = (
        ("encode 1 image", graphs.IMAGE_ENCODER, 1),
        (f"decode {options.prompts} prompts", graphs.PROMPT_DECODER, calls),
        (
            f"caption {options.prompts} regions, {tokens} tokens",
            graphs.TEXT_DECODER,
            calls * (tokens + 1),  # one more step for the visual prefix
        ),
    )
    return DeviceEstimate(
        model=model,
        device=device,
        options=options,
        tokens=tokens,
        mix_of_bundle=precision == INT8 and quantized is not None,
        stages=tuple(
            stage_estimate(stage, works[graph], device, precision, calls=count)
            for stage, graph, count in loads
        ),
        engine_bytes={name: engine_bytes(work, precision) for name, work in largest.items()},
        build=build_estimate(largest, device, precision, options.workspace_bytes),
        run=run_estimate(
            largest, device, precision, config, options.max_prompts, options.max_points
        ),
    )


def _memory_dict(memory: MemoryEstimate) -> dict[str, Any]:
    return {
        "items": memory.items,
        "total_bytes": memory.total_bytes,
        "available_bytes": memory.available_bytes,
        "fits": memory.fits,
    }
