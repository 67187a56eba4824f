"""The contract of device memory, on both packages: real copies, errors, recorded graphs."""

from __future__ import annotations

import concurrent.futures
import gc
import sys
import threading

import numpy as np
import pytest

from tap_deploy.errors import MissingDependencyError, SessionError
from tap_deploy.sessions.gpu.buffers import Buffers
from tap_deploy.sessions.gpu.open_memory import open_device_memory
from tests.fake_cuda import (
    CudaError,
    FakeCuda,
    block_cuda,
    install_cuda_python,
    install_pycuda,
)

PACKAGES = ("cuda-python", "old cuda-python", "pycuda")


@pytest.fixture
def cuda():
    return FakeCuda(devices=2)


@pytest.fixture(params=PACKAGES)
def memory(request, monkeypatch, cuda):
    if request.param == "pycuda":
        install_pycuda(monkeypatch, cuda)
    else:
        install_cuda_python(monkeypatch, cuda, old=request.param != "cuda-python")
    return open_device_memory()


def test_there_and_back(memory, cuda):
    with memory.activated():
        stream, address, other = memory.create_stream(), memory.alloc(4000), memory.alloc(4000)
        assert address % 256 == 0
        block = memory.alloc_pinned(4000)
        array = block.array.view(np.float32)
        array[:] = np.arange(1000)
        memory.copy_to_device(address, array, stream)
        memory.copy_on_device(other, address + 400, 2000, stream)
        memory.clear(other, 40, stream)
        memory.synchronize(stream)
        array[:] = -1
        memory.copy_to_host(array[:500], other, stream)
        assert (array == -1).all()  # it has not happened yet
        memory.synchronize(stream)
        np.testing.assert_array_equal(array[:10], np.zeros(10))
        np.testing.assert_array_equal(array[10:500], np.arange(110, 600))
        assert (array[500:] == -1).all()
        memory.free(address)
        memory.free(other)
        memory.free_pinned(block)
        memory.destroy_stream(stream)
    gc.collect()
    assert cuda.leaks() == {}


def test_rows_go_where_their_pitch_says(memory, cuda):
    with memory.activated():
        stream, source, target = memory.create_stream(), memory.alloc(96), memory.alloc(160)
        block = memory.alloc_pinned(96)
        block.array[:] = np.arange(96)
        memory.copy_to_device(source, block.array, stream)
        memory.clear(target, 160, stream)
        memory.copy_rows_on_device(target + 8, 40, source, 24, 16, 4, stream)
        memory.synchronize(stream)
        expected = np.zeros((4, 40), np.uint8)
        expected[:, 8:24] = np.arange(96).reshape(4, 24)[:, :16]
        np.testing.assert_array_equal(cuda.device_view(target, 160).reshape(4, 40), expected)
        with pytest.raises(SessionError, match="IllegalAddress"):
            memory.copy_rows_on_device(target, 40, source, 24, 16, 5, stream)
        memory.free(source)
        memory.free(target)
        memory.free_pinned(block)


def test_recorded_work_is_done_again(memory, cuda):
    with memory.activated():
        stream, address = memory.create_stream(), memory.alloc(256)
        block = memory.alloc_pinned(256)
        block.array[:] = 7
        graph = memory.capture(stream, lambda: memory.copy_to_device(address, block.array, stream))
        memory.synchronize(stream)
        assert (cuda.device_view(address, 256) == 0xFF).all()  # recorded, not done
        for value in (7, 8):
            block.array[:] = value
            memory.launch(graph, stream)
            memory.synchronize(stream)
            assert (cuda.device_view(address, 256) == value).all()
        memory.destroy_graph(graph)
        del graph
        gc.collect()
        assert cuda.graphs == {}


