"""The self-test fails closed: wrong or unfinished variants are marked and rejected."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tap_deploy import TapPredictor, graphs
from tap_deploy.bundle import marks
from tap_deploy.bundle.bundle import GOLDEN_FILE, Bundle, file_records
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.bundle.marks import check_mark, mark_variant, verified_on
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.bundle.plans import load_plan, plans_passed, save_plan
from tap_deploy.bundle.precision_record import SelftestMark
from tap_deploy.bundle.update import bundle_addition, revise_precision
from tap_deploy.errors import BundleError, SessionError, VerificationError
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.verify.selftest import SelftestSubject, run_selftest
from tests.commands import invoke
from tests.fake_cuda import block_cuda


@pytest.fixture(scope="module")
def real(micro_bundle):
    return sessions_from_bundle(micro_bundle, RunOn(threads=1))


BOARD = "a board"


def subject_of(bundle, **changes):
    values = {
        "bundle": bundle,
        "run_on": RunOn(),
        "backend_version": "1.0",
        "device": BOARD,
    }
    return SelftestSubject(**(values | changes))


def fake_sessions(bundle, real, wrong=None):
    """Sessions of their own on the same graphs; ``wrong`` maps a graph to what spoils it."""
    answers = {name: session.run for name, session in real.items()}
    for name, spoil in (wrong or {}).items():
        answers[name] = spoiled(answers[name], spoil)
    return {n: FakeSession(spec, answers[n]) for n, spec in bundle.variant("fp32").specs.items()}


def spoiled(answer, spoil):
    def compute(inputs):
        outputs = answer(inputs)
        spoil(outputs)
        return outputs

    return compute


def shifted(outputs):
    outputs[graphs.IMAGE_EMBEDDINGS] += 0.01


def one_nan(outputs):
    outputs[graphs.LOW_RES_MASKS][0, 0, 0, 0] = np.nan


def other_tokens(outputs):
    outputs[graphs.NEXT_IDS] ^= 1


def broken(outputs):
    raise SessionError("graph prompt_decoder: an illegal memory access")


def test_right_answers_pass(bundle, real):
    sessions = fake_sessions(bundle, real)
    seen = []
    result = run_selftest(subject_of(bundle), lambda: sessions, on_check=seen.append)
    assert result.passed
    assert len(seen) == len(result.checks) == 51
    assert set(result.seconds) == {*graphs.GRAPH_NAMES, "end to end"}
    assert all(session.closed for session in sessions.values())
    verdict = Bundle.open(bundle.path).manifest.precisions["fp32"].selftest["onnxruntime"][BOARD]
    assert verdict == result.mark
    (printed,) = json.loads(bundle.manifest.to_json())["precisions"]["fp32"]["selftest"].values()
    assert printed == {BOARD: json.loads(json.dumps(result.to_dict()))}
    assert (verdict.passed, verdict.failed, verdict.error) == (True, (), None)
    assert verdict.device == "a board"
    sessions_from_bundle(bundle, RunOn())
    result.require()


@pytest.mark.parametrize(
    ("graph", "spoil", "reason"),
    [
        (graphs.IMAGE_ENCODER, shifted, "[✗] image_encoder image_embeddings"),
        (graphs.PROMPT_DECODER, one_nan, "[✗] prompt_decoder low_res_masks"),
        (graphs.TEXT_DECODER, other_tokens, "[✗] text_decoder caption_ids"),
        (graphs.PROMPT_DECODER, broken, "an illegal memory access"),
    ],
    ids=["off", "nan", "tokens", "broken"],
)
def test_wrong_answers_are_marked_and_refused(bundle, real, graph, spoil, reason):
    sessions = fake_sessions(bundle, real, {graph: spoil})
    result = run_selftest(subject_of(bundle), lambda: sessions)
    assert not result.passed
    assert reason in " ".join(str(result).split())
    with pytest.raises(VerificationError, match=re.escape(reason)) as caught:
        result.require()
    assert caught.value.exit_code == 1
    assert all(session.closed for session in sessions.values())
    with pytest.raises(BundleError, match=r"failed its self-test with onnxruntime on a board"):
        TapPredictor.from_bundle(bundle.path)
    allowed = sessions_from_bundle(Bundle.open(bundle.path), RunOn(allow_failed=True))
    assert set(allowed) == set(graphs.GRAPH_NAMES)


def test_a_later_pass_takes_the_mark_away(bundle, real):
    run_selftest(
        subject_of(bundle),
        lambda: fake_sessions(bundle, real, {graphs.IMAGE_ENCODER: shifted}),
    )
    run_selftest(subject_of(bundle), lambda: fake_sessions(bundle, real))
    TapPredictor.from_bundle(bundle.path).close()


def test_the_result_on_this_machine_decides(bundle, real, monkeypatch):
    """A pass elsewhere lifts no failure, and a failure elsewhere counts until tested here."""

    def tested_on(machine, wrong):
        subject = subject_of(bundle, device=machine)
        return run_selftest(subject, lambda: fake_sessions(bundle, real, wrong)).passed

    def used_on(machine):
        monkeypatch.setattr(marks, "machine_title", lambda *, on_cpu: machine)
        sessions_from_bundle(Bundle.open(bundle.path), RunOn())

    assert not tested_on("first", {graphs.IMAGE_ENCODER: shifted})
    for machine in ("first", "second"):
        with pytest.raises(BundleError, match="failed its self-test with onnxruntime on first"):
            used_on(machine)
    assert tested_on("second", {})
    used_on("second")
    for machine in ("first", "third"):
        with pytest.raises(BundleError, match="failed its self-test with onnxruntime on first"):
            used_on(machine)
    assert verified_on(Bundle.open(bundle.path), "fp16", "onnxruntime") == set()
    assert "second" in verified_on(Bundle.open(bundle.path), "fp32", "onnxruntime")
    assert "first" not in verified_on(Bundle.open(bundle.path), "fp32", "onnxruntime")


def test_a_test_that_takes_the_process_down_has_failed(bundle, real):
    """While the graphs run, a failed verdict is on disk in case the process dies."""

    def stop(outputs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_selftest(
            subject_of(bundle), lambda: fake_sessions(bundle, real, {graphs.TEXT_DECODER: stop})
        )
    with pytest.raises(BundleError, match="failed its self-test"):
        TapPredictor.from_bundle(bundle.path)


def test_graphs_that_do_not_load_are_not_marked(bundle):
    def load():
        raise SessionError("no driver")

    with pytest.raises(SessionError, match="no driver"):
        run_selftest(subject_of(bundle), load)
    assert bundle.manifest.precisions == {}


def test_verdicts_of_other_ways_to_run_stay(bundle, real):
    revise_precision(bundle, "fp32", lambda record: dataclasses.replace(record, made_from="me"))
    failed = SelftestMark(passed=False, error=None)
    mark_variant(bundle, "fp32", RunOn(device="cuda").mark_name, failed)
    run_selftest(subject_of(bundle), lambda: fake_sessions(bundle, real))
    record = Bundle.open(bundle.path).manifest.precisions["fp32"]
    assert record.made_from == "me"
    assert set(record.selftest) == {"onnxruntime", "onnxruntime-cuda"}
    check_mark(bundle, "fp32", "onnxruntime")
    with pytest.raises(BundleError, match="with onnxruntime-cuda on an unknown machine"):
        check_mark(bundle, "fp32", "onnxruntime-cuda")


@pytest.mark.parametrize(
    "stored",
    ["passed", *({"onnxruntime": {"": mark}} for mark in ("passed", [], {"passed": 1}, {}, None))],
)
def test_marks_that_cannot_be_read_are_refused(bundle, stored):
    path = bundle.path / MANIFEST_NAME
    manifest = json.loads(path.read_text("utf-8"))
    manifest["precisions"]["fp32"] = {"selftest": stored}
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(bundle.path)


def test_no_pass_for_graphs_that_were_not_tested(bundle, real):
    def replaced_while_it_runs():
        copy_graphs(bundle)
        return fake_sessions(bundle, real)

    with pytest.raises(BundleError, match="another command changed its fp32 graphs meanwhile"):
        run_selftest(subject_of(bundle), replaced_while_it_runs)
    assert Bundle.open(bundle.path).manifest.precisions == {}


def copy_graphs(bundle):
    """Replace the fp32 graphs, as another command does."""
    other = Bundle.open(bundle.path)
    with bundle_addition(other) as addition:
        addition.graphs["fp32"] = other.manifest.graphs["fp32"]
        file = other.manifest.graphs["fp32"][graphs.IMAGE_ENCODER].file
        (addition.folder / file).parent.mkdir(parents=True)
        # The same graph, with a description.
        graph = (bundle.path / file).read_bytes() + b"\x32\x03new"
        (addition.folder / file).write_bytes(graph)


# A self-test that pauses half-way, prints a line, and continues on command.
PAUSED = """
import sys
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import BundleError
from tap_deploy.verify.selftest import SelftestSubject, run_selftest
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn
bundle = Bundle.open(sys.argv[1])
run_on = RunOn(threads=1, allow_failed=True)
subject = SelftestSubject(bundle=bundle, run_on=run_on, backend_version="1", device="a board")
def load():
    return sessions_from_bundle(bundle, run_on)
