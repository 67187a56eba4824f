"""A whole predictor on a fake GPU and a strict fake of TensorRT, against onnxruntime on the CPU."""

from __future__ import annotations

import collections
import concurrent.futures
import gc
import logging
import math
import os
import pathlib
import pickle
import pwd
import shutil
import sys
from typing import Any

import numpy as np
import pytest

from tap_deploy import TapPredictor
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.bundle.precision_record import PrecisionRecord, SelftestMark, VerdictMark
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.bundle.variant import variant_specs
from tap_deploy.cli.verify import verify_bundle
from tap_deploy.engines.build.bundle_build import build_engines
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.engines.fp16.islands import choose_islands
from tap_deploy.engines.fp16.typed import half_from_single
from tap_deploy.errors import BundleError, InputError, MissingDependencyError, SessionError
from tap_deploy.machine.gpu import Gpu
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions import cache_folder
from tap_deploy.sessions.gpu.captioner import DeviceCaptioner
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.sessions.trt import engine as tensorrt_sessions
from tap_deploy.sessions.trt.engine import TensorRtEngine
from tests.fake_cuda import CudaError, FakeCuda, block_cuda, install_cuda_python, install_pycuda
from tests.strict_tensorrt import VERSIONS
from tests.strict_tensorrt_runtime import live_objects, runtime_module

ENGINES = [*(("tensorrt", version) for version in VERSIONS), ("tensorrt_rtx", "1.7")]
GPU = Gpu(name="Fake RTX", compute_capability="8.9", driver="580", integrated=False)
MAX_PROMPTS, MAX_POINTS = 4, 5
TOKENS = 7  # of a caption, unless a test is about its length: time


