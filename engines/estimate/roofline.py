"""Time estimates from work and data-sheet peaks: the roofline and an expected range.

The roofline is the time at the device's theoretical peaks. The range applies the shares of the
peaks that the best and typical implementations reach; ``FACTORS`` lists them with their sources.
"""

from __future__ import annotations

import dataclasses

from tap_deploy.engines.estimate.devices import DeviceProfile
from tap_deploy.engines.estimate.work import GraphWork
from tap_deploy.precisions import FP16, FP32, INT8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """An assumption of the estimates.

    Attributes:
        value: the number.
        unit: its unit.
        source: its source.
    """

    value: float
    unit: str
    source: str


_BERT = (
    "TensorRT demoBERT on A100, transformers of this width and token count: 54 to 62 % of the FP16 "
    "peak, 40 to 57 % of the INT8 peak"
)
FACTORS = {
    "best_share_of_peak_fp16": Factor(value=0.56, unit="of the dense peak", source=_BERT),
    "best_share_of_peak_int8": Factor(value=0.50, unit="of the dense peak", source=_BERT),
    "usual_share_of_peak": Factor(
        value=0.25,
        unit="of the dense FP16 peak, INT8 included",
        source="community exports of SAM reach 15 to 40 % of the FP16 peak; INT8 is often no "
        "faster than FP16 on vision transformers whose attention does not fuse",
    ),
    "best_share_of_bandwidth": Factor(
        value=0.85, unit="of the stated bandwidth", source="assumed: large copies reach 80 to 90 %"
    ),
    "usual_share_of_bandwidth": Factor(
        value=0.6, unit="of the stated bandwidth", source="assumed: many small tensors"
    ),
    "kernel_us": Factor(
        value=3.2,
        unit="µs per kernel, replayed from a CUDA graph",
        source="88 kernels of a text step take about 0.28 ms on an H100",
    ),
    "eager_kernel_us": Factor(
        value=12.0,
        unit="µs per kernel, launched individually",
        source="assumed: a Jetson CPU core is slower than a server core",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Time of one stage, which is one or more calls of a graph.

    Attributes:
        stage: description of the stage.
        graph: name of the graph.
        calls: number of calls.
        gflop: work of all calls, 1e9 operations.
        megabytes: weights and activations that all calls move, 1e6 bytes.
        compute_ms: time at the peak arithmetic rate, ms.
        memory_ms: time at the peak bandwidth, ms.
        launch_ms: launch time of the kernels, replayed from CUDA graphs, ms.
        roofline_ms: larger of ``compute_ms`` and ``memory_ms``, a lower bound, ms.
        expected_low_ms: time of the best published implementations, ms.
        expected_high_ms: time of a typical implementation, ms.
    """

    stage: str
    graph: str
    calls: int
    gflop: float
    megabytes: float
    compute_ms: float
    memory_ms: float
    launch_ms: float
    roofline_ms: float
    expected_low_ms: float
    expected_high_ms: float

    @property
    def limited_by(self) -> str:
        """The resource that takes longest at its peak."""
        limits = {
            "arithmetic": self.compute_ms,
            "bandwidth": self.memory_ms,
            "launches": self.launch_ms,
        }
        return max(limits, key=lambda name: limits[name])


def stage_estimate(
    stage: str, work: GraphWork, device: DeviceProfile, precision: str, *, calls: int = 1
) -> StageEstimate:
    """Estimate the time of ``calls`` calls of a graph on a device, in one of ``PRECISIONS``."""
    flops, moved = _flops_by_precision(work, precision), moved_bytes(work, precision)
    compute = 1e3 * calls * sum(n / device.peak_flops(kind) for kind, n in flops.items())
    best_compute = (
        1e3
        * calls
        * sum(n / device.peak_flops(kind) / _best_share(kind) for kind, n in flops.items())
    )
    wide = FP32 if precision == FP32 else FP16
    usual_compute = 1e3 * calls * work.flops / device.peak_flops(wide)
    memory = 1e3 * calls * moved / (1e9 * device.gigabytes_per_second)
    launch = 1e-3 * calls * len(work.kernels) * _factor("kernel_us")
    eager_launch = 1e-3 * calls * len(work.kernels) * _factor("eager_kernel_us")
    return StageEstimate(
        stage=stage,
        graph=work.graph,
        calls=calls,
        gflop=1e-9 * calls * work.flops,
        megabytes=1e-6 * calls * moved,
        compute_ms=compute,
        memory_ms=memory,
        launch_ms=launch,
        roofline_ms=max(compute, memory),
        expected_low_ms=max(best_compute, memory / _factor("best_share_of_bandwidth"), launch),
        expected_high_ms=max(
            usual_compute / _factor("usual_share_of_peak")
            + memory / _factor("usual_share_of_bandwidth"),
            eager_launch,
        ),
    )


def weight_bytes(work: GraphWork, precision: str) -> int:
    """Return the size of an engine's weights, bytes."""
    return _bytes_of_weights(work.weight_elements, work.int8_weight_elements, precision)


def moved_bytes(work: GraphWork, precision: str) -> int:
    """Return the traffic of one call, bytes: weights, and activations between fused kernels."""
    weights = _bytes_of_weights(work.read_weight_elements, work.int8_weight_elements, precision)
    return weights + activation_bytes(work.moved_elements, precision)


def activation_bytes(elements: int, precision: str) -> int:
    """Return the size of activations, bytes; with int8 they are fp16 between layers."""
    return elements * (4 if precision == FP32 else 2)


def _bytes_of_weights(elements: int, in_int8: int, precision: str) -> int:
    wide = elements * (4 if precision == FP32 else 2)
    return wide - in_int8 if precision == INT8 else wide


def _flops_by_precision(work: GraphWork, precision: str) -> dict[str, int]:
    """Return the operations by the precision that they run in."""
    if precision != INT8:
        return {precision: work.flops}
    return {INT8: work.int8_flops, FP16: work.flops - work.int8_flops}


def _best_share(kind: str) -> float:
    return _factor("best_share_of_peak_int8" if kind == INT8 else "best_share_of_peak_fp16")


def _factor(name: str) -> float:
    return FACTORS[name].value
