"""How near a measured stage comes to what the device could do at its stated peaks."""

from __future__ import annotations

from typing import Any

from benchmarks.stages import CAPTION, DECODE, ENCODE
from tap_deploy import graphs
from tap_deploy.bundle import Bundle
from tap_deploy.engines.device_profiles import device_profile
from tap_deploy.engines.roofline import stage_estimate
from tap_deploy.engines.work import count_work

GRAPHS = {
    ENCODE: graphs.IMAGE_ENCODER,
    DECODE: graphs.PROMPT_DECODER,
    CAPTION: graphs.TEXT_DECODER,
}


def peak_shares(
    bundle: Bundle, variant: str, precision: str, profile: str, timed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return, per stage of one graph, its share of the peaks of arithmetic and of bandwidth.

    Args:
        bundle: has the graphs that ran.
        variant: which of them.
        precision: of their products.
        profile: name of the device in ``device_profiles``.
        timed: the stages of a report, see ``benchmarks.engines``.

    Raises:
        InputError: there is no such device.
        BundleError: a graph cannot be counted.
    """
    device, specs = device_profile(profile), bundle.graph_specs(variant)
    shares = []
    for stage in timed:
        graph = GRAPHS.get(stage["kind"])
        if graph is None:
            continue
        calls = stage["tokens"] + 1 if stage["kind"] == CAPTION else 1
        # A step reads the slots before it: half of them on average.
        axes = {"B": 1, "P": stage["prompts"], "N": 2, "M": 1, "T": max(1, calls // 2), "K": 1}
        names = {a for t in specs[graph].inputs for a in t.shape if isinstance(a, str)}
        work = count_work(
            bundle.graph_path(graph, variant), specs[graph], {name: axes[name] for name in names}
        )
        estimate = stage_estimate(stage["stage"], work, device, precision, calls=calls)
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
