"""``tap-export build``, and the output of ``inspect`` for engines."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("onnx")
from strict_tensorrt import Strict, strict_module

from tap_deploy import graphs
from tap_deploy.bundle.plans import load_plan, plan_digests, record_selftest
from tap_deploy.bundle.precision_record import SelftestMark
from tap_deploy.engines.estimate import memory as dram
from tap_deploy.machine import gpu as gpu_module
from tap_deploy.machine.gpu import Gpu
from tests.commands import invoke, refused

ORIN = Gpu(name="Orin", compute_capability="8.7", driver="540.4.0 (CUDA 12.6)", integrated=True)


class BlindRuntime(Strict):
    engine_host_code_allowed = False

    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        return None


@pytest.fixture
def orin(monkeypatch):
    """TensorRT 10.3 on an Orin with 8 GB, half of it free."""
    monkeypatch.setitem(sys.modules, "tensorrt", strict_module("10.3", Runtime=BlindRuntime))
    monkeypatch.setattr(gpu_module, "local_gpu", lambda: ORIN)
    monkeypatch.setattr(dram, "available_memory", lambda: 4 << 30)


def build(bundle, *args):
    return invoke("build", bundle.path, "--precision", "fp32", *args)


def test_build_inspect_and_load(orin, bundle):
    result = build(bundle, "--max-prompts", 8, "--json")
    assert result.exit_code == 0, result.output
    engines = json.loads(result.stdout)["engines"]
    assert [e["graph"] for e in engines] == list(graphs.GRAPH_NAMES)
    assert {e["cached"] for e in engines} == {False}
    again = build(bundle, "--max-prompts", 8)
    assert again.stdout.count(": kept, ") == 3
    assert "past_key_values.0.key  min 1x2x1x64 opt 8x2x40x64 max 8x2x40x64" in again.stdout
    loaded = load_plan(
        bundle,  # the manifest does not list engines; they have sidecars
        backend="tensorrt",
        backend_version="10.3.0.1",
        compute_capability="8.7",
        variant="fp32",
        graph=graphs.TEXT_DECODER,
    )
    assert loaded.record.options == ("--max-prompts", "8")
    text = invoke("inspect", bundle.path).stdout
    line = "engines/tensorrt-10.3.0.1-sm87-fp32/text_decoder.plan (SM 8.7, "
    assert line in text
    assert "not tested" in text
    folder = loaded.path.parent
    failed = SelftestMark(passed=False, error=None)
    record_selftest(folder, failed, tested=plan_digests(folder))
    inspected = json.loads(invoke("inspect", bundle.path, "--json").stdout)
    assert len(inspected["engines"]) == 3
    assert {e["selftest_passed"] for e in inspected["engines"]} == {False}
    assert "TESTS FAILED" in invoke("inspect", bundle.path).stdout


def test_inspect_says_nothing_of_engines_that_are_not_there(micro_bundle):
    assert "engines" not in invoke("inspect", micro_bundle.path).stdout


def test_a_dry_run_shows_and_builds_nothing(orin, bundle):
    result = build(bundle, "--dry-run", "--workspace", "2GiB")
    assert result.exit_code == 0, result.output
    assert "point_coords           min 1x1x2 opt 16x2x2 max 64x16x2" in result.stdout
    assert "image_encoder: 5.8 MB of weights, about 2.5 GiB of memory to build" in result.stdout
    assert "free memory and swap: 4.0 GiB" in result.stdout
    values = json.loads(build(bundle, "--dry-run", "--json").stdout)
    assert values["available_memory_bytes"] == 4 << 30
    assert [b["graph"] for b in values["builds"]] == list(graphs.GRAPH_NAMES)
    assert not (bundle.path / "engines").exists()


def test_a_dry_run_needs_neither_backend_nor_gpu(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(gpu_module, "local_gpu", lambda: None)
    assert build(bundle, "--dry-run").exit_code == 0
    assert build(bundle, "--emit", "trtexec").exit_code == 0


@pytest.mark.parametrize("tool", ["trtexec", "polygraphy"])
def test_emit(bundle, tool):
    text = build(bundle, "--emit", tool).stdout
    assert text.count(".plan") == text.count(f"{tool} ") == 3
    commands = json.loads(build(bundle, "--emit", tool, "--json").stdout)
    assert list(commands) == list(graphs.GRAPH_NAMES)
    assert not (bundle.path / "engines").exists()


def test_memory_that_will_not_do(orin, bundle):
    refused(build(bundle, "--workspace", "4GiB"), "needs about 4.5 GiB of memory")
    assert not (bundle.path / "engines").exists()
    assert build(bundle, "--workspace", "4GiB", "--force-memory").exit_code == 0


def test_notes_go_to_stderr(orin, bundle, tmp_path):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"rubbish")
    result = build(bundle, "--timing-cache", cache, "--json")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"note: timing cache {cache} is damaged")
    json.loads(result.stdout)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workspace", "much"], "size is 'much'; expected a number"),
        (["--compute-capability", "86"], "does not support --compute-capability"),
        (["--backend", "tensorrt_rtx", "--version-compatible"], "no --version-compatible"),
        (
            ["--backend", "tensorrt_rtx", "--compute-capability", "x"],
            "is 'x'; expected one like 86",
        ),
        (["--backend", "tensorrt_rtx", "--compute-capability", ""], "is ''; expected one like 86"),
        (["--workspace", "9" * 400], "like 512MiB or 1GiB"),
        (["--opt-level", "6"], "6 is not in the range 0<=x<=5"),
        (["--hardware-compatible", "same-sm"], "has no hardware compatibility 'same-sm'"),
        (["--precision", "fp16"], "has no precision 'fp16'"),
        (["--max-prompts", "0"], "max_prompts is 0; expected 1 to 1048576"),
    ],
)
def test_refusals(orin, bundle, args, message):
    refused(build(bundle, *args), message)
    assert not (bundle.path / "engines").exists()


def test_a_bundle_that_cannot_be_written(orin, bundle):
    (bundle.path / "engines").write_text("a file is in the way")
    refused(build(bundle), "cannot write ")