def pause(check):
    if check.graph == "end to end" and check.tensor == "low_res_masks" and "P=4" in check.sample:
        print("paused", flush=True)
        sys.stdin.readline()
try:
    print(run_selftest(subject, load, on_check=pause).passed)
except BundleError as exc:
    print(exc)
"""


@pytest.mark.parametrize("wrong", [{graphs.IMAGE_ENCODER: shifted}, {}], ids=["fails", "passes"])
def test_two_selftests_at_a_time_lose_no_failure(bundle, real, wrong):
    command = [sys.executable, "-c", PAUSED, str(bundle.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "paused\n"
        here = run_selftest(
            subject_of(Bundle.open(bundle.path)), lambda: fake_sessions(bundle, real, wrong)
        )
        outcome, _ = other.communicate("\n")
    (mark,) = Bundle.open(bundle.path).manifest.precisions["fp32"].selftest["onnxruntime"].values()
    assert mark.passed is here.passed is (not wrong)
    if wrong:
        assert "another one that started meanwhile failed" in outcome
        assert "repeat the self-test" in outcome
        with pytest.raises(BundleError, match="failed its self-test"):
            TapPredictor.from_bundle(bundle.path)
    else:
        assert outcome == "True\n"


def plan_record(bundle, plan):
    import hashlib

    file = bundle.manifest.graphs["fp32"][graphs.IMAGE_ENCODER].file
    return PlanRecord(
        graph=graphs.IMAGE_ENCODER,
        backend="tensorrt",
        backend_version="10.3.0",
        compute_capabilities=("8.7",),
        minimum_compute_capability=None,
        version_compatible=False,
        gpu="Orin",
        driver=None,
        variant="fp32",
        onnx_sha256=bundle.manifest.files[file].sha256,
        onnx_data_sha256=None,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        size_bytes=len(plan),
        profiles={},
        flags={},
        options=(),
        build_seconds=1.0,
        layer_precisions=None,
    )


def test_engines_keep_their_verdict_beside_their_plans(bundle, real):
    folder = save_plan(bundle, b"plan", plan_record(bundle, b"plan")).parent
    subject = subject_of(bundle, run_on=RunOn(backend="tensorrt"), plans=folder)
    wrong = {graphs.TEXT_DECODER: other_tokens}
    run_selftest(subject, lambda: fake_sessions(bundle, real, wrong))
    assert plans_passed(folder) is False
    assert bundle.manifest.precisions == {}  # the ONNX files are not to blame

    def load(**options):
        return load_plan(
            bundle,
            backend="tensorrt",
            backend_version="10.3.0",
            compute_capability="8.7",
            variant="fp32",
            graph=graphs.IMAGE_ENCODER,
            **options,
        )

    with pytest.raises(BundleError, match="failed their self-test"):
        load()
    assert load(allow_failed_selftest=True).plan == b"plan"
    run_selftest(subject, lambda: fake_sessions(bundle, real))
    assert plans_passed(folder) is True
    assert load().plan == b"plan"


def test_the_command(bundle):
    result = invoke("selftest", bundle.path, "--json")
    assert result.exit_code == 0, result.output
    verdict = json.loads(result.stdout)
    assert verdict["passed"] is True
    assert verdict["comparisons"] == 69
    assert sum(verdict["seconds"].values()) < 60
    assert json.loads((bundle.path / MANIFEST_NAME).read_text("utf-8"))["precisions"] == {
        "fp32": {"selftest": {"onnxruntime": {verdict["device"]: verdict}}}
    }


def test_the_command_on_a_model_that_is_off(bundle, real):
    spoil_golden(bundle)
    result = invoke("selftest", bundle.path)
    assert result.exit_code == 1
    assert result.stdout.startswith("[✗] image_encoder   image_embeddings")
    assert "FAILED: 69 comparisons" in result.stdout
    assert f"\ntap-export inspect {bundle.path} --polygraphy polygraphy\n" in result.stdout
    assert "polygraphy run" in result.stdout
    assert "fails its self-test with onnxruntime in fp32" in result.stderr
    run = invoke("run", bundle.path, "photo.jpg", "--point", "1,1")
    assert run.exit_code == 2


def test_the_command_needs_a_backend_that_is_there(bundle):
    result = invoke("selftest", bundle.path, "--backend", "abacus")
    assert result.exit_code == 2
    assert "unknown backend 'abacus'" in result.stderr
    assert Bundle.open(bundle.path).manifest.precisions == {}


def spoil_golden(bundle):
    """Change the expected embeddings, with valid hashes."""
    golden, path = bundle.golden(), bundle.path / GOLDEN_FILE
    other = golden.samples[0].image_embeddings + np.float32(0.5)
    samples = [dataclasses.replace(sample, image_embeddings=other) for sample in golden.samples]
    dataclasses.replace(golden, samples=tuple(samples)).save(path)
    files = bundle.manifest.files | {GOLDEN_FILE: file_records(bundle.path)[GOLDEN_FILE]}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")


def test_the_command_on_a_gpu_needs_what_a_predictor_needs(bundle, monkeypatch):
    """Sessions of onnxruntime need no CUDA package, the pipeline does: nothing is marked for it."""
    block_cuda(monkeypatch)
    result = invoke("selftest", bundle.path, "--device", "cuda")
    assert result.exit_code == 2
    assert "needs cuda-python or pycuda" in result.stderr
    assert Bundle.open(bundle.path).manifest.precisions == {}


@pytest.mark.parametrize("wrong", [{graphs.IMAGE_ENCODER: shifted}, {}], ids=["fails", "passes"])
def test_a_bundle_that_cannot_be_written_is_tested_and_not_marked(
    bundle, real, wrong, monkeypatch, caplog
):
    before = (bundle.path / "manifest.json").read_bytes()
    monkeypatch.setattr("tap_deploy.verify.selftest.os.access", lambda path, mode: False)
    result = run_selftest(subject_of(bundle), lambda: fake_sessions(bundle, real, wrong))
    assert result.passed is (not wrong)
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert caplog.messages == [f"{bundle.path} cannot be written: the verdict is not kept there"]


@pytest.mark.parametrize("command", ["verdict", "convert", "quantize"])
def test_what_cannot_be_kept_is_refused_before_the_work(bundle, pictures, monkeypatch, command):
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle.path)
    options = {"verdict": "--evaluation-data", "convert": "--samples"}
    args = [bundle.path, options.get(command, "--calibration-data"), pictures]
    args += ["--precision", "fp16"] if command == "convert" else []
    result = invoke(command, *args)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: bundle {bundle.path} is not writable")
