"""What a model will need and take on a device, before anybody has built it there."""

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
    """What the device shall do.

    Attributes:
        precision: one of ``PRECISIONS``.
        prompts: regions asked for in one picture.
        points: points of a prompt, padding included.
        tokens: length of a caption; None for the longest that the model writes.
        max_prompts: largest P of the optimization profiles.
        max_points: largest N of the optimization profiles.
        workspace_bytes: limit of the builder's workspace.

    Raises:
        InputError: a number is below 1 or above the profile, or the precision is unknown.
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
        """Return the length of a caption in tokens, held against what the model can write.

        Raises:
            InputError: the model cannot write as many.
        """
        longest = config.max_new_tokens
        tokens = longest if self.tokens is None else self.tokens
        if not 1 <= tokens <= longest:
            raise InputError(f"tokens is {tokens}; expected 1 to {longest}")
        return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceEstimate:
    """The estimate as a whole.

    Attributes:
        model: name of the model.
        device: for which device.
        options: for what load.
        tokens: length of a caption.
        mix_of_bundle: whether INT8 covers what it covers in a bundle, not every stored weight.
        stages: time of each stage.
        engine_bytes: graph name -> size of its plan.
        build: DRAM while building.
        run: DRAM while running.
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
        """Nothing is faster, from picture to captions."""
        return sum(stage.roofline_ms for stage in self.stages)

    @property
    def expected_ms(self) -> tuple[float, float]:
        """Best published and usual implementation, from picture to captions."""
        return (
            sum(stage.expected_low_ms for stage in self.stages),
            sum(stage.expected_high_ms for stage in self.stages),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with the figures and factors that the estimate rests on."""
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


def quantized_nodes(manifest: Manifest) -> dict[str, tuple[str, ...]] | None:
    """Return graph name -> names of the nodes that are INT8 in a bundle; None without INT8."""
    for variant in (INT8, INT8_FP32):
        if nodes := manifest.precision_record(variant).quantized_nodes:
            return nodes
    return None


def estimate_for_device(
    model: str,
    config: TapConfig,
    device: DeviceProfile,
    options: EstimateOptions,
    quantized: Mapping[str, Collection[str]] | None = None,
) -> DeviceEstimate:
    """Estimate time and memory of a model on a device, from its sizes.

    Args:
        model: its name.
        config: its sizes.
        device: where it shall run.
        options: with what load.
        quantized: see ``quantized_nodes``; None for every product with stored weights.

    Raises:
        InputError: an option does not fit the model.
    """
    tokens, precision = options.tokens_of(config), options.precision
    prompts = min(options.prompts, options.max_prompts)
    calls = -(-options.prompts // options.max_prompts)  # more than the profile takes: in chunks
    # The whole cache is shown to every step: fixed shapes, as CUDA graphs want them.
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
            calls * (tokens + 1),  # the visual prefix is a step of its own
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
