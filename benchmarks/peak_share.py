"""Compares measured stages with the peak performance of a device."""

from __future__ import annotations

from typing import Any

from benchmarks.stages import CAPTION, DECODE, ENCODE
from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.estimate.devices import device_profile
from tap_deploy.engines.estimate.estimate import quantized_nodes
from tap_deploy.engines.estimate.roofline import stage_estimate
from tap_deploy.engines.estimate.work import graph_works
from tap_deploy.sessions.run_on import RunOn

GRAPHS = {
    ENCODE: graphs.IMAGE_ENCODER,
    DECODE: graphs.PROMPT_DECODER,
    CAPTION: graphs.TEXT_DECODER,
}


def peak_shares(
    bundle: Bundle, run_on: RunOn, profile: str, timed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the shares of peak arithmetic and peak bandwidth of each single-graph stage.

    Args:
        bundle: the measured bundle.
        run_on: the measured precision, and where.
        profile: name of the device in ``device_profiles``.
        timed: the stages of a report, see ``benchmarks.engines``.

    Raises:
        InputError: the device is unknown.
    """
    device, quantized = device_profile(profile), quantized_nodes(bundle.manifest, run_on.variant)
    shares = []
    for stage in timed:
        graph = GRAPHS.get(stage["kind"])
        if graph is None:
            continue
        calls = stage["tokens"] + 1 if stage["kind"] == CAPTION else 1
        # A step reads the filled slots of the KV cache: half of them on average.
        works = graph_works(
            bundle.config,
            prompts=stage["prompts"],
            points=2,
            slots=max(1, calls // 2),
            quantized=quantized,
        )
        estimate = stage_estimate(
            stage["stage"], works[graph], device, run_on.precision, calls=calls
        )
        median = stage["latency"]["median_ms"]
        shares.append(
            {
                "stage": stage["stage"],
                "share_of_arithmetic_peak": estimate.compute_ms / median,
                "share_of_bandwidth": estimate.memory_ms / median,
                "device": device.title,
            }
        )
    return shares
