"""Self-test and benchmark of engines, on a fake GPU and a strict fake of TensorRT 10.3."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from tap_deploy import TapPredictor
from tap_deploy.bench.run import run
from tap_deploy.bench.table import latency_table
from tap_deploy.bundle.bundle import GOLDEN_FILE, Bundle, file_records
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.cli import main
from tap_deploy.engines.build.bundle_build import build_engines
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.errors import BundleError, SessionError
from tap_deploy.machine.gpu import Gpu
from tap_deploy.sessions.gpu.captioner import DeviceCaptioner
from tap_deploy.sessions.gpu.cuda_python import CudaPythonMemory
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.sessions.trt.engine import TensorRtEngine, TensorRtExecutor
from tap_deploy.sessions.trt.log import error_log
from tests.fake_cuda import FakeCuda
from tests.strict_tensorrt_runtime import runtime_module
from tests.test_bench import settings, setup_of

VERSION = "10.3"
GPU = Gpu(name="Fake RTX", compute_capability="8.9", driver="580", integrated=False)


def install(monkeypatch, cuda):
    monkeypatch.setitem(sys.modules, "tensorrt", runtime_module(VERSION, cuda, "tensorrt"))


@pytest.fixture(scope="module")
def engine_bundle(micro_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "bundle"
    bundle = Bundle.open(shutil.copytree(micro_bundle.path, path))
    target = BuildTarget(backend="tensorrt", precision="fp32", max_prompts=4, max_points=5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, FakeCuda())
        list(build_engines(bundle, target, find_gpu=lambda: GPU, available_bytes=lambda: 1 << 40))
    return bundle


@pytest.fixture
def bundle(engine_bundle, tmp_path, monkeypatch, cuda):
    install(monkeypatch, cuda)
    return Bundle.open(shutil.copytree(engine_bundle.path, tmp_path / "bundle"))


def selftest(bundle, *options):
    command = ["selftest", str(bundle.path), "--backend", "tensorrt", "--precision", "fp32"]
    return CliRunner().invoke(main, [*command, *options])


def verdict(bundle):
    (path,) = bundle.path.glob("engines/*/selftest.json")
    (mark,) = json.loads(path.read_text("utf-8")).values()
    return mark


def test_engines_that_are_right(bundle):
    result = selftest(bundle, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == verdict(bundle)
    assert (found["passed"], found["backend"], found["comparisons"]) == (True, "tensorrt", 54)
    assert found["backend_version"].startswith("10.3")
    assert Bundle.open(bundle.path).manifest.precisions == {}
    TapPredictor.from_bundle(bundle.path, "tensorrt").close()


def test_engines_that_are_wrong_are_refused_until_a_selftest_passes(bundle):
    golden = bundle.golden()
    first, *others = golden.samples
    first = dataclasses.replace(first, low_res_masks=first.low_res_masks + np.float32(1))
    expect(bundle, dataclasses.replace(golden, samples=(first, *others)))
    result = selftest(bundle)
    assert result.exit_code == 1
    assert "[✗] prompt_decoder  low_res_masks" in result.stdout
    assert "fails its self-test with tensorrt in fp32" in result.stderr
    assert verdict(bundle)["passed"] is False
    with pytest.raises(BundleError, match="failed their self-test"):
        TapPredictor.from_bundle(bundle.path, "tensorrt")
    TapPredictor.from_bundle(bundle.path, "tensorrt", allow_failed=True).close()
    TapPredictor.from_bundle(bundle.path).close()  # the ONNX files are not to blame
    expect(bundle, golden)
    assert selftest(bundle).exit_code == 0
    TapPredictor.from_bundle(bundle.path, "tensorrt").close()


@pytest.mark.parametrize(("prompts", "points", "code"), [(1, 4, 0), (3, 16, 0), (4, 3, 0)])
def test_engines_for_fewer_prompts_than_the_samples_have(bundle, prompts, points, code):
    """Prompts are independent and can be left out; points are not, and nothing is marked."""
    shutil.rmtree(bundle.path / "engines")
    target = BuildTarget(
        backend="tensorrt", precision="fp32", max_prompts=prompts, max_points=points
    )
    list(build_engines(bundle, target, find_gpu=lambda: GPU, available_bytes=lambda: 1 << 40))
    result = selftest(bundle)
    assert result.exit_code == code, result.output
    if code:
        assert "build them with --max-points 1" in result.stderr
        assert not list(bundle.path.glob("engines/*/selftest.json"))
    else:
        assert f"P={min(prompts, 3)} N=1" in result.stdout
        assert (f"P={prompts} N=4" in result.stdout) is (points >= 4)
        assert verdict(bundle)["passed"] is True


def test_engines_share_one_log(bundle):
    """TensorRT keeps one logger per process, the first one."""
    trt = sys.modules["tensorrt"]
    assert error_log(trt) is error_log(trt)
    log = error_log(trt)
    log.log(trt.ILogger.ERROR, " a line \n")
    log.log(trt.ILogger.WARNING, "no error")
    log.log(trt.ILogger.INTERNAL_ERROR, "another")
    assert (log.take(), log.take()) == ("a line; another", "")


def test_a_runtime_that_does_not_start(bundle, monkeypatch):
    def refuse(self, logger):
        logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"].Runtime, "__init__", refuse)
    result = selftest(bundle)
    assert result.exit_code == 2
    assert "does not start here" in result.stderr and "error: 35" in result.stderr


def test_engines_that_are_not_there(bundle):
    shutil.rmtree(bundle.path / "engines")
    result = selftest(bundle)
    assert result.exit_code == 2
    assert "tap-export build" in result.stderr
    assert not list(bundle.path.glob("engines/*/selftest.json"))


def test_the_benchmark_runs_engines(bundle):
    setup = setup_of(bundle, run_on=RunOn(backend="tensorrt"), tokens=2)
    report = run(setup, settings(prompts=(2, 9)))
    assert [row["row"] for row in report["rows"]] == [
        "encode 1 image",
        "decode P=2",
        "decode P=9",  # in chunks of four
        "caption P=2",
        "caption P=9",
        "end to end P=2",
        "end to end P=9",
    ]
    for row in report["rows"]:
        (values,) = row["candidates"].values()
        assert values["gpu"]["iterations"] == values["latency"]["iterations"] == 2
        assert values["gpu"]["min_ms"] == 1  # the fake's events are 1 ms apart
    assert "| GPU ms | host ms |" in latency_table(report)
    found = report["conditions"]
    assert found["settings"]["cuda_graphs"] is True
    assert {engine["graph"] for engine in found["engines"]} == set(bundle.variant("fp32").specs)
    assert all(engine["backend_version"].startswith("10.3") for engine in found["engines"])


def expect(bundle, golden):
    """Replace the golden samples, with valid hashes."""
    golden.save(bundle.path / GOLDEN_FILE)
    files = bundle.manifest.files | {GOLDEN_FILE: file_records(bundle.path)[GOLDEN_FILE]}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")


@pytest.mark.parametrize("replay_is_right", [True, False])
def test_what_is_replayed_is_tested(bundle, monkeypatch, replay_is_right):
    """Steps that are right when run and wrong when replayed."""
    if not replay_is_right:
        steps = DeviceCaptioner._step

        def step(self, batch, candidates, position):
            before = self.steps_replayed
            steps(self, batch, candidates, position)
            if self.steps_replayed > before:
                # Behind the replay: a token of another position.
                source = self._ids_row(0)
                width = self._row_bytes
                if position:
                    self._memory.copy_on_device(
                        self._ids_row(position), source, width, self._stream
                    )

        monkeypatch.setattr(DeviceCaptioner, "_step", step)
    result = selftest(bundle)
    found = verdict(bundle)
    assert result.exit_code == (0 if replay_is_right else 1), result.output
    if replay_is_right:
        return
    assert found["comparisons"] == 54 and found["error"] is None
    turned, again = found["failed"]  # all else is right, the first run of the pipeline, too
    assert "caption_ids" in turned and "reversed prompts" in turned
    assert "caption_ids" in again and "replayed" in again
    with pytest.raises(BundleError, match="failed their self-test"):
        TapPredictor.from_bundle(bundle.path, "tensorrt")


def test_a_pipeline_that_does_not_load_has_failed(bundle, monkeypatch):
    """Each graph loads on its own, but the predictor fails to load."""

    def refuse(self):
        raise SessionError("no memory for the captions")

    monkeypatch.setattr(DeviceCaptioner, "_allocate", refuse)
    assert selftest(bundle).exit_code == 1
    assert (verdict(bundle)["passed"], verdict(bundle)["comparisons"]) == (False, 36)
    assert "no memory for the captions" in verdict(bundle)["error"]


@pytest.mark.parametrize("reason", ["recording fails", "cannot be recorded"])
def test_captions_that_are_not_replayed_have_failed(bundle, monkeypatch, reason):
    """All numbers are right, but captions would take several times as long."""
    if reason == "recording fails":

        def refuse(self, stream, enqueue):
            raise SessionError("no CUDA graphs today")

        monkeypatch.setattr(CudaPythonMemory, "_capture", refuse)
    else:
        monkeypatch.setattr(TensorRtExecutor, "can_record", lambda self: False)
    result = selftest(bundle)
    assert result.exit_code == 1
    found = verdict(bundle)
    assert (found["passed"], found["failed"]) == (False, [])
    assert found["error"].startswith("no caption step was replayed as a CUDA graph; expected")
    assert found["error"] in result.stderr


def test_an_engine_that_records_nothing_need_not_replay(bundle, monkeypatch):
    monkeypatch.setattr(TensorRtEngine, "can_record", False)
    assert selftest(bundle).exit_code == 0
