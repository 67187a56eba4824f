"""Predictions in several threads: memory does not grow, and answers are those of one thread.

python -m tests.soak.predict [--predicts 10000] [--threads 4] [--settled 500] [--bundle FOLDER]
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
from PIL import Image

from tap_deploy import TapPredictor
from tap_deploy.console.exits import CleanExits
from tap_deploy.console.progress import share_bar
from tap_deploy.demo_model import DemoModel
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import return_freed_memory
from tap_deploy.regions import Regions
from tap_deploy.storage.unfinished import temporary_folder

SIZES = ((64, 48), (256, 256), (400, 130), (97, 333), (640, 480), (33, 31))  # width, height
PROMPTS = (1, 2, 3, 7, 16)
GROWTH_LIMIT = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A picture, uint8 [H, W, 3], and prompts: points [P, 1, 3] or boxes [P, 4], pixels."""

    picture: np.ndarray
    points: np.ndarray | None
    boxes: np.ndarray | None

    def digest(self, predictor: TapPredictor) -> str:
        """Predict, and return the digest of everything in the answer."""
        masks = "rle" if len(self.picture) % 2 else True
        answer = predictor.predict(self.picture, self.points, self.boxes, masks=masks)
        return digest_of(answer)


def cases(seed: int = 0) -> list[Case]:
    """Return a case for every size of a picture and number of prompts."""
    rng, made = np.random.default_rng(seed), []
    for width, height in SIZES:
        small = rng.integers(0, 256, (8, 8, 3), np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((width, height)))
        for count in PROMPTS:
            corners = np.sort(rng.random((count, 2, 2)), axis=1) * (width - 1, height - 1)
            points = np.concatenate([corners[:, :1], np.ones((count, 1, 1))], axis=2)
            is_box = len(made) % 2 == 1
            made.append(
                Case(
                    picture=picture,
                    points=None if is_box else points,
                    boxes=corners.reshape(count, 4) if is_box else None,
                )
            )
    return made


def digest_of(answer: Regions) -> str:
    """Return the SHA-256 of masks, scores, names, captions and embeddings, bit for bit."""
    digest = hashlib.sha256()
    for name in ("masks", "iou_predictions", "caption_ids", "semantic_embeddings"):
        value = getattr(answer, name)
        digest.update(b"" if value is None else np.ascontiguousarray(value).tobytes())
    digest.update(repr((answer.rles, answer.concepts, answer.captions)).encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory after some predictions.

    Attributes:
        predicts: predictions so far.
        resident_bytes: pages of the process.
        heap_bytes: what is allocated on the heap and not freed; 0 without glibc. If the pages grow
            and this does not, the heap is fragmented, and nothing leaks.
    """

    predicts: int
    resident_bytes: int
    heap_bytes: int

    @classmethod
    def now(cls, predicts: int) -> Memory:
        """Measure this process, after glibc has returned what is free in its arenas.

        Which arena holds how much that is free depends on the order of the threads: without this,
        the pages go up and down by 10 %.
        """
        gc.collect()
        return_freed_memory()
        pages = int(Host().text("/proc/self/statm").split()[1])
        return cls(predicts=predicts, resident_bytes=pages * 4096, heap_bytes=_heap_bytes())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Result of a soak.

    Attributes:
        wrong: predictions whose answer differs from that of one thread.
        memory: memory every so often, from the first measurement that counts.
        seconds: duration.
    """

    wrong: int
    memory: list[Memory]
    seconds: float

    @property
    def growth(self) -> float:
        """Growth of the resident memory since the first measurement, as a share of it."""
        return self.memory[-1].resident_bytes / self.memory[0].resident_bytes - 1


def soak(
    bundle: pathlib.Path,
    *,
    predicts: int,
    threads: int,
    settled: int,
    show: Callable[[float, str], object] = lambda share, text: None,
) -> Figures:
    """Predict in several threads on one predictor.

    First all threads run every case at the same time: onnxruntime keeps as much memory as it has
    needed at once, and by chance the largest cases would meet only after thousands of predictions.

    Args:
        bundle: the bundle.
        predicts: number of predictions.
        threads: threads that call ``predict``.
        settled: predictions before memory is measured for the first time.
        show: called with the finished share and a text.
    """
    every, started = cases(), time.monotonic()
    with TapPredictor.from_bundle(bundle) as predictor, ThreadPoolExecutor(threads) as pool:
        expected = [case.digest(predictor) for case in every]
        orders = [np.random.default_rng(1 + index) for index in range(threads)]
        wrong, memory, done, together = 0, [], 0, threading.Barrier(threads)
        # Measured between rounds, when no prediction is running.
        for round_size in _rounds(predicts, settled):
            turns = [order.integers(len(every), size=round_size // threads) for order in orders]
            if done == 0:
                for row in turns:
                    row[: len(every)] = range(len(every))[: len(row)]
            found: list[int] = [0] * threads

            def work(
                index: int,
                turns: list[np.ndarray] = turns,
                found: list[int] = found,
                done: int = done,
            ) -> None:
                try:
                    for count, turn in enumerate(turns[index]):
                        if done == 0 and count < len(every):
                            with contextlib.suppress(threading.BrokenBarrierError):
                                together.wait()
                        found[index] += every[turn].digest(predictor) != expected[turn]
                except BaseException:
                    together.abort()  # the others would wait for this thread
                    raise

            for result in [pool.submit(work, index) for index in range(threads)]:
                result.result()
            wrong, done = wrong + sum(found), done + sum(map(len, turns))
            memory.append(Memory.now(done))
            show(done / predicts, f"{memory[-1].resident_bytes / 1e6:.0f} MB, {wrong} wrong")
    return Figures(wrong=wrong, memory=memory, seconds=time.monotonic() - started)


def _rounds(predicts: int, settled: int) -> Iterator[int]:
    yield settled
    size = max(1, settled)
    for _ in range((predicts - settled) // size):
        yield size


class _HeapInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def _heap_bytes() -> int:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    function.restype = _HeapInfo
    info = function()
    return int(info.uordblks + info.hblkhd)


@click.command("predict", cls=CleanExits)
@click.option("--predicts", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--settled", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--bundle", type=click.Path(path_type=pathlib.Path), help="Default: tap_demo.")
def main(predicts: int, threads: int, settled: int, bundle: pathlib.Path | None) -> int:
    """Predict many times in several threads; exit with 1 if memory grows or answers differ."""
    with temporary_folder() as folder:
        if bundle is None:
            from tap_deploy.export.demo import export_demo

            bundle = export_demo(DemoModel(), folder / "tap_demo").path
        with share_bar("predict") as show:
            figures = soak(bundle, predicts=predicts, threads=threads, settled=settled, show=show)
    for memory in figures.memory:
        click.echo(
            f"{memory.predicts:6} predictions: {memory.resident_bytes / 1e6:.1f} MB resident, "
            f"{memory.heap_bytes / 1e6:.1f} MB of it allocated on the heap"
        )
    click.echo(
        f"{figures.memory[-1].predicts} predictions in {threads} threads and {figures.seconds:.0f} "
        f"s: {figures.wrong} wrong answers, memory grew by {100 * figures.growth:.2f} % after the "
        f"first {settled}"
    )
    return int(figures.wrong > 0 or figures.growth > GROWTH_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
