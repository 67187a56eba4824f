"""Fixtures that more than one test file uses."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import TapConfig
from tap_deploy.graphs import GraphSpec
from tap_deploy.optional_modules import turn_telemetry_off
from tap_deploy.predictor import TapPredictor
from tap_deploy.storage.files import sha256_of_file
from tests import micro_files
from tests.demo_files import make_demo_bundle
from tests.fake_cuda import FakeCuda, install_cuda_python
from tests.kept_files import Make, copy_kept
from tests.require_gpu import pytest_configure  # noqa: F401

turn_telemetry_off()  # tests import onnxruntime themselves


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Outputs of the public implementation; tests/data/README.md lists the keys."""
    with np.load(micro_files.GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def micro_config() -> TapConfig:
    return micro_files.micro_config()


@pytest.fixture(scope="session")
def micro_model(micro_config: TapConfig) -> Any:
    pytest.importorskip("torch")
    from tap_deploy.reference.synthetic import synthetic_model

    return synthetic_model(micro_config, micro_files.SEED)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Checkpoint, golden concepts and a tokenizer for the micro model, as files."""
    return micro_files.write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def micro_bundle(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bundle]:
    """A bundle of the micro model, from pytest's cache; copy it before changing anything."""
    for name in ("torch", "onnx"):
        if importlib.util.find_spec(name) is None:  # an import would take seconds
            pytest.skip(f"the bundle is made with {name}")
    folder = tmp_path_factory.mktemp("bundles")
    bundle = kept_bundle(pytestconfig, micro_files.make_bundle, folder / "tap_micro")
    before = digests(bundle.path)
    yield bundle
    assert digests(bundle.path) == before, "a test has changed the micro bundle, not a copy of it"


@pytest.fixture(scope="session")
def demo_bundle(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bundle]:
    """A bundle of the demo model in fp32 and int8, from pytest's cache."""
    for name in ("torch", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the bundle is made with {name}")
    folder = tmp_path_factory.mktemp("bundles")
    bundle = kept_bundle(pytestconfig, make_demo_bundle, folder / "tap_demo")
    before = digests(bundle.path)
    yield bundle
    assert digests(bundle.path) == before, "a test has changed the demo bundle, not a copy of it"


def kept_bundle(config: pytest.Config, make: Make, folder: pathlib.Path) -> Bundle:
    """Copy a bundle from pytest's cache; it is made if there is none, or one out of date."""
    cache = getattr(config, "cache", None)  # there is none with -p no:cacheprovider
    kept = folder.parent if cache is None else cache.mkdir(folder.name)
    copy_kept(kept, make, folder)
    return Bundle.open(folder)


def digests(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    return {path: sha256_of_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bundle(micro_bundle: Bundle, tmp_path: pathlib.Path) -> Bundle:
    """A copy of the micro bundle that a test may change."""
    return Bundle.open(shutil.copytree(micro_bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def fp16_bundle(
    tmp_path_factory: pytest.TempPathFactory, micro_bundle: Bundle, photo: pathlib.Path
) -> Bundle:
    """The micro bundle with fp16 graphs, measured on the golden sample and a photograph."""
    pytest.importorskip("onnx_ir")
    from tap_deploy.engines.fp16.convert import add_fp16

    folder = tmp_path_factory.mktemp("bundles") / "tap_micro_fp16"
    shutil.copytree(micro_bundle.path, folder)
    bundle = Bundle.open(folder)
    add_fp16(bundle, pictures=[photo])
    return bundle


@pytest.fixture(scope="session")
def predictor(micro_bundle: Bundle) -> Iterator[TapPredictor]:
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        yield predictor


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of two pictures, parts of a photograph."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(micro_files.DATA / "coffee.jpg") as photo:
        photo.crop((0, 0, 320, 200)).save(folder / "a.png")
        photo.crop((250, 150, 600, 400)).save(folder / "b.png")
    return folder


@pytest.fixture(scope="session")
def ranges(micro_bundle: Bundle, pictures: pathlib.Path) -> Any:
    """Graph name -> ``CalibrationTable`` of everything that could be quantized, method max."""
    pytest.importorskip("onnx_ir")
    from tap_deploy.engines.calibration.chain import calibrate
    from tap_deploy.engines.calibration.pictures import CalibrationImages
    from tap_deploy.engines.qdq.chosen_nodes import (
        attention_nodes,
        default_selection,
        residual_nodes,
        tensors_to_calibrate,
    )

    tensors, fp32 = {}, micro_bundle.variant("fp32")
    for name, chosen in default_selection(fp32).items():
        model = fp32.load(name)
        nodes = (*chosen.nodes, *attention_nodes(model), *residual_nodes(model))
        tensors[name] = tensors_to_calibrate(model, nodes)
    images = CalibrationImages.from_path(pictures)
    return calibrate(fp32, images, method="max", tensors=tensors, threads=1)


def is_residual(node: Any) -> bool:
    """Whether an Add of a block of the encoder closes a residual branch."""
    return re.fullmatch(r"blocks\.\d+/Add(_\d)?", node.name) is not None and not any(
        value.is_initializer() for value in node.inputs
    )


@pytest.fixture(scope="session")
def rtx_plan(micro_config: TapConfig) -> Any:
    """Compile an ONNX file of the micro model with NVIDIA's builder; it needs no GPU for that."""
    pytest.importorskip("tensorrt_rtx")
    from tap_deploy.engines.build.builder import engine_from_onnx
    from tap_deploy.engines.build.profiles import optimization_profile
    from tap_deploy.engines.build.target import BuildTarget

    target = BuildTarget(backend="tensorrt_rtx", precision="int8", compute_capabilities=("8.6",))

    def build(path: pathlib.Path, spec: GraphSpec) -> bytes:
        profile = optimization_profile(spec, target, micro_config)
        return engine_from_onnx(path, target, profile=profile).plan

    return build


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake GPU behind cuda-python."""
    fake = FakeCuda()
    install_cuda_python(monkeypatch, fake)
    return fake


@pytest.fixture(scope="session")
def photo() -> pathlib.Path:
    return micro_files.DATA / "coffee.jpg"
