"""``scripts/test-gpu``: the runner, the reports, and steps on a fake GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.gpu import bundles, host, latency, parity, suite
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.context import Context, Notes, Skipped, StepFailed, read_json
from benchmarks.gpu.machine import missing
from benchmarks.gpu.markdown import markdown
from benchmarks.gpu.report import exit_code
from benchmarks.gpu.runner import FAILED, NO_TIME, PASSED, SKIPPED, StepResult
from benchmarks.gpu.steps import STEPS, select
from tap_deploy import TapPredictor
from tap_deploy.bench.stages import Inputs
from tests import fake_onnxruntime

PROJECT = pathlib.Path(__file__).resolve().parent.parent
# A command line like that of the project, on other steps.
TRIAL = """
import os, signal, subprocess, sys, time
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.context import Skipped
from benchmarks.gpu.steps import Step

def passes(context, notes, headline="fine"):
    notes.put("headline", headline)

def raises(context, notes):
    notes.put("found", 1)
    raise ValueError("this is wrong\\nand more of it")

def crashes(context, notes):
    notes.put("found", 2)
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(context, notes):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    notes.put("child", child.pid)
    time.sleep(60)

def skips(context, notes):
    raise Skipped("nothing to see here")

def _step(name, **changes):
    function = f"trial:{name.split('-')[0]}"
    return Step(name=name, title=name, function=function, **{"limit_s": 30, "min_s": 0, **changes})

STEPS = (
    _step("passes"),
    _step("raises"),
    _step("crashes"),
    _step("hangs", limit_s=4),
    _step("skips"),
    _step("passes-lacking", needs=("no_such_module|nor_this",)),
    _step("passes-late", min_s=1000),
    _step("passes-options", options={"headline": "twice"}, after=("skips",)),
    _step("passes-asked", asked_for=True),
    _step("hangs-long", asked_for=True),
)
if __name__ == "__main__":
    sys.exit(main(steps=STEPS))
