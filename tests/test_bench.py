"""``tap-export bench``: its calls, counts and output on the micro bundle; times are not tested."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tap_deploy import TapPredictor
from tap_deploy.bench import run as bench_run
from tap_deploy.bench.candidate import Setup
from tap_deploy.bench.candidates import BundleCandidate, candidate_from_name
from tap_deploy.bench.ceilings import Ceilings
from tap_deploy.bench.first_region import StartUp, measure_start_up
from tap_deploy.bench.report import load_report
from tap_deploy.bench.run import Settings, run
from tap_deploy.bench.stages import Inputs, chunk_sizes, chunks, stages, steps_of
from tap_deploy.bench.table import describe
from tap_deploy.bench.workloads import CLICK, LVIS, STREAM, VG, sample_pictures, workload
from tap_deploy.engines.verdict import choose
from tap_deploy.engines.verdict.speed import SpeedOptions
from tap_deploy.errors import InputError, SessionError
from tap_deploy.machine.host import CommandResult, Host
from tap_deploy.sessions.cpu_choice import cpu_backends
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.run_on import RunOn
from tests.commands import invoke, refused

PROJECT = pathlib.Path(__file__).parent.parent
QUICK = ("--threads", 1, "--iterations", 1, "--duration", 0, "--warmup", 0, "--tokens", 2)
QUICK_SPEED = SpeedOptions(min_iterations=1, min_seconds=0, warm_up_seconds=0)
CEILINGS = Ceilings(by="a test", flops={"fp32": 1e12}, bytes_per_second=1e11)


def setup_of(bundle, **changes):
    values = {"bundle": bundle.path, "run_on": RunOn(threads=1), "tokens": 4}
    return Setup(**values | changes)


def settings(**changes):
    values = {
        "prompts": (1, 3),
        "iterations": 2,
        "seconds": 0.0,
        "warm_up_seconds": 0.0,
        "in_new_process": False,
    }
    return Settings(**values | changes)


@pytest.fixture(scope="module")
def report(micro_bundle):
    return run(setup_of(micro_bundle), settings())


@pytest.fixture
def one_process(monkeypatch):
    """Commands of a test start no process for start-up and ceilings."""
    monkeypatch.setattr(bench_run, "cpu_ceilings", lambda threads, **options: CEILINGS)
    found = StartUp(start_up_s=1.0, first_region_s=2.0, peak_rss_bytes=10**8)
    monkeypatch.setattr(bench_run, "measure_start_up", lambda name, setup, workload: found)


def subject_of(report):
    return [row["candidates"]["onnxruntime fp32"] for row in report["rows"]]


def test_every_stage_is_timed(report):
    assert [values["stage"] for values in subject_of(report)] == [
        "encode 1 image",
        "decode P=1",
        "decode P=3",
        "caption P=1, 4 tokens",
        "caption P=3, 4 tokens",
        "end to end P=1, 4 tokens",
        "end to end P=3, 4 tokens",
    ]
    for values in subject_of(report):
        latency = values["latency"]
        assert latency["iterations"] == 2
        assert 0 < latency["min_ms"] <= latency["median_ms"] <= latency["p99_ms"]


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
    assert (found["settings"]["threads"], found["settings"]["batch"]) == (1, 1)
    assert found["machine"]["title"] and found["cpu"]["load"] >= 0
    assert report["memory"]["peak_rss_bytes"] > 10_000_000
    json.dumps(report)


def test_a_board_is_described(micro_bundle):
    root = PROJECT / "tests/data/jetson/jetpack-6.1-orin-nx"
    host = Host(root=root, run=lambda command: CommandResult(problem="not recorded"))
    found = run(setup_of(micro_bundle, tokens=1), settings(prompts=(1,)), host=host)
    lines = describe(found, {})
    assert "NVIDIA Jetson Orin NX" in lines
    assert "power mode 15W" in lines
    assert "lock it: sudo jetson_clocks" in lines


def test_stages_do_the_work_of_the_predictor(micro_bundle, predictor):
    config = micro_bundle.config
    inputs = Inputs.random(config, 2)
    pipeline = pipeline_from_bundle(micro_bundle, RunOn(threads=1))
    with stages(config, pipeline, (2,), None) as tasks:
        masks, ids = tasks[-1].call()
        assert tasks[-1].tokens == steps_of(ids, config)
    pipeline.max_prompts = 1  # calls in chunks give the same
    with stages(config, pipeline, (2,), None) as tasks:
        in_chunks = tasks[-1].call()
    pipeline.close()
    rgb = inputs.images[0][:, :, ::-1]
    regions = predictor.predict(np.ascontiguousarray(rgb), boxes=inputs.coords.reshape(2, 4))
    for found_masks, found_ids in ((masks, ids), in_chunks):
        np.testing.assert_array_equal(found_masks, regions.masks)
        np.testing.assert_array_equal(found_ids, regions.caption_ids)


def test_calls_are_chunked_as_by_the_predictor(micro_config):
    assert chunk_sizes(micro_config, 64) == (64, 64)
    assert all(size > 0 for size in chunk_sizes(micro_config, None))
    assert chunks(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_steps_are_counted_to_the_end_of_the_longest_caption(micro_config):
    pad = micro_config.pad_id
    ids = np.full((2, 6), pad)
    ids[:, 0] = 1
    ids[0, 1:3] = (7, 2)
    ids[1, 1:5] = (7, 8, 9, 2)
    assert steps_of(ids, micro_config) == 4


def test_workloads_are_those_of_the_help(micro_config):
    counts = {name: len(workload(name, micro_config).prompts) for name in (CLICK, VG, LVIS)}
    assert counts == {CLICK: 1, VG: 47, LVIS: 166}
    assert [workload(name, micro_config).captions for name in (CLICK, VG, LVIS)] == [1, 1, 0]
    stream = workload(STREAM, micro_config)
    assert (len(stream.pictures), len(stream.prompts)) == (30, 5)
    assert len({picture.tobytes() for picture in stream.pictures}) == 30
    size = micro_config.image_size
    for picture in sample_pictures(micro_config, 2):
        assert picture.shape == (round(size * 1080 / 1024), round(size * 1920 / 1024), 3)
        workload(VG, micro_config).prompts.check(picture.shape[1], picture.shape[0])


@pytest.mark.parametrize(
    ("name", "row", "tokens"),
    [
        ("click", "click P=1", 2),
        ("vg", "vg P=47", 2),
        ("lvis", "lvis P=166", 0),
        ("stream", "stream 30 images, P=5", 2),
    ],
)
def test_workload(micro_bundle, tmp_path, one_process, name, row, tokens):
    file = tmp_path / "report.json"
    result = invoke("bench", micro_bundle.path, *QUICK, "--workload", name, "--json", file)
    assert result.exit_code == 0, result.output
    assert f"| {row}" in result.stdout
    assert "| onnxruntime fp32 | fp32 | 1.00 | 2.00 | 100 |" in result.stdout
    (found,) = load_report(file)["rows"]
    assert found["row"] == row
    values = found["candidates"]["onnxruntime fp32"]
    assert values["tokens"] == tokens
    assert values["latency"]["iterations"] == 1
    bound = values["roofline"]
    assert bound["share"] == pytest.approx(bound["roofline_ms"] / values["latency"]["median_ms"])


def test_everything(micro_bundle, one_process, monkeypatch):
    found = TapPredictor.everything
    monkeypatch.setattr(
        TapPredictor, "everything", lambda self, image: found(self, image, points_per_side=2)
    )
    result = invoke("bench", micro_bundle.path, *QUICK, "--workload", "everything")
    assert result.exit_code == 0, result.output
    assert "| everything P=1024 |" in result.stdout


def test_choose_keeps_the_times_for_the_backend_cpu(micro_bundle, monkeypatch, tmp_path):
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choose, "SpeedOptions", lambda: QUICK_SPEED)
    result = invoke("bench", micro_bundle.path, "--choose")
    assert result.exit_code == 0, result.output
    assert "fp32 image_encoder: " in result.stdout and "openvino " in result.stdout
    found = cpu_backends(micro_bundle.config, RunOn(backend="cpu"))
    for graph, backend in found.items():
        assert f"fp32 {graph}: {backend} (" in result.stdout


def test_stages_with_a_plot(micro_bundle, tmp_path, one_process):
    plot = tmp_path / "plot.svg"
    arguments = ("--prompts", "1,2", "--plot", plot)
    result = invoke("bench", micro_bundle.path, *QUICK, *arguments)
    assert result.exit_code == 0, result.output
    heads = result.stdout.splitlines()[0]
    assert heads.startswith(
        "| task | candidate | calls | min ms | mean | median | p90 | p95 | p99 | max |"
    )
    assert "GPU" not in heads  # an empty column is left out
    assert "| caption P=2, 2 tokens |" in result.stdout
    texts = [element.text for element in ET.parse(plot).iter() if element.text]
    assert {"P=1", "P=2"} <= set(texts)


def test_a_run_against_a_saved_one(micro_bundle, tmp_path, one_process):
    """The saved run is edited, so that the outcome does not depend on the machine."""
    file = tmp_path / "before.json"
    command = ("bench", micro_bundle.path, *QUICK, "--prompts", "1")
    assert invoke(*command, "--json", file).exit_code == 0
    saved = json.loads(file.read_text("utf-8"))

    def with_medians(median_ms):
        for row in saved["rows"]:
            row["candidates"]["onnxruntime fp32"]["latency"]["median_ms"] = median_ms
        file.write_text(json.dumps(saved), "utf-8")
        return invoke(*command, "--against", file, "--max-regression", "5%")

    faster = with_medians(1e9)
    assert faster.exit_code == 0, faster.output
    assert f"against {file}: encode 1 image 1000000000.00 -> " in faster.stdout
    slower = with_medians(1e-9)
    assert slower.exit_code == 1
    assert "error: slower than the saved run by more than 5 %: encode 1 image" in slower.stderr
    saved["conditions"]["settings"]["threads"] = 2
    other = with_medians(1e-9)
    assert other.exit_code == 2
    assert "is not comparable: settings.threads: 2, now 1" in other.stderr
    without_limit = invoke(*command, "--against", file)
    assert without_limit.exit_code == 0
    assert f"warning: {file} is not comparable: settings.threads: 2, now 1" in without_limit.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-regression", "5%"), "--max-regression got 0 saved runs; expected one"),
        (("--max-regression", "0.05"), "'0.05' is not a percentage such as 5%"),
        (("--prompts", "1,0"), "'1,0' is not a list of numbers such as 1,16,64"),
        (("--against", "tensorflow"), "unknown candidate 'tensorflow'; expected one of torch, "),
        (("--against", "onnxruntime"), "candidate 'onnxruntime' is the bundle under test; omit it"),
        (("--against", "torch"), "torch needs the weights of the bundle; pass --checkpoint FILE"),
        (("--json", "/no/such/folder/a.json"), "cannot write /no/such/folder/a.json"),
        (("--plot", "/no/such/folder/a.svg"), "cannot write /no/such/folder/a.svg"),
        (("--duration", "inf"), "inf is not in the range 0<=x<=86400"),
        (("--against", "none.json"), "none.json cannot be read as a report"),
    ],
)
def test_bad_arguments(micro_bundle, one_process, arguments, message):
    refused(invoke("bench", micro_bundle.path, *QUICK, *arguments), message)


def test_a_baseline_without_captions_says_so(micro_bundle, assets, one_process, monkeypatch):
    pytest.importorskip("torch")
    from tap_deploy.bench import plain_onnx

    monkeypatch.setattr(plain_onnx, "session", lambda module, spec, threads: None)
    arguments = ("--workload", "vg", "--against", "onnxruntime-plain")
    weights = ("--checkpoint", assets["checkpoint"])
    result = invoke("bench", micro_bundle.path, *QUICK, *arguments, *weights)
    refused(result, "onnxruntime-plain has no captions; use --workload stage or lvis")


def test_another_precision_is_a_candidate(fp16_bundle):
    found = run(setup_of(fp16_bundle), settings(prompts=(1,), iterations=3, against=("fp16",)))
    assert list(found["candidates"]) == ["onnxruntime fp32", "onnxruntime fp16"]
    for row in found["rows"]:
        assert list(row["candidates"]) == ["onnxruntime fp32", "onnxruntime fp16"]
        assert row["ratios"]["onnxruntime fp16"]["pairs"] == 3


def test_start_up_and_ceilings_are_measured_in_processes_of_their_own(micro_bundle):
    """No torch and no onnx: they are not installed on a device."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "from tap_deploy.cli import main; main()"
    )
    quick = map(str, QUICK)
    command = [sys.executable, "-c", code, "bench", str(micro_bundle.path), *quick]
    result = subprocess.run([*command, "--prompts", "1"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| encode 1 image \|.* % \(\w+\) \|$", result.stdout, re.M)
    row = re.search(
        r"^\| onnxruntime fp32 \| fp32 \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", *[result.stdout, re.M]
    )
    loaded, answered, megabytes = (float(text) for text in row.groups())
    assert 0 < loaded <= answered and megabytes > 10
    assert re.search(r"ceilings by numpy \S+, 1 threads: fp32 \d+ GFLOP/s, copies ", result.stdout)


def test_the_peak_memory_is_that_of_the_workload(micro_bundle):
    setup = setup_of(micro_bundle).to_dict()
    click, lvis = (measure_start_up(None, setup, name) for name in (None, "lvis"))
    masks = 166 * round(1920 / 1024 * micro_bundle.config.image_size) ** 2 // 2  # bytes, or so
    assert lvis.peak_rss_bytes > click.peak_rss_bytes + masks


def test_a_bundle_that_does_not_load_is_one_line(bundle):
    (bundle.path / "onnx/fp32/text_decoder.onnx").unlink()
    with pytest.raises(SessionError, match=r"^bundle .*text_decoder"):
        measure_start_up(None, setup_of(bundle).to_dict())


def test_a_setup_survives_the_way_to_another_process(micro_bundle):
    setup = setup_of(micro_bundle, checkpoint=pathlib.Path("weights.pkl"))
    assert Setup.from_dict(json.loads(json.dumps(setup.to_dict()))) == setup


class TestPytorch:
    @pytest.fixture
    def setup(self, micro_bundle, assets, monkeypatch):
        torch = pytest.importorskip("torch")
        self.threads = []
        monkeypatch.setattr(torch, "set_num_threads", self.threads.append)
        return setup_of(micro_bundle, run_on=RunOn(threads=3), checkpoint=assets["checkpoint"])

    def test_it_takes_turns_with_the_bundle(self, setup):
        found = run(setup, settings(prompts=(1,), iterations=1, against=("torch",)))
        assert self.threads == [3]  # both sides have as many
        for row in found["rows"]:
            assert list(row["candidates"]) == ["onnxruntime fp32", "torch"]
            for ratio in row["ratios"].values():
                assert ratio["pairs"] == 1
                assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert found["candidates"]["torch"]["precision"] == "fp32"

    def test_it_gives_the_same_answers(self, setup, micro_bundle):
        chosen = workload(CLICK, micro_bundle.config)
        torch_model, bundle = candidate_from_name("torch", setup), BundleCandidate(setup)
        (expected,), (found,) = (c.answers(chosen) for c in (torch_model, bundle))
        bundle.close()
        np.testing.assert_array_equal(expected.caption_ids, found.caption_ids)
        assert expected.captions == found.captions
        assert expected.concepts[0][0][0] == found.concepts[0][0][0]
        assert (expected.masks != found.masks).mean() < 1e-3
        assert expected.masks.shape == (1, *chosen.pictures[0].shape[:2])
        (without,) = torch_model.answers(workload(LVIS, micro_bundle.config))
        assert without.captions is None
        assert steps_of(without.caption_ids, micro_bundle.config) == 0

    def test_bfloat16_does_not_leak_into_other_candidates(self, setup):
        import torch

        from tap_deploy.bench.pytorch import TorchCandidate

        half, full = (TorchCandidate(name, setup) for name in ("torch-bf16", "torch"))
        with half.stage_tasks((1,)) as tasks, full.stage_tasks((1,)) as others:
            assert not torch.is_autocast_enabled("cpu")
            dtypes = []
            half.model.image_encoder.register_forward_hook(
                lambda module, inputs, out: dtypes.append(out.dtype)
            )
            full.model.image_encoder.register_forward_hook(
                lambda module, inputs, out: dtypes.append(out.dtype)
            )
            tasks[0].call()
            others[0].call()
        assert dtypes == [torch.bfloat16, torch.float32]
        assert half.precision == "bf16"
        assert "autocast to bfloat16" in half.details["arithmetic"]

    def test_only_the_encoder_is_compiled(self, setup, monkeypatch):
        import torch

        compiled = []
        monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
        candidate = candidate_from_name("torch-compile", setup)
        assert compiled == [candidate.model.image_encoder]
        assert "the rest eager" in candidate.details["arithmetic"]

    def test_failures_are_one_line(self, setup):
        candidate = candidate_from_name("torch", setup)

        def fail(*arguments):
            raise RuntimeError("out of memory\nmore")

        candidate.model.encode_image = fail
        with pytest.raises(SessionError, match=r"^torch failed: out of memory$"):
            candidate.answers(workload(CLICK, candidate.config))

    def test_it_needs_the_device_of_the_bundle(self, setup, monkeypatch):
        import torch

        from tap_deploy.bench.pytorch import TorchCandidate

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        on_gpu = setup_of_gpu(setup)
        with pytest.raises(InputError, match="torch needs a GPU like the bundle"):
            TorchCandidate("torch", on_gpu)

    @pytest.mark.slow
    def test_plain_onnxruntime_gives_the_same_masks(self, setup, micro_bundle):
        """The export takes half a minute."""
        chosen = workload(LVIS, micro_bundle.config)
        plain, bundle = candidate_from_name("onnxruntime-plain", setup), BundleCandidate(setup)
        (expected,), (found,) = (c.answers(chosen) for c in (bundle, plain))
        assert (expected.masks != found.masks).mean() < 1e-3
        assert [name for [(name, _)] in expected.concepts] == [
            name for [(name, _)] in found.concepts
        ]
        with plain.stage_tasks((1, 2)) as tasks:
            assert [task.key for task in tasks] == ["encode 1 image", "decode P=1", "decode P=2"]
            tasks[-1].call()
        bundle.close()


def setup_of_gpu(setup):
    return Setup(bundle=setup.bundle, run_on=RunOn(device="cuda"), checkpoint=setup.checkpoint)
