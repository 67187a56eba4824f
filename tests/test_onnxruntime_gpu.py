"""onnxruntime on a GPU: the device path, and providers that do not work."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import logging
import os
import pathlib
import pwd
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tap_deploy import TapPredictor
from tap_deploy.errors import InputError, MissingDependencyError, SessionError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions import cache_folder
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.ort import provider_libraries
from tap_deploy.sessions.ort.providers import PROVIDERS, TENSORRT, Provider
from tap_deploy.sessions.run_on import RunOn
from tests import fake_onnxruntime

TOKENS = 5
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """Reset process-wide settings and state of providers after each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    yield
    for once in (provider_libraries.preload_libraries, provider_libraries._registered_plugin):
        once.cache_clear()  # it keeps the fake runtime, and this its sessions


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
    micro_bundle, predictor, golden, cuda, monkeypatch, provider, capsys
):
    picture = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    points = golden["points_px"][[0, 1, 2, 3, 1]]  # more than one call of the graphs
    arguments = {"points": points, "max_new_tokens": TOKENS}
    expected = predictor.predict(picture, **arguments)
    module = fake_onnxruntime.install(monkeypatch, cuda)
    with load(micro_bundle, provider=provider) as device:
        device.predict(picture, **arguments)
        cuda.reset_counts()
        regions = device.predict(picture, **arguments)
        assert cuda.allocations == []
        size, point_bytes = device.config.image_size, points[..., 0].size * 12
        token_bytes = len(points) * device.config.image_embed_dim * 4
        assert cuda.copied_bytes("h2d") == size * size * 3 + point_bytes + token_bytes
        assert len({session.stream for session in module.sessions}) == 1
        replayed = device._pipeline.steps_replayed
        assert (replayed > 0) == (provider in (None, "cuda"))
        recorded = [session.records for session in module.sessions]
        assert recorded == [False, False, provider in (None, "cuda")]
    assert cuda.leaks() == {}
    assert capsys.readouterr().out == ""
    assert module.preloads == (provider != "nv_tensorrt_rtx")  # once, not per graph
    np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
    np.testing.assert_array_equal(regions.masks, expected.masks)
    assert regions.captions == expected.captions


def settings_of(module: Any, provider: str) -> dict[str, dict[str, str]]:
    """Graph name -> settings of a provider, as the last sessions were made."""
    names = ("image_encoder", "prompt_decoder", "text_decoder")
    return {
        name: session.options[provider]
        for name, session in zip(names, module.sessions, strict=True)
    }


def loaded(micro_bundle, cuda, monkeypatch, provider, **choices):
    module = fake_onnxruntime.install(monkeypatch, cuda)
    with load(micro_bundle, provider=provider, choices=choices) as device:
        device.predict(np.zeros((8, 8, 3), np.uint8), points=[[[1, 1, 1]]], max_new_tokens=1)
    return module


@pytest.mark.parametrize("provider", ["tensorrt", "nv_tensorrt_rtx"])
def test_one_engine_for_all_sizes(micro_bundle, cuda, monkeypatch, tmp_path, provider):
    """Without ranges TensorRT rebuilds, for minutes, at every larger size."""
    module = loaded(micro_bundle, cuda, monkeypatch, provider, max_prompts=32)
    prefix = {"tensorrt": "trt", "nv_tensorrt_rtx": "nv"}[provider]
    found = settings_of(module, module.sessions[0].providers[0])
    for bound, sizes in {"min": (1, 1), "opt": (16, 2), "max": (32, 6)}.items():
        shapes = found["prompt_decoder"][f"{prefix}_profile_{bound}_shapes"].split(",")
        assert "point_coords:{}x{}x2".format(*sizes) in shapes
        assert "point_labels:{}x{}".format(*sizes) in shapes
        assert not any(shape.startswith("image_embeddings") for shape in shapes)  # is fixed
        size = micro_bundle.config.image_size
        encoder = found["image_encoder"][f"{prefix}_profile_{bound}_shapes"]
        assert encoder == f"images:1x{size}x{size}x3"
    folder = tmp_path / "tap_deploy" / "onnxruntime-tensorrt"
    assert folder.is_dir()  # TensorRT makes no folder above its own
    if provider == "tensorrt":
        for cache in ("trt_engine_cache", "trt_timing_cache"):
            assert found["text_decoder"][f"{cache}_enable"] == "1"
            assert found["text_decoder"][f"{cache}_path"] == str(folder)
    else:
        stream = str(module.sessions[0].stream)
        assert found["text_decoder"]["has_user_compute_stream"] == "1"
        assert found["text_decoder"]["user_compute_stream"] == stream


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nv_tensorrt_rtx"])
def test_a_user_without_a_home_keeps_nothing(micro_bundle, cuda, monkeypatch, caplog, provider):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    cache_folder._warn_once.cache_clear()
    module = loaded(micro_bundle, cuda, monkeypatch, provider)
    found = settings_of(module, module.sessions[0].providers[0])
    assert not any("cache" in name for settings in found.values() for name in settings)
    said = [r for r in caplog.records if "has no home folder" in r.getMessage()]
    assert len(said) == (provider != "cuda")  # which compiles nothing


