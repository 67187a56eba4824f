"""Steps: what the GPU answers for the micro bundle, beside the reference and the CPU."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.context import MICRO, Context, Notes, Skipped, StepFailed
from benchmarks.gpu.provider import require_provider
from tap_deploy import Regions, TapPredictor
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.precisions import FP16, FP32, variant_for
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.verify.graph_check import verify_sessions
from tap_deploy.verify.tolerances import TOLERANCES, Tolerances, tolerances_for

BACKEND = "onnxruntime"
BOXES = [[10, 20, 200, 250], [172, 17, 412, 308], [0, 0, 599, 399], [285, 160, 300, 180]] * 3
FLOATS = ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings")
# The same work twice, and in fp32; a session may have found other kernels than the one before.
SAME = 1e-3
# In fewer bits other kernels round otherwise: floats as a share of the largest, choices as a share.
SIMILAR, CHOSEN_ALIKE = 0.02, 0.9
CYCLES = 4
LEAK_BYTES = 32 << 20


def run(context: Context, notes: Notes, precision: str, tf32: bool = False) -> None:
    """Verify, then predict in every way that a predictor can be loaded; each way is a check."""
    require_provider()
    bundle = Bundle.open(context.bundle(MICRO))
    variant = variant_for(precision, on_cpu=False)
    if variant not in bundle.manifest.graphs:
        raise Skipped(f"the micro bundle has no {precision}")
    with notes.check("verify") as found:
        found["comparisons"] = _verify(bundle, precision, variant, tf32)
    pictures = _pictures(context.project)
    exact = precision == FP32 and not tf32
    bench = _Bench(bundle.path, precision, pictures, exact=exact, tf32=tf32)
    for name, check in (
        ("A, B, A", bench.sequence),
        ("as on the CPU", bench.like_cpu),
        ("without CUDA graphs", lambda: bench.another_way(cuda_graphs=False)),
        ("zero copy", lambda: bench.another_way(zero_copy=True)),
        ("a poll every step", lambda: bench.another_way(eos_interval_steps=1)),
        ("two contexts", bench.two_contexts),
        ("close gives the memory back", bench.memory_left),
    ):
        with notes.check(name) as found:
            found |= check() or {}
    notes.require()


def _verify(bundle: Bundle, precision: str, variant: str, tf32: bool) -> list[str]:
    """Hold every graph against the golden sample; return one line a comparison."""
    # TF32 has as many bits as fp16, and the same tolerance.
    tolerances: Tolerances = (
        TOLERANCES[FP16]
        if tf32
        else tolerances_for(precision, bundle.manifest.precisions.get(variant, {}))
    )
    with contextlib.ExitStack() as stack:
        sessions = sessions_from_bundle(
            bundle,
            BACKEND,
            precision,
            device="cuda",
            options=DeviceOptions(tf32=tf32),
            allow_failed=True,
        )
        for session in sessions.values():
            stack.enter_context(session)
        report = verify_sessions(
            sessions,
            bundle.config,
            [GoldenSample.load(bundle.golden_path())],
            backend=BACKEND,
            precision=precision,
            tolerances=tolerances,
        )
    print(report, flush=True)
    if not report.passed:
        raise StepFailed(next(str(check) for check in report.checks if not check.passed))
    return [str(check) for check in report.checks]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures:
    """Two pictures, uint8 ``[H, W, 3]`` RGB, of one size."""

    a: np.ndarray
    b: np.ndarray


def _pictures(project: pathlib.Path) -> _Pictures:
    with Image.open(project / "tests" / "data" / "coffee.jpg") as photo:
        a = np.asarray(photo.convert("RGB"))
    return _Pictures(a=a, b=np.ascontiguousarray(a[::-1, ::-1]))


class _Bench:
    """Predictions of one precision; each method returns details, or raises what is wrong."""

    def __init__(
        self,
        path: pathlib.Path,
        precision: str,
        pictures: _Pictures,
        *,
        exact: bool,
        tf32: bool,
    ) -> None:
        self._path, self._precision, self._pictures = path, precision, pictures
        self._compare = require_same if exact else require_similar
        self._exact, self._tf32 = exact, tf32
        self._first: Regions | None = None

    @contextlib.contextmanager
    def _loaded(self, **options: Any) -> Iterator[TapPredictor]:
        # 12 boxes: two chunks.
        chosen = DeviceOptions(max_prompts=8, max_points=8, tf32=self._tf32, **options)
        with TapPredictor.from_bundle(
            self._path,
            BACKEND,
            self._precision,
            device="cuda",
            device_options=chosen,
            allow_failed=True,
        ) as predictor:
            yield predictor

    def _a(self) -> Regions:
        """What the default way answers for picture A."""
        if self._first is None:
            raise Skipped("there is nothing to compare with: the first prediction failed")
        return self._first

    def sequence(self) -> None:
        """The answer for a picture does not depend on what came before it."""
        with self._loaded() as predictor:
            first, other, again = (
                predictor.predict(picture, boxes=BOXES)
                for picture in (self._pictures.a, self._pictures.b, self._pictures.a)
            )
        require_same(again, first)
        if np.array_equal(other.low_res_masks, first.low_res_masks):
            raise StepFailed("two different pictures have the same masks")
        self._first = first

    def like_cpu(self) -> dict[str, Any]:
        """Agreement with fp32 on the CPU; fp32 without TF32 has to be the same."""
        with TapPredictor.from_bundle(self._path) as predictor:
            expected = predictor.predict(self._pictures.a, boxes=BOXES)
        if self._exact:
            require_same(self._a(), expected)
        return agreement(self._a(), expected)

    def another_way(self, **options: Any) -> None:
        """Three predictions, as later ones are replayed."""
        with self._loaded(**options) as predictor:
            for _ in range(3):
                self._compare(predictor.predict(self._pictures.a, boxes=BOXES), self._a())

    def two_contexts(self) -> None:
        """Four threads, two lanes, two pictures in turns."""
        with (
            self._loaded(contexts=2) as predictor,
            concurrent.futures.ThreadPoolExecutor(4) as pool,
        ):
            turns = [self._pictures.a, self._pictures.b] * 4
            answers = list(pool.map(lambda each: predictor.predict(each, boxes=BOXES), turns))
        for answer in answers[::2]:
            self._compare(answer, self._a())
        for answer in answers[3::2]:
            self._compare(answer, answers[1])

    def memory_left(self) -> dict[str, Any]:
        """Bytes of the GPU that loading, predicting and closing keeps; the first time may."""
        free = []
        for _ in range(CYCLES):
            with self._loaded() as predictor:
                predictor.predict(self._pictures.a, boxes=BOXES)
            free.append(_free_bytes())
        lost = free[0] - free[-1]
        if lost > LEAK_BYTES:
            raise StepFailed(f"{lost / 1e6:.0f} MB are gone after {CYCLES - 1} more cycles")
        return {"free_bytes": free}


def require_same(actual: Regions, expected: Regions) -> None:
    """Compare two answers for the same picture.

    Raises:
        StepFailed: choices or captions differ, or a float by more than ``SAME``.
    """
    for name in ("caption_ids", "mask_index"):
        found, wanted = getattr(actual, name), getattr(expected, name)
        if not np.array_equal(found, wanted):
            raise StepFailed(f"{name}: {(found != wanted).sum()} of {found.size} differ")
    for name in FLOATS:
        off = float(np.abs(getattr(actual, name) - getattr(expected, name)).max())
        if not off <= SAME:
            raise StepFailed(f"{name}: off by {off:.3g}, expected {SAME}")


def require_similar(actual: Regions, expected: Regions) -> None:
    """Compare two answers of one precision, made by sessions that may use other kernels.

    Raises:
        StepFailed: too many choices differ, or a float of regions with the same choice does.
    """
    for name in ("caption_ids", "mask_index"):
        share = float((getattr(actual, name) == getattr(expected, name)).mean())
        if share < CHOSEN_ALIKE:
            raise StepFailed(f"{name}: {share:.2f} are the same, expected {CHOSEN_ALIKE}")
    rows = actual.mask_index == expected.mask_index
    for name in FLOATS:
        wanted = getattr(expected, name)[rows]
        off = float(np.abs(getattr(actual, name)[rows] - wanted).max() / np.abs(wanted).max())
        if not off <= SIMILAR:
            raise StepFailed(f"{name}: off by {off:.3g} of the largest, expected {SIMILAR}")


def agreement(actual: Regions, expected: Regions) -> dict[str, float]:
    """Return which share of choices, tokens and mask pixels is the same, and the largest errors."""
    shares = {
        name: float((getattr(actual, name) == getattr(expected, name)).mean())
        for name in ("caption_ids", "mask_index", "masks")
    }
    errors = {
        f"{name}_max_abs": float(np.abs(getattr(actual, name) - getattr(expected, name)).max())
        for name in FLOATS
    }
    return shares | errors


def _free_bytes() -> int:
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as exc:
        raise Skipped(
            f"cuda-bindings is not installed, which knows the free memory: {exc}"
        ) from exc
    error, free, _ = runtime.cudaMemGetInfo()
    if int(error):
        raise StepFailed(f"cudaMemGetInfo: {error}")
    return int(free)