def test_a_recording_that_fails_leaves_the_stream_usable(memory, cuda):
    with memory.activated():
        stream, address = memory.create_stream(), memory.alloc(256)

        def spoil():
            memory.clear(address, 256, stream)
            memory.alloc(256)

        with pytest.raises(SessionError, match=r"StreamCapture|STREAM_CAPTURE"):
            memory.capture(stream, spoil)
        assert cuda.last_error == 0  # or the next call of CUDA's runtime reports it
        memory.clear(address, 256, stream)
        memory.synchronize(stream)
        assert not cuda.device_view(address, 256).any()
        memory.free(address)
        assert cuda.device_blocks == {}
    gc.collect()
    assert cuda.graphs == {}


BEGIN = {"pycuda": "cuStreamBeginCapture_v2", "cuda-python": "cudaStreamBeginCapture"}
INSTANTIATE = {
    "pycuda": "cuGraphInstantiateWithFlags",
    "cuda-python": "cudaGraphInstantiateWithFlags",
}


@pytest.mark.parametrize("functions", [BEGIN, INSTANTIATE, dict.fromkeys(BEGIN, "end_capture")])
@pytest.mark.parametrize("times", [1, 2])
def test_a_recording_that_fails_is_tried_once_more(memory, cuda, functions, times):
    with memory.activated():
        stream, address = memory.create_stream(), memory.alloc(256)
        cuda.fail(functions[memory.name], times=times)
        calls = []

        def enqueue():
            calls.append(None)
            memory.clear(address, 256, stream)

        if times == 2:
            with pytest.raises(SessionError, match=r"(?i)launch_?failure"):
                memory.capture(stream, enqueue)
            assert cuda.graphs == {}
        graph = memory.capture(stream, enqueue)
        assert len(cuda.graphs) == 1
        memory.launch(graph, stream)
        memory.synchronize(stream)
        assert not cuda.device_view(address, 256).any()
        memory.destroy_graph(graph)
        memory.free(address)


def test_garbage_is_left_alone_while_something_is_recorded(memory, cuda):
    """GPU memory found by the garbage collector must not be freed during a recording."""
    thresholds = gc.get_threshold()
    with memory.activated():
        stream, address = memory.create_stream(), memory.alloc(256)

        class Held:
            def __init__(self, address):
                self.myself, self.address = self, address

            def __del__(self):
                memory.free(self.address)

        def enqueue():
            Held(spare.pop())  # garbage at once
            assert len([[] for _ in range(100)]) == 100  # enough to start a collection
            memory.clear(address, 256, stream)

        for collects in (True, False):
            spare = [memory.alloc(256)]
            try:
                gc.set_threshold(1)
                (gc.enable if collects else gc.disable)()
                graph = memory.capture(stream, enqueue)
                assert gc.isenabled() == collects  # as it was found
            finally:
                gc.set_threshold(*thresholds)
                gc.enable()
            memory.destroy_graph(graph)
            gc.collect()
            assert list(cuda.device_blocks) == [address]
        memory.free(address)