@pytest.fixture(scope="module")
def engine_bundle(micro_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The micro bundle with engines of every fake version."""
    path = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(micro_bundle.path, path)
    add_fp16_graphs(Bundle.open(path))
    bundle = Bundle.open(path)
    engines = [(backend, version, "fp32") for backend, version in ENGINES]
    for backend, version, precision in [*engines, ("tensorrt", "10.3", "fp16")]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            module = runtime_module(version, FakeCuda(), backend)
            monkeypatch.setitem(sys.modules, backend, module)
            target = BuildTarget(
                backend=backend,
                precision=precision,
                max_prompts=MAX_PROMPTS,
                max_points=MAX_POINTS,
            )
            list(
                build_engines(bundle, target, find_gpu=lambda: GPU, available_bytes=lambda: 1 << 40)
            )
    return bundle


def add_fp16_graphs(bundle: Bundle) -> None:
    """Typed fp16 graphs with the islands that they always have; the micro model needs no more."""
    measured = collections.defaultdict(float)
    with bundle_addition(bundle) as addition:
        records = {}
        for name, spec in variant_specs(bundle.config, "fp16").items():
            model = bundle.variant("fp32").load(name)
            half_from_single(model, spec, choose_islands(model, measured))
            records[name] = save_graph(model, spec, addition.folder, f"onnx/fp16/{name}.onnx")
        addition.graphs["fp16"] = records
        addition.precisions["fp16"] = PrecisionRecord(verdict=verdict_mark("fp16", passed=True))


def verdict_mark(variant: str, *, passed: bool) -> VerdictMark:
    return VerdictMark(passed=passed, sentence="", backend="onnxruntime", judged=variant, report="")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    install_cuda_python(monkeypatch, fake)
    return fake


@pytest.fixture
def load(engine_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """A function that loads the bundle on a fake engine; the module is its attribute ``trt``."""

    def loaded(
        cuda: FakeCuda,
        backend: str = "tensorrt",
        version: str = "10.3",
        precision: str = "fp32",
        **options: Any,
    ) -> TapPredictor:
        loaded.trt = runtime_module(version, cuda, backend)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, backend, loaded.trt)  # type: ignore[attr-defined]
        return TapPredictor.from_bundle(
            engine_bundle.path,
            backend,
            precision,
            check_hashes=False,
            device_options=DeviceOptions(**{"cache_folder": tmp_path / "cache", **options}),
        )

    return loaded


@pytest.fixture(scope="module")
def picture(golden: dict[str, np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])


@pytest.fixture(scope="module")
def points(golden: dict[str, np.ndarray]) -> np.ndarray:
    """Six regions: more than the engines take at once; points and boxes."""
    return np.concatenate([golden["points_px"][:4], golden["points_px"][:2]])


@pytest.fixture(scope="module")
def expected(predictor: TapPredictor, picture: np.ndarray, points: np.ndarray) -> Any:
    return predictor.predict(picture, points=points, top_k=2, max_new_tokens=TOKENS)


def predict(predictor: TapPredictor, picture: Any, points: np.ndarray, **options: Any) -> Any:
    options = {"top_k": 2, "max_new_tokens": TOKENS} | options
    return predictor.predict(picture, points=points, **options)


def assert_same(regions: Any, expected: Any) -> None:
    np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
    np.testing.assert_array_equal(regions.mask_index, expected.mask_index)
    np.testing.assert_array_equal(regions.masks, expected.masks)
    assert regions.captions == expected.captions
    names = [[name for name, _ in row] for row in regions.concepts]
    assert names == [[name for name, _ in row] for row in expected.concepts]
    for name in ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings"):
        actual = getattr(regions, name)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, getattr(expected, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("backend", "version"), ENGINES)
def test_every_version_gives_what_onnxruntime_gives(
    load, cuda, picture, points, expected, backend, version, caplog
):
    with load(cuda, backend, version) as predictor:
        for _ in range(2):  # enqueued and recorded, then replayed
            assert_same(predict(predictor, picture, points), expected)
        assert cuda.launches > 0
        bare = predict(predictor, picture, points, masks=False)
        assert (bare.masks, bare.low_res_masks) == (None, None)
        np.testing.assert_array_equal(bare.caption_ids, expected.caption_ids)
    assert cuda.leaks() == {}
    assert live_objects(load.trt) == {}
    # Nothing is said but that these engines were never verified.
    assert {record.name for record in caplog.records} <= {"tap_deploy.sessions.verified"}


def test_embeddings_and_cache_stay_on_the_gpu(load, cuda, picture, points, expected, micro_config):
    """The first call allocates and records; the second is counted, copy by copy."""
    with load(cuda) as predictor:
        predict(predictor, picture, points)
        cuda.reset_counts()
        assert_same(predict(predictor, picture, points), expected)
    assert cuda.allocations == []
    rows, point_count = points.shape[:2]
    size = micro_config.image_size
    images, prompts = size * size * 3, rows * point_count * (2 * 4 + 4)
    low_res, tokens = micro_config.low_res_mask_size**2, micro_config.image_embed_dim
    assert cuda.copied_bytes("h2d") == images + prompts + rows * tokens * 4
    index = 1  # as wide as a float
    floats = micro_config.num_mask_tokens + index + low_res + tokens + micro_config.sem_embed_dim
    id_rows = 2 * TOKENS * 256  # two calls of the captioner, a padded row per position
    assert cuda.copied_bytes("d2h") == rows * floats * 4 + id_rows
    assert cuda.copied_bytes("d2d") == 0


@pytest.mark.parametrize("max_prompts", [MAX_PROMPTS, 2])
def test_candidates_are_those_of_onnxruntime(
    load, cuda, predictor, picture, points, expected, monkeypatch, max_prompts
):
    """They use the result buffers, also if an engine takes fewer prompts than masks."""
    wanted = predict(predictor, picture, points, candidates=True)
    bounds = tensorrt_sessions.axis_bounds

    def fewer(*arguments: Any) -> Any:
        minima, limits = bounds(*arguments)
        return minima, limits | ({"P": max_prompts} if "P" in limits else {})

    monkeypatch.setattr(tensorrt_sessions, "axis_bounds", fewer)
    with load(cuda) as device:
        assert device._pipeline.max_prompts == max_prompts
        found = predict(device, picture, points, candidates=True)
        np.testing.assert_allclose(
            found.candidate_iou_predictions, wanted.candidate_iou_predictions, rtol=0, atol=1e-4
        )
        assert found.candidate_rles == wanted.candidate_rles
        assert_same(predict(device, picture, points), expected)  # the request is put back
    assert cuda.leaks() == {}


def polls(cuda: FakeCuda, *, chunks: int = 1) -> int:
    """How often a call has polled for EOS since the last count.

    Apart from that it synchronises for the answers of each chunk of prompts, and at its end.
    """
    return cuda.synchronizations - chunks - 1


def test_eos_is_polled_every_few_steps(load, cuda, picture, points):
    for interval, expected in ((1, TOKENS), (3, 3), (100, 1)):
        with load(cuda, eos_interval_steps=interval) as predictor:
            cuda.reset_counts()
            predict(predictor, picture, points[:2])
            assert polls(cuda) == expected


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_captions_are_told_at_every_poll(load, cuda, predictor, picture, points, interval):
    expected = predict(predictor, picture, points[:2])
    with load(cuda, eos_interval_steps=interval) as device:
        found = []
        regions = device.predict(picture, points=points[:2], captions=False)
        [after] = device.caption_many([regions], max_new_tokens=TOKENS, on_captions=found.append)
        assert after.captions == found[-1] == expected.captions
        assert len(found) == math.ceil(TOKENS / interval)


@pytest.mark.parametrize("interval", [1, 4])
def test_captions_end_at_eos(load, cuda, monkeypatch, predictor, picture, points, interval):
    """The captions of the micro model contain no EOS, so other tokens are used as EOS."""
    ids = predict(predictor, picture, points).caption_ids
    monkeypatch.setattr("tap_deploy.sessions.caption_writer.EOS_ID", int(ids[0, 2]))
    wanted = predict(predictor, picture, points[:1], max_new_tokens=None)
    assert (wanted.caption_ids[0, 3:] == predictor.config.pad_id).all()
    with load(cuda, eos_interval_steps=interval) as device:
        cuda.reset_counts()
        actual = predict(device, picture, points[:1], max_new_tokens=None)
        np.testing.assert_array_equal(actual.caption_ids, wanted.caption_ids)
        assert polls(cuda) == {1: 2, 4: 1}[interval]
        assert len(cuda.graphs) == 1 + {1: 2, 4: 4}[interval]  # steps that ran, and were recorded
        np.testing.assert_array_equal(
            predict(device, picture, points).caption_ids,
            predict(predictor, picture, points).caption_ids,
        )


def test_a_whole_caption(load, cuda, predictor, picture, points):
    with load(cuda) as device:
        for count in (None, 0, 1):
            np.testing.assert_array_equal(
                predict(device, picture, points[:1], max_new_tokens=count).caption_ids,
                predict(predictor, picture, points[:1], max_new_tokens=count).caption_ids,
            )


def test_steps_are_replayed(load, cuda, picture, points):
    with load(cuda) as predictor:
        steps = TOKENS + 1
        predict(predictor, picture, points[:3])
        assert (len(cuda.graphs), cuda.launches) == (steps, 0)
        predict(predictor, picture, points[1:4])
        assert (len(cuda.graphs), cuda.launches) == (steps, steps)
        predict(predictor, picture, points[:4])  # three rows were run as four
        assert (len(cuda.graphs), cuda.launches) == (steps, 2 * steps)
        predict(predictor, picture, points[:1])
        assert (len(cuda.graphs), cuda.launches) == (2 * steps, 2 * steps)
        assert predictor._pipeline.steps_replayed == cuda.launches


@pytest.mark.parametrize(
    "function",
    ["cudaStreamBeginCapture", "end_capture", "cudaGraphInstantiateWithFlags"],
)
def test_without_cuda_graphs_it_goes_on_and_says_so(
    load, cuda, picture, points, expected, caplog, function
):
    with load(cuda) as predictor:
        cuda.fail(function, after=2, code=CudaError.cudaErrorStreamCaptureUnsupported, times=2)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert_same(predict(predictor, picture, points), expected)
        assert len(caplog.records) == 1
        assert "CUDA graphs are off" in caplog.text
        assert cuda.launches == 2  # the graphs recorded before
    assert cuda.leaks() == {}


def test_a_recording_that_fails_once_costs_nothing(load, cuda, picture, points, expected, caplog):
    with load(cuda) as predictor:
        cuda.fail("end_capture", after=2)
        for _ in range(2):
            assert_same(predict(predictor, picture, points), expected)
        assert cuda.launches == 2 * (TOKENS + 1)  # every step of both chunks
    assert not caplog.records
    assert cuda.leaks() == {}


def test_steps_that_stay_unrecorded_are_said_once(
    load, cuda, picture, points, expected, caplog, monkeypatch
):
    """An RTX engine of an older release: its contexts allocate while they run."""
    with load(cuda, "tensorrt_rtx", "1.7") as predictor:
        monkeypatch.setattr(
            load.trt.IExecutionContext, "is_stream_capturable", lambda self, stream: False
        )
        assert_same(predict(predictor, picture, points), expected)
        assert not caplog.records  # it may still have compiled
        for _ in range(2):
            assert_same(predict(predictor, picture, points), expected)
        (record,) = caplog.records
        assert "cannot be recorded as a CUDA graph with 4 rows" in record.getMessage()
        with pytest.raises(SessionError, match="no caption step was replayed"):
            predictor._pipeline.require_replay()
    assert cuda.launches == 0


def test_replay_is_demanded_where_it_was_asked_for(load, cuda, picture, points):
    with load(cuda, cuda_graphs=False) as predictor:
        predict(predictor, picture, points)
        predictor._pipeline.require_replay()
    with load(cuda) as predictor:
        for _ in range(2):
            predict(predictor, picture, points)
        predictor._pipeline.require_replay()


def test_slots_that_engines_could_not_read(load, cuda, monkeypatch):
    """Keys and values of every layer are bound at addresses of their own."""
    monkeypatch.setattr(DeviceCaptioner, "_past_bytes", lambda self, rows: 3 * 128)
    with pytest.raises(SessionError, match=r"keys of 384 bytes a layer.*multiple of 256"):
        load(cuda)
    assert cuda.leaks() == {}


def test_cuda_graphs_can_be_turned_off(load, cuda, picture, points, expected):
    with load(cuda, cuda_graphs=False) as predictor:
        assert_same(predict(predictor, picture, points), expected)
        assert cuda.launches == 0


def test_an_engine_that_refuses_to_be_recorded(load, cuda, picture, points, expected, caplog):
    """The refusal comes from TensorRT, in the middle of the recording."""
    with load(cuda) as predictor:
        # Encoder, decoder twice, a step; then both attempts to record it.
        cuda.fail("execute_async_v3", after=1 + 2 + 1, times=2)
        with caplog.at_level(logging.WARNING):
            regions = predict(predictor, picture, points)
        assert_same(regions, expected)
        assert "CUDA graphs are off" in caplog.text
    assert cuda.leaks() == {}


@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("cudaMemcpyAsync", 0),
        ("cudaMemcpyAsync", 3),
        ("cudaMemsetAsync", 0),
        ("cudaMemsetAsync", 1),  # captions of the second chunk
        ("cudaStreamSynchronize", 0),
        ("cudaStreamSynchronize", 3),
        ("execute_async_v3", 0),
        ("execute_async_v3", 2),  # prompts of the second chunk; steps are replayed
        ("cudaGraphLaunch", 0),
        ("cudaGraphLaunch", TOKENS + 3),
        ("cudaSetDevice", 0),
    ],
)
def test_a_failed_call_leaves_it_usable(load, cuda, picture, points, expected, function, after):
    with load(cuda) as predictor:
        predict(predictor, picture, points)
        cuda.fail(function, after=after)
        with pytest.raises(SessionError, match=r"^(CUDA|graph)") as caught:
            predict(predictor, picture, points)
        assert "\n" not in str(caught.value)
        # No pending copy may write later into buffers of another call.
        assert not any(stream.pending for stream in cuda.streams.values())
        assert_same(predict(predictor, picture, points), expected)
    assert cuda.leaks() == {}


def test_several_threads_share_one_lane(load, cuda, picture, points, expected):
    with load(cuda) as predictor, concurrent.futures.ThreadPoolExecutor(3) as pool:
        for regions in pool.map(lambda _: predict(predictor, picture, points), range(4)):
            assert_same(regions, expected)
        assert len(cuda.streams) == 1


def test_several_threads_with_lanes_of_their_own(load, cuda, picture, points, predictor, golden):
    """Two pictures at once, each prompted over and over by several threads."""
    other = np.ascontiguousarray(golden["image_bgr_1"][..., ::-1])
    prompts = golden["points_px"][4:7]
    wanted = [predict(predictor, picture, points[:3]), predict(predictor, other, prompts)]
    with load(cuda, contexts=2) as device, concurrent.futures.ThreadPoolExecutor(3) as pool:
        encoded = [device.encode(picture), device.encode(other)]

        def call(i: int) -> Any:
            return predict(device, encoded[i % 2], (points[:3], prompts)[i % 2])

        for i, regions in enumerate(pool.map(call, range(6))):
            assert_same(regions, wanted[i % 2])
        assert len(cuda.streams) == 2
    assert cuda.leaks() == {}


def test_encoded_pictures_stay_on_the_gpu(load, cuda, picture, points, expected, predictor):
    with load(cuda) as device:
        encoded = device.encode(picture)
        assert_same(predict(device, encoded, points), expected)
        allocated = len(cuda.device_blocks)
        second = device.encode(picture[::-1])  # must use other memory than the first
        assert len(cuda.device_blocks) == allocated + 1
        cuda.reset_counts()
        assert_same(predict(device, encoded, points), expected)
        tokens = len(points) * predictor.config.image_embed_dim * 4
        assert cuda.copied_bytes("h2d") == points[..., 0].size * 12 + tokens
        del second
        gc.collect()
        device.set_image(picture)
        assert_same(predict(device, None, points), expected)
        assert len(cuda.device_blocks) == allocated + 1  # the memory of the second serves again
        np.testing.assert_allclose(
            encoded.image_embeddings, predictor.encode(picture).image_embeddings, atol=1e-4
        )
        with pytest.raises(InputError, match="encoded by another predictor"):
            predictor.predict(encoded, points=points)
        with pytest.raises(InputError, match="encoded by another predictor"):
            device.predict(predictor.encode(picture), points=points)
    with pytest.raises(SessionError, match="predictor is closed"):
        _ = encoded.image_embeddings


def test_embeddings_are_fetched_into_the_same_memory(load, cuda, picture):
    with load(cuda) as device:
        encoded = device.encode(picture)
        first = encoded.image_embeddings
        kept = first.copy()
        cuda.reset_counts()
        np.testing.assert_array_equal(encoded.image_embeddings, kept)
        assert cuda.allocations == []
        device.encode(picture[::-1])
        np.testing.assert_array_equal(first, kept)  # it is not the memory itself
    assert cuda.leaks() == {}


def test_too_many_points(load, cuda, picture):
    many = np.ones((1, MAX_POINTS + 1, 3))
    with load(cuda) as predictor:
        with pytest.raises(InputError, match=r"at most 5 points in a prompt, got 7.*--max-points"):
            predictor.predict(picture, points=many)
        assert len(predictor.predict(picture, points=many[:, : MAX_POINTS - 1])) == 1


def test_too_many_captions(load, cuda, micro_config):
    tokens = np.zeros((MAX_PROMPTS + 1, micro_config.image_embed_dim), np.float32)
    options = {"max_new_tokens": 1, "temperature": 0.0, "rng": np.random.default_rng(0)}
    with load(cuda) as predictor, predictor._pipeline.lane() as lane:
        with pytest.raises(InputError, match="text_decoder takes at most 4 prompts, got 5"):
            lane.caption(tokens, **options)
        assert len(lane.caption(tokens[1:], **options)) == MAX_PROMPTS


def test_no_regions(load, cuda, picture):
    with load(cuda) as predictor:
        regions = predictor.predict(picture, points=[])
        assert len(regions) == 0
        assert regions.caption_ids.shape == (0, predictor.config.text_seq_len - 1)


def test_draws_are_those_of_the_cpu(load, cuda, predictor, picture, points):
    """The same seed and the same logits give the same words, and no step waits for the host."""
    options = {"temperature": 0.7, "seed": 3}
    wanted = predict(predictor, picture, points[:2], **options)
    with load(cuda) as device:
        for _ in range(2):
            cuda.reset_counts()
            actual = predict(device, picture, points[:2], **options)
            np.testing.assert_array_equal(actual.caption_ids, wanted.caption_ids)
            assert polls(cuda) == 2  # of seven steps: after four and seven
        assert cuda.launches == TOKENS + 1


def test_a_warm_up_records_ahead_in_every_context(load, cuda, picture, points, expected):
    with load(cuda, contexts=2) as device:
        device.warm_up(len(points))  # in chunks of four and two
        steps, lanes = device.config.max_new_tokens + 1, 2
        assert len(cuda.graphs) == lanes * 2 * steps
        assert_same(predict(device, picture, points), expected)
        device.warm_up(1, draws=True)
        predict(device, picture, points[:1], temperature=1.0)
        assert len(cuda.graphs) == lanes * 3 * steps

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "decode prompts":
                device.warm_up()

        with pytest.raises(SessionError, match="warmed up from within its own call"):
            predict(device, picture, points, on_progress=progress)
    assert cuda.leaks() == {}


def test_pictures_in_batches(engine_bundle, cuda, monkeypatch, predictor, golden, tmp_path):
    """An encoder that takes two at once: of three pictures, two go together."""
    path = tmp_path / "bundle"
    shutil.copytree(engine_bundle.path, path)
    module = runtime_module("10.13", cuda, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    target = BuildTarget(
        backend="tensorrt",
        precision="fp32",
        max_prompts=MAX_PROMPTS,
        max_points=MAX_POINTS,
        max_images=2,
    )
    list(
        build_engines(
            Bundle.open(path), target, find_gpu=lambda: GPU, available_bytes=lambda: 1 << 40
        )
    )
    pictures = [np.ascontiguousarray(golden[f"image_bgr_{i}"][..., ::-1]) for i in (0, 1, 0)]
    points = [[[30, 40, 1]], [[50, 60, 1]]]
    options = {"points": points, "top_k": 2, "max_new_tokens": TOKENS}
    with TapPredictor.from_bundle(path, "tensorrt") as device:
        assert device._pipeline.max_images == 2
        found = list(device.predict_many(pictures, **options))
        images = [name for name, size, _ in cuda.copies if size == 2 * pictures_bytes(device)]
        assert images == ["h2d"]
    for regions, picture in zip(found, pictures, strict=True):
        assert_same(regions, predictor.predict(picture, **options))
    assert cuda.leaks() == {}


def pictures_bytes(predictor: TapPredictor) -> int:
    return predictor.config.image_size**2 * 3


def test_zero_copy(load, cuda, picture, points, expected, micro_config):
    """Host and GPU share the memory of what the first two graphs read and write."""
    with load(cuda, zero_copy=True) as predictor:
        for _ in range(2):
            cuda.reset_counts()
            assert_same(predict(predictor, picture, points), expected)
        tokens = len(points) * micro_config.image_embed_dim * 4
        assert cuda.copied_bytes("h2d") == tokens  # every step reads them
        assert cuda.copied_bytes("d2h") == 2 * TOKENS * 256  # ids only
    assert cuda.leaks() == {}


@pytest.mark.parametrize("contexts", [1, 2])
def test_pycuda(load, monkeypatch, picture, points, expected, caplog, contexts):
    cuda = FakeCuda()
    install_pycuda(monkeypatch, cuda)
    with (
        load(cuda, contexts=contexts) as predictor,
        concurrent.futures.ThreadPoolExecutor(contexts) as pool,
    ):
        assert_same(predict(predictor, picture, points), expected)
        # Threads that never saw the context.
        calls = [pool.submit(predict, predictor, picture, points) for _ in range(2 * contexts)]
        for call in calls:
            assert_same(call.result(), expected)
        assert cuda.launches > 0
    gc.collect()
    assert cuda.leaks() == {}
    assert cuda.aborts == []
    # Nothing is said but that these engines were never verified.
    assert {record.name for record in caplog.records} <= {"tap_deploy.sessions.verified"}


def test_pycuda_without_cuda_graphs(load, monkeypatch, picture, points, expected, caplog):
    cuda = FakeCuda()
    install_pycuda(monkeypatch, cuda, library=False)
    with load(cuda) as predictor:
        for _ in range(2):
            assert_same(predict(predictor, picture, points), expected)
    assert cuda.launches == 0
    (record,) = caplog.records
    assert "CUDA graphs are off" in record.getMessage()
    assert "libcuda.so.1 cannot be used" in record.getMessage()


def test_memory_is_freed_without_close(load, cuda, picture, points):
    predictor = load(cuda)
    encoded = predictor.encode(picture)
    del predictor
    gc.collect()
    assert cuda.leaks() == {}
    with pytest.raises(SessionError, match="predictor is closed"):
        _ = encoded.image_embeddings


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_what_is_used_is_freed_last(load, cuda, monkeypatch, picture, points, backend):
    """Recorded runs, contexts, streams, then memory; the fake engine checks the order."""
    freed: list[str] = []

    def noted(name: str, call: Any) -> Any:
        return lambda *handle: (freed.append(name), call(*handle))[1]

    for owner, name in (
        (cuda, "destroy_graph"),
        (TensorRtEngine, "close"),
        (cuda, "destroy_stream"),
    ):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    version = "1.7" if backend == "tensorrt_rtx" else "10.3"
    predictor = load(cuda, backend, version, contexts=2)
    for _ in range(2):
        predict(predictor, picture, points)
    freed.clear()
    predictor.close()
    recorded = freed.count("destroy_graph")
    assert recorded > TOKENS
    assert freed == recorded * ["destroy_graph"] + 3 * ["close"] + 2 * ["destroy_stream"]
    assert cuda.leaks() == {}
    assert live_objects(load.trt) == {}


def test_what_does_not_close_keeps_nothing_else(load, cuda, picture, points):
    predictor = load(cuda)
    predict(predictor, picture, points)
    cuda.fail("cudaGraphExecDestroy")
    cuda.fail("cudaFree")
    predictor.close()
    assert cuda.leaks() == {"device": 1, "graphs": 1}


def test_closing_twice_and_using_afterwards(load, cuda, picture, points):
    predictor = load(cuda)
    predictor.close()
    predictor.close()
    with pytest.raises(SessionError, match="predictor is closed"):
        predictor.predict(picture, points=points)
    assert cuda.leaks() == {}


def test_closing_waits_for_calls_that_run(load, cuda, picture, points, expected):
    predictor = load(cuda)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started: Any = concurrent.futures.Future()

        def call() -> Any:
            return predict(
                predictor,
                picture,
                points,
                on_progress=lambda *_: started.done() or started.set_result(None),
            )

        running = pool.submit(call)
        started.result()
        predictor.close()
        try:
            assert_same(running.result(), expected)
        except SessionError as exc:  # it had not taken its lane yet
            assert "predictor is closed" in str(exc)
    assert cuda.leaks() == {}


def test_in_another_process_nothing_is_used_and_nothing_freed(load, cuda, monkeypatch, picture):
    predictor = load(cuda)
    encoded, before = predictor.encode(picture), cuda.leaks()
    _, at_exit, *_ = predictor._pipeline._finalizer.peek()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        for call in (
            lambda: predictor.predict(encoded, [[[9, 9, 1]]]),
            lambda: encoded.image_embeddings,
            predictor.warm_up,
        ):
            with pytest.raises(SessionError, match="cannot be used in process 1, "):
                call()
        predictor.close()
        at_exit()
        assert cuda.leaks() == before
    with pytest.raises(SessionError, match="cannot be pickled or copied"):
        pickle.dumps(encoded)
    predictor.close()
    assert cuda.leaks() == {}


def test_closing_from_within_a_call_is_refused(load, cuda, picture, points):
    with load(cuda) as predictor:

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "decode prompts":
                predictor.close()

        with pytest.raises(SessionError, match="from within its own call"):
            predict(predictor, picture, points, on_progress=progress)
        assert len(predict(predictor, picture, points[:1])) == 1


@pytest.mark.parametrize("after", range(0, 48, 6))
def test_a_load_that_fails_leaves_nothing(load, cuda, after):
    cuda.fail("cudaMalloc", after=after // 2, code=CudaError.cudaErrorMemoryAllocation)
    cuda.fail("cudaHostAlloc", after=after, code=CudaError.cudaErrorMemoryAllocation)
    try:
        load(cuda).close()
    except SessionError as exc:
        assert "MemoryAllocation" in str(exc)
        assert "fewer prompts" in str(exc)
        assert after < 42
    assert cuda.leaks() == {}
    assert live_objects(load.trt) == {}


def test_a_user_without_a_home_has_no_cache(
    load, cuda, monkeypatch, picture, points, expected, caplog
):
    """As in a container whose user id has no user."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    cache_folder._warn_once.cache_clear()
    for _ in range(2):
        with load(cuda, "tensorrt_rtx", "1.7", cache_folder=None) as predictor:
            assert_same(predict(predictor, picture, points), expected)
    (record,) = caplog.records
    assert "this user has no home folder; set XDG_CACHE_HOME or" in record.getMessage()


def test_rtx_keeps_its_runtime_cache(load, cuda, picture, points, expected, tmp_path):
    """With the cache, the second program has nothing to compile: steps are recorded at once."""
    for _ in range(2):
        with load(cuda, "tensorrt_rtx", "1.7") as predictor:
            assert_same(predict(predictor, picture, points), expected)
        files = sorted((tmp_path / "cache").iterdir())
        assert len(files) == 3
        assert all(b"STRICT-RUNTIME-CACHE 1.7" in file.read_bytes() for file in files)
    files[0].write_bytes(b"rubbish")
    with load(cuda, "tensorrt_rtx", "1.7") as predictor:
        assert_same(predict(predictor, picture, points), expected)


def test_rtx_without_a_place_for_its_cache(load, cuda, picture, points, expected, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with load(cuda, "tensorrt_rtx", "1.7") as predictor:
        assert_same(predict(predictor, picture, points), expected)
    assert "runtime cache not stored" in caplog.text


def test_a_damaged_plan_is_never_deserialised(load, cuda, engine_bundle):
    (path,) = engine_bundle.path.glob("engines/tensorrt-10.3*-fp32/text_decoder.plan")
    original = path.read_bytes()
    try:
        path.write_bytes(original[:-1] + b"x")
        with pytest.raises(BundleError, match="was changed or damaged"):
            load(cuda)
    finally:
        path.write_bytes(original)
    assert cuda.leaks() == {}
    assert live_objects(load.trt) == {}


def test_a_plan_that_tensorrt_refuses(load, cuda, monkeypatch):
    monkeypatch.setattr("tests.strict_tensorrt_runtime.read_plan", _refuse)
    with pytest.raises(SessionError, match=r"cannot deserialise the plan.*: no such luck$"):
        load(cuda)
    assert cuda.leaks() == {}


def _refuse(plan: bytes) -> Any:
    raise ValueError("no such luck")


def test_an_engine_for_another_gpu(load, cuda):
    cuda.compute_capability = (8, 7)
    with pytest.raises(BundleError, match=r"SM 8\.9, this GPU is 8\.7; build it with: tap-export"):
        load(cuda)


def test_engines_that_failed_their_selftest(load, cuda, engine_bundle, monkeypatch):
    from tap_deploy.bundle.plans import plan_digests, record_selftest

    (folder,) = engine_bundle.path.glob("engines/tensorrt-10.3*-fp32")
    failed = SelftestMark(passed=False, error=None)
    record_selftest(folder, failed, tested=plan_digests(folder))
    try:
        with pytest.raises(BundleError, match="failed their self-test"):
            load(cuda)
        with TapPredictor.from_bundle(engine_bundle.path, "tensorrt", allow_failed=True) as device:
            assert device._pipeline.max_prompts == MAX_PROMPTS
    finally:
        (folder / "selftest.json").unlink()


def test_no_cuda_package(load, cuda, monkeypatch):
    block_cuda(monkeypatch)
    with pytest.raises(MissingDependencyError, match="cuda-python or pycuda"):
        load(cuda)


def test_no_gpu(load, monkeypatch):
    cuda = FakeCuda(devices=0)
    install_cuda_python(monkeypatch, cuda)
    with pytest.raises(SessionError, match="there is no GPU 0; this machine has 0"):
        load(cuda)


def test_old_cuda_python(load, monkeypatch, picture, points, expected):
    cuda = FakeCuda()
    install_cuda_python(monkeypatch, cuda, old=True)
    with load(cuda) as predictor:
        assert_same(predict(predictor, picture, points), expected)


def test_missing_tensorrt(engine_bundle, cuda, monkeypatch):
    for backend, text in (("tensorrt", "JetPack brings it"), ("tensorrt_rtx", r"\[rtx\]")):
        monkeypatch.setitem(sys.modules, backend, None)
        with pytest.raises(MissingDependencyError, match=text):
            TapPredictor.from_bundle(engine_bundle.path, backend)


def test_fp16_between_the_graphs_and_float32_outside(
    load, cuda, engine_bundle, picture, points, micro_config
):
    """The same graphs on the CPU: onnxruntime computes what it computes in the fake engines."""
    with TapPredictor.from_bundle(engine_bundle.path, precision="fp16") as on_cpu:
        expected = predict(on_cpu, picture, points)
    with load(cuda, precision="fp16") as predictor:
        encoded = predictor.encode(picture)
        assert encoded.image_embeddings.dtype == np.float32
        cuda.reset_counts()
        assert_same(predict(predictor, encoded, points), expected)
        tokens = len(points) * micro_config.image_embed_dim * 2
        assert cuda.copied_bytes("h2d") == points[..., 0].size * 12 + tokens
        # Four rows and two, each step run and recorded: K and V of two layers, two heads of 64.
        slots = 2 * (TOKENS + 1) * (4 + 2) * (2 * 2 * 2 * 64) * 2
        assert cuda.copied_bytes("d2d") == slots
    assert cuda.leaks() == {}


def test_verification_of_engines(load, cuda, engine_bundle, tmp_path):
    """Graph by graph, behind the contract of host arrays."""
    load(cuda).close()
    report = verify_bundle(engine_bundle, RunOn(backend="tensorrt"), [engine_bundle.golden()])
    assert report.passed, str(report)
    assert report.backend == "tensorrt"
    assert cuda.leaks() == {}
    assert live_objects(load.trt) == {}


def test_sessions_of_engines(load, cuda, engine_bundle, golden, micro_config):
    load(cuda).close()
    sessions = sessions_from_bundle(engine_bundle, RunOn(backend="tensorrt"))
    size = micro_config.image_size
    images = np.zeros((3, size, size, 3), np.uint8)
    images[1] += 90
    # The engine takes one picture at a time.
    outputs = sessions["image_encoder"].run({"images": images})["image_embeddings"]
    alone = sessions["image_encoder"].run({"images": images[1:2]})["image_embeddings"]
    np.testing.assert_array_equal(outputs[1:2], alone)
    assert (outputs[0] == outputs[2]).all() and (outputs[0] != outputs[1]).any()
    decoder = sessions["prompt_decoder"]
    feed = {
        "image_embeddings": golden["image_embeddings"][:1],
        "point_coords": np.ascontiguousarray(golden["points_model"][:4, :, :2]),
        "point_labels": golden["points_model"][:4, :, 2].astype(np.int32),
        "mask_request": request_answers(4),
        "mask_rows": mask_rows(4),
    }
    cuda.fail("cudaMemcpyAsync", after=1)
    with pytest.raises(SessionError, match="cudaMemcpyAsync failed"):
        decoder.run(feed)
    iou = decoder.run(feed)["iou_predictions"]
    np.testing.assert_allclose(iou, golden["iou_predictions"][:4], atol=1e-4)
    with pytest.raises(InputError, match="at most 4 prompts"):
        decoder.run(
            feed
            | {
                "point_coords": np.zeros((5, 1, 2), np.float32),
                "point_labels": np.zeros((5, 1), np.int32),
                "mask_request": request_answers(5),
                "mask_rows": mask_rows(5),
            }
        )
    for _ in range(2):
        decoder.close()
    with pytest.raises(SessionError, match="the session is closed"):
        decoder.run(feed)
    del sessions, decoder
    gc.collect()
    assert cuda.leaks() == {}
    assert live_objects(load.trt) == {}


def test_a_precision_that_failed_its_verdict(micro_bundle, tmp_path):
    path = tmp_path / "bundle"
    shutil.copytree(micro_bundle.path, path)
    with bundle_addition(Bundle.open(path)) as addition:
        addition.precisions["fp32"] = PrecisionRecord(verdict=verdict_mark("fp32", passed=False))
    with pytest.raises(
        BundleError, match=r"precision fp32 failed its accuracy check.*--allow-failed"
    ):
        TapPredictor.from_bundle(path)
    TapPredictor.from_bundle(path, allow_failed=True).close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "tensorrt", "device": "cpu"}, InputError, "'tensorrt' needs a GPU"),
        ({"backend": "tensorrt", "provider": "cuda"}, InputError, "provider needs backend"),
        ({"provider": "cuda"}, InputError, "provider needs backend 'onnxruntime' and"),
        ({"device": "gpu"}, InputError, "unknown device 'gpu'; expected cpu, cuda or cuda:N"),
        ({"device": "cuda", "threads": 1}, InputError, "threads need device 'cpu'"),
        ({"device": "cuda", "provider": "dml"}, InputError, "unknown provider 'dml'"),
        ({"device": "cuda:3"}, SessionError, "there is no GPU 3; this machine has 1"),
    ],
)
def test_arguments_that_do_not_fit(micro_bundle, cuda, arguments, error, message):
    with pytest.raises(error, match=message):
        TapPredictor.from_bundle(micro_bundle.path, check_hashes=False, **arguments)
    assert cuda.leaks() == {}


@pytest.mark.parametrize(
    "options",
    [
        {"contexts": 0},
        {"contexts": True},
        {"eos_interval_steps": 0},
        {"max_points": 1.5},
        {"cuda_graphs": 1},
    ],
)
def test_bad_device_options(options):
    with pytest.raises(InputError, match=next(iter(options))):
        DeviceOptions(**options)
