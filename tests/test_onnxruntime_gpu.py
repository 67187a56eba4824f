"""onnxruntime on a GPU: the path on the device, and providers that are not what they claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tap_deploy import TapPredictor
from tap_deploy.errors import InputError, SessionError
from tap_deploy.masks import request_answers
from tap_deploy.sessions import DeviceOptions, sessions_from_bundle
from tests import fake_onnxruntime
from tests.fake_cuda import FakeCuda, install_cuda_python

TOKENS = 5


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    install_cuda_python(monkeypatch, fake)
    return fake


def load(bundle: Any, **options: Any) -> TapPredictor:
    choices = {"max_prompts": 4, "max_points": 6} | options.pop("choices", {})
    return TapPredictor.from_bundle(
        bundle.path,
        device="cuda",
        check_hashes=False,
        device_options=DeviceOptions(**choices),
        **options,
    )


@pytest.mark.parametrize("provider", [None, "cuda", "tensorrt", "nv_tensorrt_rtx"])
def test_same_as_on_the_cpu_and_nothing_between_the_graphs(
    micro_bundle, predictor, golden, cuda, monkeypatch, tmp_path, provider
):
    picture = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    points = golden["points_px"][[0, 1, 2, 3, 1]]  # more than one call of the graphs
    arguments = {"points": points, "max_new_tokens": TOKENS}
    expected = predictor.predict(picture, **arguments)
    module = fake_onnxruntime.install(monkeypatch, cuda)
    with load(micro_bundle, provider=provider, choices={"cache_folder": tmp_path}) as device:
        device.predict(picture, **arguments)
        cuda.reset_counts()
        regions = device.predict(picture, **arguments)
        assert cuda.allocations == []
        size, point_bytes = device.config.image_size, points[..., 0].size * 12
        assert cuda.copied_bytes("h2d") == size * size * 3 + point_bytes
        assert len({session.stream for session in module.sessions}) == 1
    assert cuda.leaks() == {}
    np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
    np.testing.assert_array_equal(regions.masks, expected.masks)
    assert regions.captions == expected.captions
    cached = "trt_engine_cache_path" in module.sessions[0].options.get(
        "TensorrtExecutionProvider", {}
    )
    assert cached == (provider == "tensorrt")


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("drops", "onnxruntime dropped it while loading"),
        ("idle", "it ran no node of the graph"),
        ("partial", "ran on the CPU"),
        ("fails", "no kernel image is available"),
        ("nan", "its results are not finite"),
    ],
)
def test_a_provider_is_believed_only_after_an_inference(
    micro_bundle, cuda, monkeypatch, behaviour, message
):
    fake_onnxruntime.install(monkeypatch, cuda, behaviour)
    with pytest.raises(SessionError, match=f"CUDAExecutionProvider is listed but .*{message}") as c:
        load(micro_bundle)
    assert "\n" not in str(c.value)
    assert cuda.leaks() == {}


def test_a_provider_that_is_not_there(micro_bundle, cuda):
    """The real onnxruntime of the test environment has no GPU provider."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a CUDA provider")
    with pytest.raises(SessionError, match=r"has no CUDAExecutionProvider.*onnxruntime-gpu"):
        load(micro_bundle)
    assert cuda.leaks() == {}


def test_a_failed_run_leaves_it_usable(micro_bundle, golden, cuda, monkeypatch):
    picture = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    fake_onnxruntime.install(monkeypatch, cuda)
    with load(micro_bundle) as device:
        first = device.predict(picture, points=[[[9, 9, 1]]], max_new_tokens=2)
        cuda.fail("run_with_iobinding", after=2)
        with pytest.raises(SessionError, match="graph text_decoder: onnxruntime failed"):
            device.predict(picture, points=[[[9, 9, 1]]], max_new_tokens=2)
        again = device.predict(picture, points=[[[9, 9, 1]]], max_new_tokens=2)
        np.testing.assert_array_equal(again.caption_ids, first.caption_ids)
        with pytest.raises(InputError, match=r"at most 6 points.*DeviceOptions\.max_points"):
            device.predict(picture, points=np.ones((1, 7, 3)))


def test_sessions_of_host_arrays_use_the_provider_too(micro_bundle, cuda, monkeypatch, golden):
    module = fake_onnxruntime.install(monkeypatch, cuda)
    sessions = sessions_from_bundle(micro_bundle, "onnxruntime", "fp32", device="cuda")
    assert [session.providers[0] for session in module.sessions] == ["CUDAExecutionProvider"] * 3
    feed = {
        "image_embeddings": golden["image_embeddings"][:1],
        "point_coords": np.ascontiguousarray(golden["points_model"][:4, :, :2]),
        "point_labels": golden["points_model"][:4, :, 2].astype(np.int32),
        "mask_request": request_answers(4),
    }
    outputs = sessions["prompt_decoder"].run(feed)
    np.testing.assert_allclose(outputs["iou_predictions"], golden["iou_predictions"][:4], atol=1e-4)
