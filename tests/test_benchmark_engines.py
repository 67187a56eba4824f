"""The benchmark of backends: its calls, counts and output; times are not tested."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from benchmarks.engines import Settings, main, run, summary
from benchmarks.stages import Inputs, stages, steps_of
from click.testing import CliRunner

from tap_deploy.machine.host import CommandResult, Host
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.run_on import RunOn

PROJECT = pathlib.Path(__file__).parent.parent
QUICK = ("--threads", "1", "--iterations", "2", "--seconds", "0", "--tokens", "3")


def settings(**changes):
    values = {
        "run_on": RunOn(threads=1),
        "prompts": (1, 3),
        "tokens": 4,
        "iterations": 2,
        "seconds": 0.0,
        "cuda_graphs": True,
        "zero_copy": False,
    }
    return Settings(**(values | changes))


@pytest.fixture(scope="module")
def report(micro_bundle):
    return run(micro_bundle, settings())


def test_every_stage_is_timed(report):
    assert [stage["stage"] for stage in report["stages"]] == [
        "encode 1 image",
        "decode P=1",
        "decode P=3",
        "caption P=1, 4 tokens",
        "caption P=3, 4 tokens",
        "end to end P=1, 4 tokens",
        "end to end P=3, 4 tokens",
    ]
    for stage in report["stages"]:
        latency = stage["latency"]
        assert latency["iterations"] >= 2
        assert 0 < latency["min_ms"] <= latency["median_ms"] <= latency["p99_ms"]


def test_throughput_is_calls_by_time(report):
    encode, _, decode, _, caption, *_ = report["stages"]
    assert encode["images_per_second"] == pytest.approx(1e3 / encode["latency"]["mean_ms"])
    assert decode["regions_per_second"] == pytest.approx(3e3 / decode["latency"]["mean_ms"])
    per_step = 1e3 * caption["latency"]["median_ms"] / 5  # the prefix is a step as well
    assert caption["microseconds_per_step"] == pytest.approx(per_step)
    tokens = 1e3 * 3 * 4 / caption["latency"]["mean_ms"]
    assert caption["tokens_per_second"] == pytest.approx(tokens)


def test_conditions(report, micro_bundle):
    found = report["conditions"]
    assert (found["model"], found["backend"], found["variant"]) == (
        micro_bundle.manifest.model,
        "onnxruntime",
        "fp32",
    )
    assert found["versions"]["numpy"] == np.__version__
    assert {"python", "onnxruntime", "tap-deploy"} <= set(found["versions"])
    assert found["settings"]["cuda_graphs"] is None  # there are none on a CPU
    assert found["settings"]["prompts"] == (1, 3)
    assert found["settings"]["threads"] == 1
    assert found["machine"]["title"]
    assert report["memory"]["peak_rss_bytes"] > 10_000_000
    json.dumps(report)


def test_a_board_is_described(micro_bundle):
    root = PROJECT / "tests/data/jetson/jetpack-6.1-orin-nx"
    host = Host(root=root, run=lambda command: CommandResult(problem="not recorded"))
    lines = summary(run(micro_bundle, settings(prompts=(1,), tokens=1), host=host))
    assert "NVIDIA Jetson Orin NX" in lines
    assert "power mode 15W" in lines
    assert "lock it: sudo jetson_clocks" in lines


def test_stages_do_the_work_of_the_predictor(micro_bundle, predictor):
    inputs = Inputs.random(micro_bundle.config, 2)
    pipeline = pipeline_from_bundle(micro_bundle, RunOn(threads=1))
    with stages(micro_bundle, pipeline, (2,), None) as rows:
        masks, ids = rows[-1].call()
        assert rows[-1].tokens == steps_of(ids, micro_bundle.config)
    pipeline.close()
    rgb = inputs.images[0][:, :, ::-1]
    regions = predictor.predict(np.ascontiguousarray(rgb), boxes=inputs.coords.reshape(2, 4))
    np.testing.assert_array_equal(masks, regions.masks)
    np.testing.assert_array_equal(ids, regions.caption_ids)


def test_steps_are_counted_to_the_end_of_the_longest_caption(micro_config):
    pad = micro_config.pad_id
    ids = np.full((2, 6), pad)
    ids[:, 0] = 1
    ids[0, 1:3] = (7, 2)
    ids[1, 1:5] = (7, 8, 9, 2)
    assert steps_of(ids, micro_config) == 4


def test_the_command(micro_bundle, tmp_path):
    out = tmp_path / "report.json"
    arguments = [str(micro_bundle.path), *QUICK, "--prompts", "1", "--json", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| onnxruntime fp32 | median ms | p90 | p99 | cv | per s |")
    assert len(json.loads(out.read_text("utf-8"))["stages"]) == 4


def test_beside_pytorch(micro_bundle, assets, monkeypatch):
    torch = pytest.importorskip("torch")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    changed = settings(prompts=(1,), tokens=None, run_on=RunOn(threads=3))
    stages = run(micro_bundle, changed, assets["checkpoint"])["stages"]
    assert threads == [3]  # both sides have as many
    for stage in stages:
        expected = stage["baseline"]["median_ms"] / stage["latency"]["median_ms"]
        assert stage["speed_up"] == pytest.approx(expected)


def test_shares_of_the_peaks(micro_bundle):
    from benchmarks.peak_share import peak_shares

    timed = [
        {
            "stage": kind,
            "kind": kind,
            "prompts": 1,
            "tokens": tokens,
            "latency": {"median_ms": 1e3},
        }
        for kind, tokens in (("encode", 0), ("caption", 4), ("end to end", 4))
    ]
    encode, caption = peak_shares(micro_bundle, RunOn(), "orin-nano", timed)
    assert encode["share_of_arithmetic_peak"] == pytest.approx(0.965e9 / 8.35e12, rel=0.01)
    assert 0 < caption["share_of_arithmetic_peak"] < caption["share_of_bandwidth"] < 1


def test_it_needs_no_torch(micro_bundle):
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "from benchmarks.engines import main; main()"
    )
    command = [sys.executable, "-c", code, str(micro_bundle.path), *QUICK, "--prompts", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert result.returncode == 0, result.stderr
    assert "| encode 1 image |" in result.stdout
