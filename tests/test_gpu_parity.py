"""``pytest -m gpu``: every engine gives what onnxruntime gives on the CPU, on a real GPU.

Where an engine cannot run, its tests skip and say why; with ``TAP_REQUIRE_GPU=1`` a run of nothing
but skips fails. Engines are built first, by the builder that ``tap-export build`` uses.
``TAP_GPU_BUNDLE`` names a folder with a bundle of the micro model in fp32, fp16 and int8: making
one takes a minute, and needs torch.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tap_deploy import TapPredictor
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli import main
from tap_deploy.cli.verify import verify_bundle
from tap_deploy.engines.build.bundle_build import build_engines
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.engines.fp16.convert import add_fp16
from tap_deploy.engines.int8.make import make_int8
from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
from tap_deploy.engines.smoothing.smoothed_variant import OFF
from tap_deploy.errors import TapError
from tap_deploy.machine.gpu import local_gpu
from tap_deploy.sessions.gpu.open_memory import open_device_memory
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.ort.provider_libraries import (
    library_error,
    plugin_device,
    preload_libraries,
)
from tap_deploy.sessions.ort.providers import PLUGIN, PROVIDERS
from tap_deploy.sessions.run_on import RunOn

pytestmark = pytest.mark.gpu

# Backend, provider of onnxruntime, package that must be there.
ENGINES = [
    ("tensorrt", None, "tensorrt"),
    ("tensorrt_rtx", None, "tensorrt_rtx"),
    ("onnxruntime", "cuda", "onnxruntime"),
    ("onnxruntime", "tensorrt", "onnxruntime"),
    ("onnxruntime", "nv_tensorrt_rtx", "onnxruntime"),
]
IDS = ["tensorrt", "tensorrt_rtx", "ort-cuda", "ort-tensorrt", "ort-nv_tensorrt_rtx"]
RTX_GPUS = {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}
PRECISIONS = ("fp32", "fp16", "int8")
# fp32 without TF32: only the order of sums differs, as from PyTorch to onnxruntime.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=ENGINES, ids=IDS)
def engine(request: Any, tmp_path_factory: Any) -> Any:
    """A bundle with engines in every precision, and the arguments that load it."""
    backend, provider, package = request.param
    gpu = local_gpu()
    if gpu is None:
        pytest.skip("no NVIDIA GPU, or no driver for it")
    if "rtx" in f"{backend} {provider}" and gpu.compute_capability not in RTX_GPUS:
        pytest.skip(f"TensorRT-RTX is not for SM {gpu.compute_capability} ({gpu.name})")
    try:
        importlib.import_module(package)
    except ImportError as exc:
        pytest.skip(f"{package} is not installed: {exc}")
    try:
        open_device_memory()
    except TapError as exc:
        pytest.skip(str(exc))
    if backend == "onnxruntime":
        _skip_without_provider(provider)
    path = tmp_path_factory.mktemp("gpu") / "bundle"
    # Only now: it takes seconds to make, which no machine without a GPU should spend.
    given = os.environ.get("TAP_GPU_BUNDLE")
    shutil.copytree(given or request.getfixturevalue("micro_bundle").path, path)
    if not given:
        add_fp16(Bundle.open(path))
        # One picture is enough: the test is about running the graphs, not their accuracy.
        quantize = QuantizeOptions(calibration_data=request.getfixturevalue("photo"), samples=1)
        options = Int8Options(quantize=quantize, smoothquant=OFF, verdict=None)
        make_int8(Bundle.open(path), options)
    if backend != "onnxruntime":
        _build(Bundle.open(path), backend)
    return path, {"backend": backend, "device": "cuda", "provider": provider}


def _build(bundle: Bundle, backend: str) -> None:
    for precision in PRECISIONS:
        if precision not in bundle.manifest.graphs:
            continue
        target = BuildTarget(
            backend=backend,
            precision=precision,
            max_prompts=8,
            max_points=8,
            compute_capabilities=("current",) if backend == "tensorrt_rtx" else (),
        )
        list(build_engines(bundle, target))


def _skip_without_provider(name: str) -> None:
    """Skip where a provider's package, or a library it needs, is not installed."""
    import onnxruntime

    provider = PROVIDERS[name]
    if provider == PLUGIN:
        try:
            plugin_device(onnxruntime, 0)
        except TapError as exc:
            pytest.skip(str(exc))
        return
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no provider {name}")
    preload_libraries(onnxruntime, provider)
    reason = library_error(onnxruntime, provider)
    if reason is not None:
        pytest.skip(f"{provider} does not load: {reason}")