def test_ranges_come_from_the_axes():
    tensors = (
        TensorSpec("mask_request", "int32", ("P", "M")),
        TensorSpec("past_key_values.0.key", "float16", ("P", 2, "T", 64)),
        TensorSpec("position", "int32", (1,)),
    )
    spec = GraphSpec("any", inputs=tensors, outputs=())
    options = fake_onnxruntime.SessionOptions()
    runtime = types.ModuleType("onnxruntime")
    runtime.get_available_providers = lambda: list(PROVIDERS.values())
    limits = {"P": 8, "M": 4, "T": 40, "N": 9}
    provider = Provider(name=TENSORRT, limits=limits)
    (_, settings), _ = provider.add_to(runtime, options, spec)
    assert {name: value for name, value in settings.items() if "profile" in name} == {
        "trt_profile_min_shapes": "mask_request:1x1,past_key_values.0.key:1x2x1x64",
        "trt_profile_opt_shapes": "mask_request:8x4,past_key_values.0.key:8x2x40x64",
        "trt_profile_max_shapes": "mask_request:8x4,past_key_values.0.key:8x2x40x64",
    }
    unknown = dataclasses.replace(provider, limits={"P": 8, "M": 4})  # no range without all axes
    (_, settings), _ = unknown.add_to(runtime, options, spec)
    assert not any("profile" in name for name in settings)


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_is_not_tf32(micro_bundle, cuda, monkeypatch, tf32):
    module = loaded(micro_bundle, cuda, monkeypatch, "cuda", tf32=tf32)
    for settings in settings_of(module, "CUDAExecutionProvider").values():
        assert settings["use_tf32"] == str(int(tf32))
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    module = loaded(micro_bundle, cuda, monkeypatch, "tensorrt", tf32=tf32)
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == (None if tf32 else "0")