"""


@pytest.fixture
def trial(tmp_path):
    (tmp_path / "trial.py").write_text(TRIAL, "utf-8")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "trial.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def report_of(folder):
    values = json.loads((folder / "gpu-report.json").read_text("utf-8"))
    return values, {step["step"]: step for step in values["steps"]}


def is_running(pid):
    status = pathlib.Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_no_step_stops_the_next(trial, tmp_path):
    start = time.monotonic()
    result = trial("--budget", "100")
    assert time.monotonic() - start < 30
    assert result.returncode == 1, result.stderr
    values, steps = report_of(tmp_path)
    assert values["exit_code"] == 1
    assert {name: step["status"] for name, step in steps.items()} == {
        "passes": PASSED,
        "raises": FAILED,
        "crashes": FAILED,
        "hangs": FAILED,
        "skips": SKIPPED,
        "passes-lacking": SKIPPED,
        "passes-late": NO_TIME,
        "passes-options": PASSED,
    }
    assert steps["raises"]["reason"] == "ValueError: this is wrong"
    assert "Traceback" in steps["raises"]["log_tail"][0]
    assert steps["crashes"]["reason"] == "crashed with SIGSEGV"
    assert steps["hangs"]["reason"] == "timed out after 4 s and was killed"
    assert steps["skips"]["reason"] == "nothing to see here"
    assert steps["passes-lacking"]["reason"] == "no_such_module or nor_this is not installed"
    assert steps["passes-late"]["reason"].endswith("s left, 1000 s needed")
    assert steps["passes-options"]["notes"] == {"headline": "twice"}
    # What they had found before they ended, and where one of them hung.
    assert steps["raises"]["notes"]["found"] == 1
    assert steps["crashes"]["notes"] == {"found": 2}
    assert any("in hangs" in line for line in steps["hangs"]["log_tail"])
    assert not is_running(steps["hangs"]["notes"]["child"])
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(steps)
    assert lines[0].endswith("fine")
    assert "==> hangs" in result.stderr


def test_a_terminated_run_leaves_no_process_behind(trial, tmp_path):
    command = [sys.executable, "trial.py", "--steps", "hangs-long"]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    notes = tmp_path / "gpu-report/hangs-long.json"
    with subprocess.Popen(command, cwd=tmp_path, env=env) as process:
        for _ in range(600):
            if read_json(notes):
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
    assert not is_running(read_json(notes)["child"])


def test_what_a_step_comes_after_is_run_too(trial, tmp_path):
    result = trial("--steps", "passes-options", "--against", "passes-asked", "-o", "deep/down")
    assert result.returncode == 0, result.stderr
    _, steps = report_of(tmp_path / "deep/down")
    assert list(steps) == ["skips", "passes-options", "passes-asked"]
    assert (tmp_path / "deep/down/gpu-report/passes-asked.log").exists()


def test_a_reader_who_leaves_does_not_end_the_run(trial, tmp_path):
    command = f"{sys.executable} trial.py --steps passes-options,passes-asked | true"
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=True)
    _, steps = report_of(tmp_path)
    assert [step["status"] for step in steps.values()] == [SKIPPED, PASSED, PASSED]


def test_nothing_could_run(trial):
    assert trial("--steps", "skips,passes-lacking").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "parity,bogus"], "there is no step 'bogus'; expected some of versions, "),
        (["--bundle", "/nowhere"], "/nowhere is not a prepared folder; make one with: "),
        (["--markdown", "/nowhere"], "/nowhere is not a report"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_machine_without_a_gpu_is_told_so_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gpu.__main__.gpu_problem", lambda: "no driver")
    assert main(["-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: there is no GPU to test (no driver); --steps host needs none\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_steps():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for step in STEPS:
        assert set(step.after) <= set(names[: names.index(step.name)]), step.name
        module, _, function = step.function.partition(":")
        assert (PROJECT / f"{module.replace('.', '/')}.py").exists() and function
    assert [step.name for step in select(["parity-fp16"])] == ["bundle-micro", "parity-fp16"]
    assert not [step for step in select([]) if step.group == "torch"]
    assert {step.name for step in select([], ["torch"])} == set(names)


def result_of(status, *, uses_gpu=False):
    return StepResult(step="s", title="t", status=status, uses_gpu=uses_gpu)


def test_exit_codes():
    on_gpu = {"uses_gpu": True}
    assert exit_code([result_of(PASSED), result_of(PASSED, **on_gpu)]) == 0
    assert exit_code([result_of(PASSED, **on_gpu), result_of(FAILED)]) == 1
    assert exit_code([result_of(PASSED), result_of(SKIPPED, **on_gpu)]) == 2
    assert exit_code([result_of(PASSED), result_of(NO_TIME)]) == 0
    assert exit_code([]) == 2


def test_needs():
    assert missing(("json", "no_such_module|json")) is None
    assert missing(("cuda_no.such",)) == "cuda_no.such is not installed"


def test_from_the_checkout_without_installation(tmp_path):
    """The links come first on the path, and hold export and engines, and the tests."""
    python = tmp_path / "python"
    code = (
        "import sys, tap_deploy.export as e, tap_deploy.engines as n, benchmarks.gpu as b; "
        "import tests.fake_cuda as t; print(*(m.__file__ for m in (e, n, b, t)), sys.argv[1:])"
    )
    # -S hides installed projects, editable or not; packages are found through the path.
    python.write_text(
        f'#!/bin/sh\n[ "$1" != -c ] || exec {sys.executable} -S "$@"\n'
        f'shift\ncd / && exec {sys.executable} -S -c "{code}" "$@"\n',
        "utf-8",
    )
    python.chmod(0o755)
    packages = pathlib.Path(np.__file__).parent.parent
    result = subprocess.run(
        [PROJECT / "scripts/test-gpu", "--steps", "host"],
        env=os.environ | {"TAP_PYTHON": str(python), "PYTHONPATH": str(packages)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *files, first, second = result.stdout.split()
    assert [pathlib.Path(file).parent.name for file in files] == [
        "export",
        "engines",
        "gpu",
        "tests",
    ]
    (view,) = {pathlib.Path(file).parents[2] for file in files[:3]}
    assert view != PROJECT and not view.exists()  # it is removed at the end
    assert (first, second) == ("['--steps',", "'host']")


def test_another_python_is_refused_in_one_line():
    result = subprocess.run(
        [PROJECT / "scripts/test-gpu"],
        env=os.environ | {"TAP_PYTHON": "/no/such/python"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


@pytest.fixture
def context(tmp_path, micro_bundle):
    """A run on the micro bundle, as quick as can be."""
    context = Context(
        project=PROJECT,
        logs=tmp_path / "logs",
        work=tmp_path / "work",
        seconds=0.0,
        model="micro",
    )
    context.logs.mkdir()
    shutil.copytree(micro_bundle.path, context.work / "micro")
    return context


@pytest.fixture
def notes(context):
    return Notes(context.logs / "step.json")


@pytest.fixture
def cuda(monkeypatch, cuda):
    fake_onnxruntime.install(monkeypatch, cuda)
    return cuda


def test_context_survives_the_way_to_another_process(context):
    assert Context.from_json(context.to_json()) == context


def test_checks_go_on_and_are_kept(context, notes):
    with notes.check("good") as found:
        found["value"] = 1
    with notes.check("bad"):
        raise StepFailed("no")
    with notes.check("absent"):
        raise Skipped("not here")
    kept = read_json(context.logs / "step.json")["checks"]
    assert [check["passed"] for check in kept] == [True, False, None]
    assert kept[0]["value"] == 1
    with pytest.raises(StepFailed, match="bad: no"):
        notes.require()


def test_parity(context, notes, cuda, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr(parity, "BOXES", parity.BOXES[:2])
    monkeypatch.setattr(parity, "CYCLES", 2)
    free = iter([100 << 20, 99 << 20])
    monkeypatch.setattr(parity, "_free_bytes", lambda: next(free))
    parity.run(context, notes, "fp32")
    checks = {check["name"]: check for check in notes.values["checks"]}
    assert len(checks) == 8 and all(check["passed"] for check in checks.values())
    assert checks["same as on the CPU"]["masks"] == 1.0
    assert len(checks["verify"]["comparisons"]) == 51
    assert cuda.leaks() == {}
    with pytest.raises(Skipped, match="no fp16"):
        parity.run(context, notes, "fp16")


def test_parity_tells_other_answers_from_the_same(predictor, photo):
    regions = [
        predictor.predict(photo, boxes=[[10, 20, 200, side]], max_new_tokens=2)
        for side in (250, 250, 120)
    ]
    for compare in (parity.require_same, parity.require_similar):
        compare(*regions[:2])
        with pytest.raises(StepFailed, match=r"differ|off by|is equal"):
            compare(*regions[1:])


def test_latency(context, notes, cuda, monkeypatch):
    monkeypatch.setattr(latency, "PROMPTS", (1, 2))
    monkeypatch.setattr(latency, "MIN_ITERATIONS", 1)
    monkeypatch.setattr(latency, "ENCODER_GFLOP", {"micro": 1})
    (context.logs / "ceilings.json").write_text('{"values": {"TF32 TFLOP/s": 2.0}}', "utf-8")
    latency.run(context, notes, "fp32", tf32=True)
    stages = notes.values["stages"]
    names = ["encode 1 image", "decode P=1", "decode P=2", "caption P=1, 38 tokens"]
    names += ["caption P=2, 38 tokens", "end to end P=2, 38 tokens"]
    assert [stage["stage"] for stage in stages] == 2 * names
    assert [stage["cuda_graphs"] for stage in stages] == 6 * [True] + 6 * [False]
    share = 1 / stages[0]["latency"]["median_ms"] / 2
    assert notes.values["encoder_share_of_gemm"] == pytest.approx(share)
    assert notes.values["headline"].startswith("encode 1 image ")
    report = {"steps": [{"step": "latency-tf32", "status": "passed", "seconds": 1.0}]}
    report["steps"][0] |= {"reason": "", "notes": notes.values}
    table = markdown(report)
    assert "### tap_vit_b tf32" in table and table.count("| caption P=") == 2


def test_pytorch_does_the_same_stages(micro_config):
    from benchmarks.gpu.pytorch import torch_stages

    config = dataclasses.replace(micro_config, image_size=256)  # fp16 is slow on a CPU
    inputs = Inputs.random(config, 2)
    eager = torch_stages(config, inputs, "fp32", device="cpu")
    tasks = eager.tasks(("encode", "decode", "caption", "end to end"), (2,))
    assert [task.tokens for task in tasks] == [0, 0, 38, 38]
    masks, ids = [task.call() for task in tasks][-1]
    assert masks.shape == (2, config.image_size, config.image_size)
    assert ids.shape == (2, config.text_seq_len - 1)
    half = torch_stages(config, inputs, "fp16", device="cpu")
    assert half.model.generate(half.tokens, max_new_tokens=1).shape == ids.shape


def test_host(context, notes):
    host.run(context, notes, threads=1, regions=2, width=64, height=48)
    values = notes.values["values"]
    assert {"masks 2 x 64x48", "resize and pad", "read a JPEG"} <= set(values)
    assert all(value > 0 for value in values.values())


@pytest.mark.parametrize("outcome", ["pass", "fail", "skip", "none"])
def test_pytest_and_its_counts(context, notes, tmp_path, monkeypatch, outcome):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    bodies = {"pass": "pass", "fail": "assert 0", "skip": "pytest.skip('no GPU')", "none": "pass"}
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    marker = "@pytest.mark.gpu\n" if outcome != "none" else ""
    (project / "tests/test_it.py").write_text(
        f"import os, pytest\n{marker}def test_it():\n"
        f"    assert os.environ['TAP_GPU_BUNDLE'] and os.environ['TAP_REQUIRE_GPU']\n"
        f"    {bodies[outcome]}\n",
        "utf-8",
    )
    options = '[tool.pytest.ini_options]\nmarkers = ["gpu: needs one"]\n'
    (project / "pyproject.toml").write_text(options, "utf-8")
    there = Context(project=project, logs=context.logs, work=context.work)
    expected = {"fail": StepFailed, "skip": Skipped, "none": Skipped}.get(outcome)
    if expected is None:
        suite.run(there, notes)
        assert notes.values["headline"] == "1 passed"
    else:
        words = {
            "fail": "1 of 1 failed; first failure: test_it.py::test_it: assert 0",
            "skip": "no GPU",
            "none": "no test for a GPU",
        }
        with pytest.raises(expected, match=words[outcome]):
            suite.run(there, notes)
    with pytest.raises(Skipped, match=r"has no tests/absent\.py"):
        suite.run(there, notes, file="tests/absent.py")


def test_weights_are_taken_out_and_made_again(micro_bundle, tmp_path, notes):
    from benchmarks.gpu.strip import strip_bundle
    from benchmarks.gpu.weights import Recipes

    prepared = tmp_path / "prepared"
    sizes = strip_bundle(micro_bundle.path, prepared / "tap_vit_b", Recipes(micro_bundle.config))
    assert sizes["entries"] > 4 * sizes["kept"]
    work = tmp_path / "made"
    work.mkdir()
    bundles.run_vit_b(Context(project=PROJECT, logs=tmp_path, work=work, prepared=prepared), notes)
    assert notes.values["headline"].startswith("tap_micro, fp32")
    restored = work / "tap_vit_b"
    for graph in ("image_encoder", "prompt_decoder", "text_decoder"):
        assert_like(restored / f"onnx/fp32/{graph}.onnx", micro_bundle.variant("fp32").path(graph))
    with TapPredictor.from_bundle(restored) as predictor:  # the manifest is true of the files
        picture = np.zeros((40, 60, 3), np.uint8)
        regions = predictor.predict(picture, boxes=[[1, 2, 30, 20]])
    assert np.isfinite(regions.low_res_masks).all()
    assert np.isfinite(regions.semantic_embeddings).all()


def assert_like(path, original):
    """Assert equal graphs whose tensors are equal or have equal mean and deviation."""
    import onnx
    from onnx.numpy_helper import to_array

    found, expected = (onnx.load(each).graph for each in (path, original))
    for graph in (found, expected):
        assert len(graph.initializer)
    for one, other in zip(found.initializer, expected.initializer, strict=True):
        assert (one.name, one.dims, one.data_type) == (other.name, other.dims, other.data_type)
        if one.raw_data != other.raw_data:
            values = to_array(other)
            spread = 0.1 * float(values.std())
            assert float(to_array(one).std()) == pytest.approx(float(values.std()), abs=spread)
            assert float(to_array(one).mean()) == pytest.approx(float(values.mean()), abs=spread)
    for graph in (found, expected):
        del graph.initializer[:]
    assert found == expected


@pytest.mark.slow
def test_the_prepared_micro_bundle_is_that_of_the_tests(micro_bundle, tmp_path):
    from benchmarks.gpu.micro import make_micro

    bundle = make_micro(PROJECT / "tests" / "data", tmp_path / "micro")
    assert set(bundle.manifest.graphs) == {"fp32", "fp16", "int8_fp32", "int8"}
    one, other = (each.manifest.files["tokenizer.model"] for each in (bundle, micro_bundle))
    assert one == other
    one, other = (each.vocabulary() for each in (bundle, micro_bundle))
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.names == other.names
    one, other = (each.golden().samples[0] for each in (bundle, micro_bundle))
    np.testing.assert_array_equal(one.caption_ids, other.caption_ids)


def test_random_weights_are_for_a_machine_without_torch():
    from benchmarks.gpu.weights import Recipe, made

    common = {"axes": (1, 0), "shape": (64, 32), "mean": 0.5, "std": 0.25}
    recipe = Recipe(entry="a.weight", dtype="float16", **common)
    values = np.frombuffer(made([recipe], reference=False)(recipe), np.float16)
    assert values.size == 64 * 32
    assert values.mean() == pytest.approx(0.5, abs=0.05)
    whole = Recipe(entry=None, dtype="int8", axes=(0,), shape=(999,), mean=0.0, std=40.0)
    numbers = np.frombuffer(made([])(whole), np.int8)
    assert numbers.min() > -128 and numbers.std() == pytest.approx(40, rel=0.1)
