"""Device memory and the decode loop on CUDA alone, without an engine: on the fake, and on a GPU.

The same checks run on ``tests.fake_cuda`` everywhere, and with ``pytest -m gpu`` on a real GPU,
with each CUDA package that is installed. There, kernels of CuPy stand in for the graph.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, EOS_ID, TapConfig
from tap_deploy.errors import SessionError
from tap_deploy.sessions.contract import resolve_shape
from tap_deploy.sessions.gpu.buffers import Buffers
from tap_deploy.sessions.gpu.captioner import DeviceCaptioner
from tap_deploy.sessions.gpu.cuda_python import CudaPythonMemory
from tap_deploy.sessions.gpu.graph import DeviceExecutor, DeviceGraph
from tap_deploy.sessions.gpu.memory import ALIGNMENT_BYTES, DeviceMemory
from tap_deploy.sessions.gpu.pycuda import PycudaMemory
from tap_deploy.sessions.gpu.stopwatch import Stopwatch
from tap_deploy.sessions.options import DeviceOptions
from tests.fake_cuda import FakeCuda, install_cuda_python, install_pycuda

# CuPy 14 renames ExternalStream.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PACKAGES: dict[str, Callable[[], DeviceMemory]] = {
    "cuda-python": CudaPythonMemory,
    "pycuda": PycudaMemory,
}
FIRST_ID = EOS_ID + 1  # no caption ends early
MOST_ROWS = 64

# A fake step of the text decoder, whose outputs depend on its inputs. ``fold`` adds up a cache,
# ``fill`` writes a new slot, ``choose`` the next ids.
SOURCE = """
extern "C" __global__ void fold(const float* values, unsigned long long count, unsigned* total) {
    unsigned sum = 0;
    for (unsigned long long i = threadIdx.x; i < count; i += blockDim.x) sum += (unsigned)values[i];
    atomicAdd(total, sum);
}
extern "C" __global__ void fill(float* values, unsigned long long count, const int* position) {
    for (unsigned long long i = threadIdx.x; i < count; i += blockDim.x)
        values[i] = (float)(position[0] + 1);
}
extern "C" __global__ void choose(
    const int* ids, const int* position, const float* tokens, unsigned width,
    const unsigned* total, int* next, unsigned rows, unsigned first, unsigned choices
) {
    unsigned row = threadIdx.x;
    if (row >= rows) return;
    unsigned sum = 31u * (unsigned)ids[row] + 17u * (unsigned)position[0] + total[0] / rows;
    for (unsigned i = 0; i < width; ++i) sum += (i + 1u) * (unsigned)tokens[row * width + i];
    next[row] = (int)(first + sum % choices);
}
"""
# Of their arguments: pointers and 64-bit numbers, 32-bit numbers.
ARGUMENTS = {"fold": "LLL", "fill": "LLL", "choose": "LLLILLIII"}
Launch = Callable[..., None]  # stream, name of a kernel, its arguments as ints


def launch_with_cupy() -> Launch:
    cupy = pytest.importorskip("cupy", reason="the kernels of this test need CuPy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        pytest.skip(f"no NVIDIA GPU, or no driver for it: {exc}")
    kernels: dict[str, Any] = {}

    def launch(stream: int, name: str, *arguments: int) -> None:
        if name not in kernels:
            kernels[name] = cupy.RawKernel(SOURCE, name)
        kinds = zip(ARGUMENTS[name], arguments, strict=True)
        typed = tuple(np.uint64(n) if kind == "L" else np.uint32(n) for kind, n in kinds)
        threads = MOST_ROWS if name == "choose" else 256
        with cupy.cuda.ExternalStream(stream):
            kernels[name]((1,), (threads,), typed)

    return launch


def launch_on(cuda: FakeCuda) -> Launch:
    def floats(address: int, count: int) -> np.ndarray:
        return cuda.device_view(address, 4 * count).view(np.float32)

    def ints(address: int, count: int, dtype: type = np.int32) -> np.ndarray:
        return cuda.device_view(address, 4 * count).view(dtype)

    def fold(values: int, count: int, total: int) -> None:
        ints(total, 1, np.uint32)[0] += np.uint32(floats(values, count).astype(np.uint64).sum())

    def fill(values: int, count: int, position: int) -> None:
        floats(values, count)[:] = ints(position, 1)[0] + 1

    def choose(
        ids: int,
        position: int,
        tokens: int,
        width: int,
        total: int,
        following: int,
        rows: int,
        first: int,
        choices: int,
    ) -> None:
        summed = 31 * ints(ids, rows).astype(np.int64) + 17 * int(ints(position, 1)[0])
        summed += int(ints(total, 1, np.uint32)[0]) // rows
        table = floats(tokens, rows * width).reshape(rows, width).astype(np.int64)
        summed += table @ np.arange(1, width + 1)
        ints(following, rows)[:] = first + summed % choices

    kernels: dict[str, Callable[..., None]] = {"fold": fold, "fill": fill, "choose": choose}

    def launch(stream: int, name: str, *arguments: int) -> None:
        with cuda.lock:
            cuda.enqueue(stream, lambda: kernels[name](*arguments))

    return launch


class Gpu:
    """A CUDA package, and kernels beside it."""

    def __init__(self, memory: DeviceMemory, launch: Launch) -> None:
        self.memory, self.launch = memory, launch

    @contextlib.contextmanager
    def buffers(self) -> Iterator[Buffers]:
        """Memory of one test; freed at its end."""
        with self.memory.activated():
            buffers = Buffers(self.memory)
            try:
                yield buffers
            finally:
                buffers.close()


@pytest.fixture(
    params=[
        *(pytest.param((name, False), id=f"fake {name}") for name in PACKAGES),
        *(pytest.param((name, True), id=name, marks=pytest.mark.gpu) for name in PACKAGES),
    ]
)
def gpu(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    name, real = request.param
    if real:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns about missing libraries
            launch = launch_with_cupy()
        try:
            memory = PACKAGES[name]()
        except ImportError as exc:
            pytest.skip(f"{name} is not installed: {exc}")
        yield Gpu(memory, launch)
        return
    cuda = FakeCuda()
    (install_pycuda if name == "pycuda" else install_cuda_python)(monkeypatch, cuda)
    yield Gpu(PACKAGES[name](), launch_on(cuda))
    assert cuda.leaks() == {}
    assert cuda.aborts == []


def fetched(buffers: Buffers, address: int, count: int, stream: int) -> np.ndarray:
    """Return float32 ``[count]`` from an address."""
    array = buffers.pinned(4 * count).view(np.float32)
    buffers.memory.copy_to_host(array, address, stream)
    buffers.memory.synchronize(stream)
    return array.copy()


def test_copies_and_clears(gpu):
    memory = gpu.memory
    with gpu.buffers() as buffers:
        stream, other = buffers.stream(), buffers.device(4000)
        tensor = buffers.staged(4000)
        assert tensor.address % ALIGNMENT_BYTES == other % ALIGNMENT_BYTES == 0
        numbers = np.arange(1000, dtype=np.float32)
        tensor.upload(numbers, stream)
        memory.copy_on_device(other, tensor.address, 4000, stream)
        memory.clear(other, 400, stream)
        expected = np.where(numbers < 100, 0, numbers)
        np.testing.assert_array_equal(fetched(buffers, other, 1000, stream), expected)
        np.testing.assert_array_equal(fetched(buffers, tensor.address, 1000, stream), numbers)
    assert float(memory.compute_capability) > 1


def test_rows_go_where_their_pitch_says(gpu):
    with gpu.buffers() as buffers:
        stream, target, source = buffers.stream(), buffers.device(4 * 70), buffers.staged(4 * 60)
        source.upload(np.arange(60, dtype=np.float32), stream)
        gpu.memory.clear(target, 4 * 70, stream)
        gpu.memory.copy_rows_on_device(target + 8, 40, source.address, 24, 16, 7, stream)
        expected = np.zeros((7, 10), np.float32)
        expected[:, 2:6] = np.arange(42).reshape(7, 6)[:, :4]
        actual = fetched(buffers, target, 70, stream)
        np.testing.assert_array_equal(actual.reshape(7, 10), expected)


def test_mapped_memory_is_one_memory(gpu):
    with gpu.buffers() as buffers:
        stream, tensor = buffers.stream(), buffers.staged(4000, zero_copy=True)
        tensor.upload(np.arange(1000, dtype=np.float32), stream)
        actual = fetched(buffers, tensor.address, 1000, stream)
        np.testing.assert_array_equal(actual, np.arange(1000))
        gpu.memory.clear(tensor.address, 2000, stream)
        gpu.memory.synchronize(stream)
        host = tensor.download((1000,), "float32", stream)
        np.testing.assert_array_equal(host, np.where(np.arange(1000) < 500, 0, np.arange(1000)))


def test_a_stopwatch_times_what_a_stream_does(gpu):
    with gpu.buffers() as buffers:
        stream, target = buffers.stream(), buffers.device(1 << 20)
        watch = Stopwatch(gpu.memory, stream)

        def clear(times):
            for _ in range(times):
                gpu.memory.clear(target, 1 << 20, stream)
            return times

        for _ in range(2):  # the first time is not asked for
            assert watch.time(lambda: clear(10)) == 10
        assert 0 < watch.elapsed_ms() < 1000

        def fail():
            raise ValueError("in the middle")

        with pytest.raises(ValueError, match="in the middle"):
            watch.time(fail)
        assert watch.elapsed_ms() >= 0  # the events are freed, and the stream is usable
        assert watch.time(lambda: clear(1)) == 1
        watch.elapsed_ms()


def test_what_was_recorded_is_done_again(gpu):
    memory = gpu.memory
    with gpu.buffers() as buffers:
        stream, target, source = buffers.stream(), buffers.device(512), buffers.staged(512)
        memory.clear(target, 512, stream)
        numbers = np.arange(128, dtype=np.float32)
        source.upload(numbers, stream)
        graph = memory.capture(
            stream, lambda: memory.copy_on_device(target, source.address, 512, stream)
        )
        assert not fetched(buffers, target, 128, stream).any()  # recorded, not done
        for value in (1, 2):
            source.upload(numbers + np.float32(value), stream)
            memory.launch(graph, stream)
            actual = fetched(buffers, target, 128, stream)
            np.testing.assert_array_equal(actual, numbers + value)
        memory.destroy_graph(graph)


@pytest.mark.parametrize("reason", ["an error of ours", "an allocation"])
def test_a_recording_that_is_given_up_leaves_all_usable(gpu, reason):
    memory = gpu.memory
    with gpu.buffers() as buffers:
        stream, address = buffers.stream(), buffers.device(512)

        def spoil() -> None:
            memory.clear(address, 512, stream)
            if reason == "an allocation":
                memory.free(memory.alloc(512))
            raise ValueError(reason)

        with pytest.raises(SessionError if reason == "an allocation" else ValueError):
            memory.capture(stream, spoil)
        memory.clear(address, 512, stream)
        assert not fetched(buffers, address, 128, stream).any()
        graph = memory.capture(stream, lambda: memory.clear(address, 512, stream))
        memory.launch(graph, stream)
        memory.synchronize(stream)
        memory.destroy_graph(graph)


def test_out_of_memory_and_on(gpu):
    with gpu.buffers() as buffers:
        for _ in range(2):
            with pytest.raises(SessionError, match=r"^CUDA: .*; use fewer contexts"):
                buffers.device(1 << 50)
        stream, address = buffers.stream(), buffers.device(512)
        gpu.memory.clear(address, 512, stream)
        assert not fetched(buffers, address, 128, stream).any()


def test_ten_thousand_allocations(gpu):
    memory = gpu.memory
    with memory.activated():
        for _ in range(200):
            addresses = [memory.alloc(1000) for _ in range(50)]
            assert len({*addresses}) == 50
            assert not any(address % ALIGNMENT_BYTES for address in addresses)
            for address in addresses:
                memory.free(address)


def test_four_threads(gpu):
    """Each copies, records and replays, while the others allocate."""
    memory = gpu.memory

    def work(number: int) -> None:
        with gpu.buffers() as buffers:
            stream, target, source = buffers.stream(), buffers.device(4096), buffers.staged(4096)
            for turn in range(10):
                memory.free(memory.alloc(1 << 16))
                numbers = np.full(1024, 100 * number + turn, np.float32)
                source.upload(numbers, stream)
                graph = memory.capture(
                    stream, lambda: memory.copy_on_device(target, source.address, 4096, stream)
                )
                memory.launch(graph, stream)
                np.testing.assert_array_equal(fetched(buffers, target, 1024, stream), numbers)
                memory.destroy_graph(graph)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()


class KernelGraph(DeviceGraph):
    """The text decoder's inputs and outputs, with ``SOURCE`` between them.

    Any float input but the tokens is a cache, any float output is filled: however many there are.
    """

    scratch_bytes = ALIGNMENT_BYTES
    can_record = True

    def __init__(self, gpu: Gpu, config: TapConfig) -> None:
        self.gpu, self.config = gpu, config
        self.spec = graphs.graph_specs(config)[graphs.TEXT_DECODER]
        candidates = graphs.draw_candidates(config)
        self.limits = {"P": MOST_ROWS, "T": config.text_seq_len, "K": candidates}
        self.minima = dict.fromkeys(self.limits, 1)
        inputs, outputs = (
            tuple(tensor for tensor in tensors if tensor.dtype == "float32")
            for tensors in (self.spec.inputs, self.spec.outputs)
        )
        self.caches = tuple(t for t in inputs if t.name in graphs.past_names(config))
        self.filled = outputs

    def executor(self, stream: int, scratch_address: int) -> KernelExecutor:
        return KernelExecutor(self, stream, scratch_address)

    def close(self) -> None: ...

    def expected(self, tokens: np.ndarray) -> np.ndarray:
        """Return ids ``[rows, text_seq_len - 1]`` that captions of tokens ``[rows, C]`` have."""
        slots, width = self.config.text_seq_len, tokens.shape[1]
        sizes = {"P": 1, "T": slots}
        per_slot = sum(math.prod(resolve_shape(t, sizes)) for t in self.caches) // slots
        ids = np.full((len(tokens), slots - 1), BOS_ID, np.int64)
        of_tokens = tokens.astype(np.int64) @ np.arange(1, width + 1)
        for position in range(1, slots - 1):
            cached = per_slot * sum(range(1, position + 1))  # slot q holds q + 1
            summed = 31 * ids[:, position - 1] + 17 * position + cached + of_tokens
            ids[:, position] = FIRST_ID + summed % (self.config.vocab_size - FIRST_ID)
        return ids


class KernelExecutor(DeviceExecutor):
    def __init__(self, graph: KernelGraph, stream: int, scratch: int) -> None:
        self._graph, self._stream, self._scratch = graph, stream, scratch
        self._sizes: dict[str, int] = {}
        self._at: dict[str, int] = {}

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)

    def bind(self, name: str, address: int) -> None:
        self._at[name] = address

    def enqueue(self) -> None:
        graph, stream, at = self._graph, self._stream, self._at
        launch, config = graph.gpu.launch, graph.config
        graph.gpu.memory.clear(self._scratch, ALIGNMENT_BYTES, stream)
        for tensor in graph.caches:
            count = math.prod(resolve_shape(tensor, self._sizes))
            launch(stream, "fold", at[tensor.name], count, self._scratch)
        for tensor in graph.filled:
            count = math.prod(resolve_shape(tensor, self._sizes))
            launch(stream, "fill", at[tensor.name], count, at[graphs.POSITION])
        launch(
            stream,
            "choose",
            *(at[n] for n in (graphs.INPUT_IDS, graphs.POSITION, graphs.SEMANTIC_TOKENS)),
            config.image_embed_dim,
            self._scratch,
            at[graphs.NEXT_IDS],
            self._sizes["P"],
            FIRST_ID,
            config.vocab_size - FIRST_ID,
        )

    def close(self) -> None:
        self._at.clear()


@contextlib.contextmanager
def opened_captioner(graph: KernelGraph, *, cuda_graphs: bool = True) -> Iterator[DeviceCaptioner]:
    """A captioner with a stream of its own."""
    options = DeviceOptions(cuda_graphs=cuda_graphs)
    with graph.gpu.buffers() as buffers:
        stream, scratch = buffers.stream(), buffers.device(graph.scratch_bytes)
        captioner = DeviceCaptioner(graph, graph.config, options, buffers, stream, scratch)
        try:
            yield captioner
        finally:
            captioner.close()


def some_tokens(config: TapConfig, rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 100, (rows, config.image_embed_dim)).astype(np.float32)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_captions_of_1_to_64_regions(gpu, micro_config, cuda_graphs, caplog):
    graph = KernelGraph(gpu, micro_config)
    with opened_captioner(graph, cuda_graphs=cuda_graphs) as captioner:
        for turn in range(3):
            for rows in (1, 2, 3, 7, 16, 33, 64):
                tokens = some_tokens(micro_config, rows, 100 * turn + rows)
                np.testing.assert_array_equal(captioner.generate(tokens), graph.expected(tokens))
        # Seven numbers of rows, of which six are recorded: 3 run as 4, 7 as 8, 33 as 64.
        steps = micro_config.text_seq_len - 1
        assert captioner.steps_replayed == ((21 - 6) * steps if cuda_graphs else 0)
    assert not caplog.records


def test_two_lanes_in_two_threads(gpu, micro_config, caplog):
    """Both record and replay at once; neither finds the other's ids or cache."""
    graph = KernelGraph(gpu, micro_config)

    def work(number: int) -> int:
        with opened_captioner(graph) as captioner:
            for turn in range(4):
                for rows in (1, 5, 8):
                    tokens = some_tokens(micro_config, rows, 1000 * number + 10 * turn + rows)
                    ids = captioner.generate(tokens)
                    np.testing.assert_array_equal(ids, graph.expected(tokens))
            return captioner.steps_replayed

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        replayed = [done.result() for done in [pool.submit(work, n) for n in range(2)]]
    assert min(replayed) > 0
    assert not caplog.records
