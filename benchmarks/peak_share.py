"""How near a measured stage comes to what the device could do at its stated peaks."""

from __future__ import annotations

from typing import Any

from benchmarks.stages import CAPTION, DECODE, ENCODE
from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.estimate.devices import device_profile
from tap_deploy.engines.estimate.estimate import quantized_nodes
from tap_deploy.engines.estimate.roofline import stage_estimate
from tap_deploy.engines.estimate.work import graph_works

GRAPHS = {
    ENCODE: graphs.IMAGE_ENCODER,
    DECODE: graphs.PROMPT_DECODER,
    CAPTION: graphs.TEXT_DECODER,
}


def peak_shares(
    bundle: Bundle, precision: str, profile: str, timed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return, per stage of one graph, its share of the peaks of arithmetic and of bandwidth.

    Args:
        bundle: what ran.
        precision: in which precision.
        profile: name of the device in ``device_profiles``.
        timed: the stages of a report, see ``benchmarks.engines``.

    Raises:
        InputError: there is no such device.
    """
    device, quantized = device_profile(profile), quantized_nodes(bundle.manifest)
    shares = []
    for stage in timed:
        graph = GRAPHS.get(stage["kind"])
        if graph is None:
            continue
        calls = stage["tokens"] + 1 if stage["kind"] == CAPTION else 1
        # A step reads the slots before it: half of them on average.
        works = graph_works(
            bundle.config,
            prompts=stage["prompts"],
            points=2,
            slots=max(1, calls // 2),
            quantized=quantized,
        )
        estimate = stage_estimate(stage["stage"], works[graph], device, precision, calls=calls)
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
