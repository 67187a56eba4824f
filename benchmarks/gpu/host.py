"""Steps: latency of the host's work, by NumPy threads and by concurrent callers."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.gpu.context import Context, Notes
from benchmarks.masks import blobs
from tap_deploy.image import Frame, load_image, model_image
from tap_deploy.machine.cpu import usable_cpus
from tap_deploy.masks import masks_from_logits, rles_from_logits
from tap_deploy.sessions.contract import to_float32
from tap_deploy.timing import measure

CALLERS = (4, 16)


def run(
    context: Context,
    notes: Notes,
    threads: int,
    regions: int = 47,
    width: int = 1920,
    height: int = 1080,
) -> None:
    """Note the median of every task in milliseconds.

    With one NumPy thread, also with several concurrent callers, if as many CPUs are usable.

    Args:
        context: its work folder receives a picture.
        notes: notes for the results.
        threads: threads of NumPy's matrix products, as set by the environment.
        regions: masks per call.
        width: width of the picture, pixels.
        height: height of the picture, pixels.
    """
    cpus = usable_cpus()
    notes.put("cpus", cpus)
    tasks = _tasks(context, regions, width, height)
    values: dict[str, float] = {}
    for name, call in tasks.items():
        values[name] = _median_ms(call, context.seconds)
        notes.put("values", values)
    for callers in (n for n in CALLERS if threads == 1 and n <= cpus):
        with concurrent.futures.ThreadPoolExecutor(callers) as pool:
            for name, call in tasks.items():
                at_once = functools.partial(_at_once, pool, [call] * callers)
                values[f"{name}, {callers} at once"] = _median_ms(at_once, context.seconds)
                notes.put("values", values)
    told = ", ".join(f"{name} {values[name]:.1f}" for name in tasks)
    notes.put("headline", f"{told} ms")


def _tasks(
    context: Context, regions: int, width: int, height: int
) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
    path = context.work / "picture.jpg"
    # Smooth the noise, which would be the worst case of JPEG decoding.
    small = Image.fromarray(rgb).resize((width // 16 + 1, height // 16 + 1))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    frame = Frame.for_image(height, width, 1024)
    logits = blobs(regions, frame, rng)
    outputs = {"low_res_masks": logits.astype(np.float16)}
    return {
        f"masks {regions} x {width}x{height}": lambda: masks_from_logits(logits, frame),
        f"run lengths {regions} x {width}x{height}": lambda: rles_from_logits(logits, frame),
        "resize and pad": lambda: model_image(rgb, 1024),
        "read a JPEG": lambda: load_image(path),
        f"logits {regions} to float32": lambda: to_float32(outputs),
    }


def _at_once(
    pool: concurrent.futures.ThreadPoolExecutor, calls: list[Callable[[], object]]
) -> list[object]:
    return [future.result() for future in [pool.submit(call) for call in calls]]


def _median_ms(call: Callable[[], object], seconds: float) -> float:
    found = measure({"": call}, min_iterations=3, min_seconds=seconds / 2, warm_up_seconds=0)
    return round(found[""].median_ms, 3)
