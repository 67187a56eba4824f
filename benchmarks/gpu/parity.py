"""Steps: parity of the micro bundle on the GPU with the reference and the CPU."""

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
from tap_deploy.precisions import FP16, FP32
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.verify.graph_check import verify_sessions
from tap_deploy.verify.tolerances import TOLERANCES, Tolerances, tolerances_for

BOXES = [[10, 20, 200, 250], [172, 17, 412, 308], [0, 0, 599, 399], [285, 160, 300, 180]] * 3
FLOATS = ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings")
# Tolerance of equal fp32 computations; two sessions may select different kernels.
SAME = 1e-3
# Below fp32, kernels round differently: error as a share of the largest value, share of equal
# choices.
SIMILAR, CHOSEN_ALIKE = 0.02, 0.9
CYCLES = 4
LEAK_BYTES = 32 << 20


def run(context: Context, notes: Notes, precision: str, tf32: bool = False) -> None:
    """Verify the graphs, then predict with every way to load a predictor; each is a check."""
    require_provider()
    bundle = Bundle.open(context.bundle(MICRO))
    run_on = RunOn(precision=precision, device="cuda", allow_failed=True)
    if run_on.variant not in bundle.manifest.graphs:
        raise Skipped(f"the micro bundle has no {precision}")
    with notes.check("verify") as found:
        found["comparisons"] = _verify(bundle, run_on, tf32)
    pictures = _pictures(context.project)
    exact = precision == FP32 and not tf32
    bench = _Bench(bundle.path, run_on, pictures, exact=exact, tf32=tf32)
    for name, check in (
        ("A, B, A", bench.sequence),
        ("same as on the CPU", bench.like_cpu),
        ("without CUDA graphs", lambda: bench.another_way(cuda_graphs=False)),
        ("zero copy", lambda: bench.another_way(zero_copy=True)),
        ("EOS poll every step", lambda: bench.another_way(eos_interval_steps=1)),
        ("two contexts", bench.two_contexts),
        ("close frees GPU memory", bench.memory_left),
    ):
        with notes.check(name) as found:
            found |= check() or {}
    notes.require()


def _verify(bundle: Bundle, run_on: RunOn, tf32: bool) -> list[str]:
    """Compare every graph with the golden sample; return one line per comparison."""
    # TF32 has as many mantissa bits as fp16, and the same tolerance.
    tolerances: Tolerances = (
        TOLERANCES[FP16]
        if tf32
        else tolerances_for(
            run_on.precision,
            bundle.manifest.precision_record(run_on.variant),
            in_tensorrt=run_on.in_tensorrt,
        )
    )
    with contextlib.ExitStack() as stack:
        sessions = sessions_from_bundle(bundle, run_on, DeviceOptions(tf32=tf32))
        for session in sessions.values():
            stack.enter_context(session)
        report = verify_sessions(
            sessions,
            bundle.config,
            [bundle.golden()],
            backend=run_on.backend,
            precision=run_on.precision,
            tolerances=tolerances,
        )
    print(report, flush=True)
    if not report.passed:
        raise StepFailed(next(str(check) for check in report.checks if not check.passed))
    return [str(check) for check in report.checks]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures:
    """Two pictures of equal size.

    Attributes:
        a: first picture, RGB uint8 ``[H, W, 3]``.
        b: second picture, RGB uint8 ``[H, W, 3]``.
    """

    a: np.ndarray
    b: np.ndarray


def _pictures(project: pathlib.Path) -> _Pictures:
    with Image.open(project / "tests" / "data" / "coffee.jpg") as photo:
        a = np.asarray(photo.convert("RGB"))
    return _Pictures(a=a, b=np.ascontiguousarray(a[::-1, ::-1]))


class _Bench:
    """Checks of one precision; each returns details or raises StepFailed."""

    def __init__(
        self,
        path: pathlib.Path,
        run_on: RunOn,
        pictures: _Pictures,
        *,
        exact: bool,
        tf32: bool,
    ) -> None:
        self._path, self._run_on, self._pictures = path, run_on, pictures
        self._compare = require_same if exact else require_similar
        self._exact, self._tf32 = exact, tf32
        self._first: Regions | None = None

    @contextlib.contextmanager
    def _loaded(self, **options: Any) -> Iterator[TapPredictor]:
        # 12 boxes with 8 prompts per call: two chunks.
        chosen = DeviceOptions(max_prompts=8, max_points=8, tf32=self._tf32, **options)
        with TapPredictor.from_bundle(
            self._path, device_options=chosen, **dataclasses.asdict(self._run_on)
        ) as predictor:
            yield predictor

    def _a(self) -> Regions:
        """Return the regions of picture A with default options."""
        if self._first is None:
            raise Skipped("nothing to compare with: the first prediction failed")
        return self._first

    def sequence(self) -> None:
        """Check that the result for a picture does not depend on the picture before it."""
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
        """Return the agreement with fp32 on the CPU; fp32 without TF32 must be the same."""
        with TapPredictor.from_bundle(self._path) as predictor:
            expected = predictor.predict(self._pictures.a, boxes=BOXES)
        if self._exact:
            require_same(self._a(), expected)
        return agreement(self._a(), expected)

    def another_way(self, **options: Any) -> None:
        """Compare three predictions with other options; the later ones replay CUDA graphs."""
        with self._loaded(**options) as predictor:
            for _ in range(3):
                self._compare(predictor.predict(self._pictures.a, boxes=BOXES), self._a())

    def two_contexts(self) -> None:
        """Compare predictions of four threads on two lanes, with alternating pictures."""
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
        """Check that load, predict and close free GPU memory; the first cycle may keep some."""
        free = []
        for _ in range(CYCLES):
            with self._loaded() as predictor:
                predictor.predict(self._pictures.a, boxes=BOXES)
            free.append(_free_bytes())
        lost = free[0] - free[-1]
        if lost > LEAK_BYTES:
            raise StepFailed(f"{lost / 1e6:.0f} MB leaked in {CYCLES - 1} cycles after the first")
        return {"free_bytes": free}


def require_same(actual: Regions, expected: Regions) -> None:
    """Check that two results for a picture are equal.

    Raises:
        StepFailed: choices or captions differ, or a float differs by more than ``SAME``.
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
    """Check that two results of one precision are similar; kernels may differ.

    Raises:
        StepFailed: too many choices differ, or a float differs by more than ``SIMILAR`` in a region
            with the same choice.
    """
    for name in ("caption_ids", "mask_index"):
        share = float((getattr(actual, name) == getattr(expected, name)).mean())
        if share < CHOSEN_ALIKE:
            raise StepFailed(f"{name}: share {share:.2f} is equal, expected {CHOSEN_ALIKE}")
    rows = actual.mask_index == expected.mask_index
    for name in FLOATS:
        wanted = getattr(expected, name)[rows]
        off = float(np.abs(getattr(actual, name)[rows] - wanted).max() / np.abs(wanted).max())
        if not off <= SIMILAR:
            raise StepFailed(f"{name}: off by {off:.3g} of the largest value, expected {SIMILAR}")


def agreement(actual: Regions, expected: Regions) -> dict[str, float]:
    """Return the shares of equal choices, tokens and mask pixels, and the largest errors."""
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
        raise Skipped(f"cuda-bindings is needed to query free memory: {exc}") from exc
    error, free, _ = runtime.cudaMemGetInfo()
    if int(error):
        raise StepFailed(f"cudaMemGetInfo: {error}")
    return int(free)