def test_other_threads_may_allocate_while_one_records(memory, cuda):
    with memory.activated(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = memory.create_stream()

        def allocate():
            with memory.activated():
                memory.free(memory.alloc(256))

        memory.destroy_graph(memory.capture(stream, lambda: pool.submit(allocate).result()))
    assert not cuda.leaks().get("graphs")


def test_errors_are_one_line_of_ours(memory, cuda):
    cuda.memory_bytes = 1000
    with memory.activated():
        with pytest.raises(SessionError, match=r"^CUDA: .*MemoryAllocation.*; use fewer") as c:
            memory.alloc(2000)
        assert "\n" not in str(c.value)
        stream = memory.create_stream()
        block = memory.alloc_pinned(512)
        with pytest.raises(SessionError, match="IllegalAddress"):
            memory.copy_to_device(123, block.array, stream)
        address = memory.alloc(256)
        with pytest.raises(SessionError, match="IllegalAddress"):
            memory.copy_to_device(address, block.array, stream)  # 512 bytes into 256
        with pytest.raises(SessionError, match="IllegalAddress"):
            memory.copy_to_device(address, np.zeros(4, np.uint8), stream)  # not pinned


def test_mapped_memory_is_one_memory(memory, cuda):
    with memory.activated():
        buffers = Buffers(memory)
        tensor, stream = buffers.staged(512, zero_copy=True), buffers.stream()
        tensor.upload(np.arange(128, dtype=np.float32), stream)
        assert cuda.copies == []
        np.testing.assert_array_equal(
            cuda.device_view(tensor.address, 512).view(np.float32), np.arange(128)
        )
        fetched = tensor.download((2, 8), "float32", stream)
        np.testing.assert_array_equal(fetched, np.arange(16).reshape(2, 8))
        buffers.close()
    gc.collect()
    assert cuda.leaks() == {}


def test_the_other_gpu(memory, monkeypatch, cuda):
    assert open_device_memory(1).device_index == 1
    with pytest.raises(SessionError):
        open_device_memory(2)
    with memory.activated():
        assert memory.compute_capability == "8.9"


def test_pycuda_works_in_the_primary_context(monkeypatch, cuda):
    """Calls fail in a thread without it; with it, the previous context is restored."""
    install_pycuda(monkeypatch, cuda)
    memory = open_device_memory()
    with pytest.raises(SessionError, match="invalid device context"):
        memory.alloc(256)
    with memory.activated():
        memory.free(memory.alloc(256))
    with pytest.raises(SessionError, match="invalid device context"):
        memory.alloc(256)


def test_the_other_gpu_with_pycuda(monkeypatch, cuda):
    """Its ``Context.get_device`` is static and returns the device of the current context."""
    install_pycuda(monkeypatch, cuda)
    memory = open_device_memory(1)
    assert memory.compute_capability == "8.9"
    with memory.activated():
        assert memory._context.get_device().index == 1


def test_pycuda_leaves_no_context_on_a_thread(monkeypatch, cuda):
    """It would abort the process when the thread ends."""
    install_pycuda(monkeypatch, cuda)

    def use():
        memory = open_device_memory()
        with memory.activated():
            memory.free(memory.alloc(256))

    for _ in range(2):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    gc.collect()
    assert cuda.aborts == []


def test_pycuda_without_the_library_of_the_driver(monkeypatch, cuda):
    """All but recording works."""
    install_pycuda(monkeypatch, cuda, library=False)
    memory = open_device_memory()
    with memory.activated():
        stream = memory.create_stream()
        with pytest.raises(
            SessionError, match=r"libcuda\.so\.1 cannot be used: .*update the driver"
        ):
            memory.capture(stream, lambda: None)
        memory.free(memory.alloc(256))


def install_both(monkeypatch, cuda):
    install_pycuda(monkeypatch, cuda)
    pycuda = {name: sys.modules[name] for name in ("pycuda", "pycuda.driver")}
    install_cuda_python(monkeypatch, cuda)
    for name, module in pycuda.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_cuda_python_is_taken_first(monkeypatch, cuda):
    install_both(monkeypatch, cuda)
    assert open_device_memory().name == "cuda-python"


def test_pycuda_where_cuda_python_is_too_new_for_the_driver(monkeypatch, cuda):
    install_both(monkeypatch, cuda)
    cuda.fail("cudaGetDeviceCount", code=CudaError.cudaErrorInsufficientDriver)
    assert open_device_memory().name == "pycuda"
    with pytest.raises(SessionError, match="there is no GPU 3; this machine has 2"):
        open_device_memory(3)  # neither has it: the first one says so


def test_cuda_python_gives_the_chosen_gpu_back(monkeypatch, cuda):
    install_cuda_python(monkeypatch, cuda)
    first, second = open_device_memory(0), open_device_memory(1)
    with first.activated(), second.activated():
        assert second._call("cudaGetDevice") == 1
    assert first._call("cudaGetDevice") == 0


def test_neither_package(monkeypatch):
    block_cuda(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"cuda-python: .*pycuda: .*\[cuda\]"):
        open_device_memory()


def test_no_driver(monkeypatch, cuda):
    install_cuda_python(monkeypatch, cuda)
    cuda.fail("cudaGetDeviceCount", code=CudaError.cudaErrorNoDevice)
    with pytest.raises(SessionError, match=r"CUDA: cudaGetDeviceCount failed: cudaErrorNoDevice"):
        open_device_memory()
