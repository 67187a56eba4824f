"""What a bundle will need and take on a device, before anybody has built it there."""

from __future__ import annotations

import dataclasses
from typing import Any

from tap_deploy import graphs
from tap_deploy.bundle import Bundle
from tap_deploy.config import TapConfig
from tap_deploy.engines.device_profiles import GIBIBYTE, DeviceProfile
from tap_deploy.engines.dram import DramBudget, build_budget, engine_bytes, run_budget
from tap_deploy.engines.roofline import FACTORS, StageEstimate, stage_estimate
from tap_deploy.engines.work import GraphWork, count_work
from tap_deploy.errors import InputError
from tap_deploy.precisions import FP32, PRECISIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
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
class DevicePlan:
    """The estimate as a whole.

    Attributes:
        model: name of the model.
        device: for which device.
        options: for what load.
        tokens: length of a caption.
        counted_from: the variant of the graphs that was counted.
        stages: time of each stage.
        engine_bytes: graph name -> size of its plan.
        build: DRAM while building.
        run: DRAM while running.
    """

    model: str
    device: DeviceProfile
    options: PlanOptions
    tokens: int
    counted_from: str
    stages: tuple[StageEstimate, ...]
    engine_bytes: dict[str, int]
    build: DramBudget
    run: DramBudget

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
            "counted_from": self.counted_from,
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
            "dram": {"build": _budget_dict(self.build), "run": _budget_dict(self.run)},
            "factors": {name: dataclasses.asdict(factor) for name, factor in FACTORS.items()},
        }


def plan_for_device(bundle: Bundle, device: DeviceProfile, options: PlanOptions) -> DevicePlan:
    """Count the graphs of a bundle, and estimate time and memory on a device.

    The graphs of the precision are counted if the bundle has them, else the fp32 ones, whose
    products are the same.

    Raises:
        InputError: an option does not fit the model.
        BundleError: a graph cannot be counted.
    """
    config, tokens = bundle.config, options.tokens_of(bundle.config)
    variant = options.precision if options.precision in bundle.manifest.graphs else FP32
    prompts = min(options.prompts, options.max_prompts)
    calls = -(-options.prompts // options.max_prompts)  # more than the profile takes: in chunks
    works = _works(bundle, variant, prompts, options.points)
    largest = _works(bundle, variant, options.max_prompts, options.max_points)
    loads = (
        ("encode 1 image", graphs.IMAGE_ENCODER, 1),
        (f"decode {options.prompts} prompts", graphs.PROMPT_DECODER, calls),
        (
            f"caption {options.prompts} regions, {tokens} tokens",
            graphs.TEXT_DECODER,
            calls * (tokens + 1),  # the visual prefix is a step of its own
        ),
    )
    precision = options.precision
    return DevicePlan(
        model=bundle.manifest.model,
        device=device,
        options=options,
        tokens=tokens,
        counted_from=variant,
        stages=tuple(
            stage_estimate(stage, works[graph], device, precision, calls=count)
            for stage, graph, count in loads
        ),
        engine_bytes={name: engine_bytes(work, precision) for name, work in largest.items()},
        build=build_budget(largest, device, precision, options.workspace_bytes),
        run=run_budget(largest, device, precision, config, options.max_prompts),
    )


def _works(bundle: Bundle, variant: str, prompts: int, points: int) -> dict[str, GraphWork]:
    # The whole cache is shown to every step: fixed shapes, as CUDA graphs want them.
    axes = {"B": 1, "P": prompts, "N": points, "M": 1, "K": 1}
    axes["T"] = bundle.config.text_seq_len
    works = {}
    for name, spec in bundle.graph_specs(variant).items():
        used = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str)}
        sizes = {axis: axes[axis] for axis in used}
        works[name] = count_work(bundle.graph_path(name, variant), spec, sizes)
    return works


def _budget_dict(budget: DramBudget) -> dict[str, Any]:
    return {
        "items": budget.items,
        "total_bytes": budget.total_bytes,
        "available_bytes": budget.available_bytes,
        "fits": budget.fits,
    }