def test_what_the_user_says_of_tf32_stays(micro_bundle, cuda, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    loaded(micro_bundle, cuda, monkeypatch, "tensorrt")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


def test_older_releases_are_not_recorded(
    micro_bundle, predictor, golden, cuda, monkeypatch, caplog
):
    """They would reuse memory that a recording reads."""
    picture = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    arguments = {"points": golden["points_px"][:3], "max_new_tokens": TOKENS}
    expected = predictor.predict(picture, **arguments)
    fake_onnxruntime.install(monkeypatch, cuda, version="1.30.2")
    with load(micro_bundle) as device, caplog.at_level(logging.WARNING):
        for _ in range(2):
            regions = device.predict(picture, **arguments)
            np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
        assert device._pipeline.steps_replayed == 0
    assert "CUDA graphs need onnxruntime 1.31, this is 1.30.2" in caplog.text


@pytest.mark.parametrize("behaviour", ["copies", "waits"])
def test_what_cannot_be_recorded_is_run(
    micro_bundle, predictor, golden, cuda, monkeypatch, caplog, behaviour
):
    picture = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    arguments = {"points": golden["points_px"][:3], "max_new_tokens": TOKENS}
    expected = predictor.predict(picture, **arguments)
    fake_onnxruntime.install(monkeypatch, cuda, behaviour)
    with load(micro_bundle) as device, caplog.at_level(logging.WARNING):
        for _ in range(2):
            regions = device.predict(picture, **arguments)
            np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
        assert device._pipeline.steps_replayed == 0
    assert [r.message.split(",")[0] for r in caplog.records] == ["CUDA graphs are off"]
    assert cuda.leaks() == {}


@pytest.mark.parametrize("known", [True, False])
def test_inputs_that_the_cpu_reads_are_bound_for_each_run(
    micro_bundle, predictor, golden, cuda, monkeypatch, known
):
    pictures = [np.ascontiguousarray(golden[f"image_bgr_{i}"][..., ::-1]) for i in (0, 0)]
    pictures[1] = np.ascontiguousarray(pictures[1][:, ::-1])
    inputs = ("images", "point_coords", "position")
    fake_onnxruntime.install(monkeypatch, cuda, on_the_cpu=inputs)
    if not known:  # as before onnxruntime 1.23.2
        monkeypatch.delattr(fake_onnxruntime.FakeSession, "get_input_memory_infos")
    with load(micro_bundle) as device:
        for picture in (*pictures, pictures[0]):
            for points in (golden["points_px"][:3], golden["points_px"][1:4]):
                arguments = {"points": points, "max_new_tokens": TOKENS}
                regions = device.predict(picture, **arguments)
                expected = predictor.predict(picture, **arguments)
                np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
                np.testing.assert_array_equal(regions.masks, expected.masks)
        assert device._pipeline.steps_replayed == 0


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_close_ends_the_sessions(micro_bundle, golden, cuda, monkeypatch, provider):
    """A session frees its arena and its weights when nothing refers to it any more."""
    module = fake_onnxruntime.install(monkeypatch, cuda)
    picture = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    device = load(micro_bundle, provider=provider)
    device.predict(picture, points=[[[9, 9, 1]]], max_new_tokens=2)
    sessions = [weakref.ref(session) for session in module.sessions]
    module.sessions.clear()
    assert len(sessions) == 3 and all(session() for session in sessions)
    device.close()
    gc.collect()
    assert [session() for session in sessions] == [None] * 3


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


def test_the_reason_of_the_dynamic_linker(micro_bundle, cuda, monkeypatch, tmp_path):
    """onnxruntime only logs which libraries its providers lack; our error names them."""
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_text("no library")
    module = fake_onnxruntime.install(monkeypatch, cuda, "drops")
    module.__file__ = str(tmp_path / "__init__.py")
    with pytest.raises(SessionError, match=r"CUDAExec.*libonnxruntime_providers_cuda\.so: .*short"):
        load(micro_bundle)


def test_a_missing_provider_library(micro_bundle, cuda, monkeypatch, tmp_path):
    """A provider may be compiled in although the package does not contain its library."""
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_shared.so").touch()
    module = fake_onnxruntime.install(monkeypatch, cuda, "drops")
    module.__file__ = str(tmp_path / "__init__.py")
    with pytest.raises(
        SessionError, match=r"CUDAExec.*libonnxruntime_providers_cuda\.so is missing"
    ):
        load(micro_bundle)


def test_the_plugin_is_not_installed(micro_bundle, cuda, monkeypatch):
    fake_onnxruntime.install(monkeypatch, cuda)
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(MissingDependencyError, match=r"a plugin that.*tap-deploy\[ort-rtx\]"):
        load(micro_bundle, provider="nv_tensorrt_rtx")


def test_the_plugin_finds_no_gpu(micro_bundle, cuda, monkeypatch):
    module = fake_onnxruntime.install(monkeypatch, cuda)
    module.get_ep_devices = lambda: []
    with pytest.raises(SessionError, match="is registered but finds no GPU 0 that it supports"):
        load(micro_bundle, provider="nv_tensorrt_rtx")
    assert cuda.leaks() == {}


def test_the_real_plugin():
    """It is registered without a GPU, or says which library of the driver it misses."""
    if importlib.util.find_spec(PLUGIN) is None:
        pytest.skip(f"{PLUGIN} is not installed")
    program = (
        "import onnxruntime\n"
        "from tap_deploy.sessions.ort.provider_libraries import plugin_device\n"
        "from tap_deploy.errors import SessionError\n"
        "try: print(plugin_device(onnxruntime, 0).ep_name)\n"
        "except SessionError as exc: print(exc)\n"
    )
    # In a process of its own: it changes where libraries are looked for.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("NvTensorRTRTXExecutionProvider")
    assert "Traceback" not in done.stderr


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
    with load(micro_bundle, choices={"cuda_graphs": False}) as device:
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
    sessions = sessions_from_bundle(micro_bundle, RunOn(device="cuda"))
    assert [session.providers[0] for session in module.sessions] == ["CUDAExecutionProvider"] * 3
    feed = {
        "image_embeddings": golden["image_embeddings"][:1],
        "point_coords": np.ascontiguousarray(golden["points_model"][:4, :, :2]),
        "point_labels": golden["points_model"][:4, :, 2].astype(np.int32),
        "mask_request": request_answers(4),
        "mask_rows": mask_rows(4),
    }
    outputs = sessions["prompt_decoder"].run(feed)
    np.testing.assert_allclose(outputs["iou_predictions"], golden["iou_predictions"][:4], atol=1e-4)