@pytest.fixture(scope="module")
def predictor(engine: Any) -> Iterator[TapPredictor]:
    """The expected results: onnxruntime on the CPU in fp32."""
    with TapPredictor.from_bundle(engine[0]) as predictor:
        yield predictor


@pytest.fixture
def load(engine: Any, tmp_path: Any) -> Any:
    path, arguments = engine

    def loaded(**options: Any) -> TapPredictor:
        chosen = DeviceOptions(max_prompts=8, max_points=8, cache_folder=tmp_path, **options)
        return TapPredictor.from_bundle(path, device_options=chosen, **arguments)

    return loaded


@pytest.fixture(scope="module")
def picture(golden: dict[str, np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])


@pytest.fixture(scope="module")
def points(golden: dict[str, np.ndarray]) -> np.ndarray:
    """Twelve regions: two calls of the graphs."""
    return np.concatenate([golden["points_px"][:4]] * 3)


def assert_same(regions: Any, expected: Any) -> None:
    np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)
    np.testing.assert_array_equal(regions.mask_index, expected.mask_index)
    assert regions.captions == expected.captions
    assert (regions.masks != expected.masks).mean() < 1e-4
    names = [[name for name, _ in row] for row in regions.concepts]
    assert names == [[name for name, _ in row] for row in expected.concepts]
    for name in ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings"):
        actual = getattr(regions, name)
        np.testing.assert_allclose(actual, getattr(expected, name), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{}, {"cuda_graphs": False}, {"zero_copy": True}, {"eos_interval_steps": 1}],
    ids=["default", "no-cuda-graphs", "zero-copy", "look-every-step"],
)
def test_same_as_onnxruntime_on_the_cpu(load, predictor, picture, points, options):
    expected = predictor.predict(picture, points=points)
    with load(**options) as device:
        for _ in range(3):  # recorded, replayed, replayed
            assert_same(device.predict(picture, points=points), expected)


def test_threads(load, predictor, picture, points):
    expected = predictor.predict(picture, points=points)
    with load(contexts=2) as device, concurrent.futures.ThreadPoolExecutor(4) as pool:
        encoded = device.encode(picture)
        for regions in pool.map(lambda _: device.predict(encoded, points=points), range(8)):
            assert_same(regions, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graph_by_graph(engine, precision):
    path, arguments = engine
    bundle = Bundle.open(path)
    if precision not in bundle.manifest.graphs:
        pytest.skip(f"the bundle has no {precision}")
    run_on = RunOn(
        backend=arguments["backend"],
        precision=precision,
        device=arguments["device"],
        provider=arguments["provider"],
    )
    report = verify_bundle(bundle, run_on, [bundle.golden()])
    assert report.passed, str(report)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_selftest_passes(engine, precision):
    """The predictor's own path, recorded and replayed, in every precision."""
    path, arguments = engine
    if precision not in Bundle.open(path).manifest.graphs:
        pytest.skip(f"the bundle has no {precision}")
    chosen = arguments | {"precision": precision}
    words = [w for name, value in chosen.items() if value for w in (f"--{name}", value)]
    result = CliRunner().invoke(main, ["selftest", str(path), *words])
    assert result.exit_code == 0, result.output


def test_cuda_graphs_are_used(load, engine, picture, points):
    if engine[1]["provider"] not in (None, "cuda"):
        pytest.skip("runs of TensorRT in onnxruntime are not recorded")
    with load() as device:
        for _ in range(3):
            device.predict(picture, points=points)
        assert device._pipeline.steps_replayed > 0
