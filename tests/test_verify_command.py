"""``tap-export verify``: tensors, masks, names and captions; what failed is refused afterwards."""

from __future__ import annotations

import json
import logging

import numpy as np
import onnx_ir as ir
import pytest

from tap_deploy import TapPredictor
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.errors import BundleError, InputError
from tap_deploy.machine.state import machine_title
from tap_deploy.masks import boundary_f
from tap_deploy.sessions import verified
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.verify.suite import SHORT, run_suite
from tap_deploy.verify.tolerances import FP32_TOLERANCES
from tests.commands import invoke, refused
from tests.pages import Page


def replace_graph(bundle, graph, change):
    """Change an fp32 graph, with valid hashes."""
    path = bundle.variant("fp32").path(graph)
    model = ir.load(path)
    change(model.graph)
    record = bundle.manifest.graphs["fp32"][graph]
    with bundle_addition(bundle) as addition:
        (addition.folder / record.file).parent.mkdir(parents=True)
        ir.save(model, addition.folder / record.file)
        addition.graphs["fp32"] = bundle.manifest.graphs["fp32"]
    return Bundle.open(bundle.path)


def tanh_gelu(graph):
    node = next(node for node in graph if node.op_type == "Gelu")
    node.attributes["approximate"] = ir.AttrString("approximate", "tanh")


def test_a_bundle_agrees_with_its_reference_at_every_level(bundle, photo, assets, tmp_path):
    page, checkpoint = tmp_path / "page.html", ("--checkpoint", assets["checkpoint"])
    result = invoke(
        "verify", bundle.path, "--images", photo, "--report", page, "--json", *checkpoint
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is True and found["sentence"].startswith("PASSED")
    assert found["masks"]["iou_mean"] > 0.999 and found["masks"]["passed"] is True
    assert found["names"]["top1"] == found["names"]["top5"] == 1
    assert found["captions"]["identical"] == found["captions"]["regions"] > 14
    assert {row["tensor"] for row in found["stages"]} >= {"image_embeddings", "logits"}
    assert any(check["sample"].startswith("coffee.jpg") for check in found["checks"])
    text = page.read_text("utf-8")
    assert "Verification: tap_micro" in text and "coffee.jpg" in text
    Page(text)


def test_what_failed_is_refused_until_it_passes(bundle):
    whole = bundle.variant("fp32").path("prompt_decoder").read_bytes()
    wrong = replace_graph(bundle, "prompt_decoder", tanh_gelu)
    result = invoke("verify", wrong.path)
    assert result.exit_code == 1
    assert "[✗] prompt_decoder  low_res_masks" in result.stdout
    assert "Error enters in prompt_decoder" in result.stdout
    assert "differs from the reference; do not use it" in result.stderr
    with pytest.raises(BundleError, match="fp32 failed its verification with onnxruntime"):
        TapPredictor.from_bundle(wrong.path)
    TapPredictor.from_bundle(wrong.path, allow_failed=True).close()
    wrong.variant("fp32").path("prompt_decoder").write_bytes(whole)
    right = replace_graph(Bundle.open(wrong.path, check_hashes=False), "prompt_decoder", list)
    assert invoke("verify", right.path).exit_code == 0
    TapPredictor.from_bundle(right.path).close()


def test_the_first_layer_out_of_tolerance_is_named(bundle, assets):
    wrong = replace_graph(bundle, "prompt_decoder", tanh_gelu)
    model = ir.load(wrong.variant("fp32").path("prompt_decoder"))
    node = next(node for node in model.graph if node.op_type == "Gelu")
    checkpoint = ("--checkpoint", assets["checkpoint"])
    result = invoke("verify", wrong.path, "--bisect", "--json", *checkpoint)
    assert result.exit_code == 1
    found = json.loads(result.stdout)["bisect"]
    assert (found["graph"], found["node"]) == ("prompt_decoder", node.name)


def test_a_bundle_of_another_machine_is_announced_once_or_refused(
    bundle, photo, monkeypatch, caplog
):
    monkeypatch.setattr(verified, "_warned", set())
    TapPredictor.from_bundle(bundle.path, require_verified=True).close()  # exported here
    monkeypatch.setattr(verified, "machine_title", lambda *, on_cpu: "another machine")
    with caplog.at_level(logging.WARNING, "tap_deploy"):
        for _ in range(2):
            TapPredictor.from_bundle(bundle.path).close()
    (message,) = caplog.messages
    assert "fp32 of bundle" in message and "never verified on this machine" in message
    assert message.endswith(f"tap-export selftest {bundle.path}")
    with pytest.raises(BundleError, match="never verified on this machine"):
        TapPredictor.from_bundle(bundle.path, require_verified=True)
    refused(
        invoke("run", bundle.path, photo, "--point", "1,1", "--require-verified"),
        "never verified on this machine",
    )
    monkeypatch.setattr(
        "tap_deploy.cli.selftest.machine_title", lambda *, on_cpu: "another machine"
    )
    assert invoke("verify", bundle.path).exit_code == 0
    TapPredictor.from_bundle(bundle.path, require_verified=True).close()
    with pytest.raises(InputError, match="exclude each other"):
        RunOn(allow_failed=True, require_verified=True)


def test_a_result_with_other_tolerances_is_not_kept(bundle):
    assert invoke("verify", bundle.path, "--rtol", "logits:1").exit_code == 0
    strict = invoke("verify", bundle.path, "--atol", "low_res_masks:1e-12")
    assert strict.exit_code == 1 and "tolerance 1e-12" in strict.stdout
    assert Bundle.open(bundle.path).manifest.precision_record("fp32").verified is None
    assert invoke("verify", bundle.path).exit_code == 0
    marks = Bundle.open(bundle.path).manifest.precision_record("fp32").verified["onnxruntime"]
    assert marks[machine_title(on_cpu=True)].passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--atol", "masks:1"), "expected NAME:VALUE with one of the outputs image_embeddings"),
        (("--rtol", "logits:much"), "'much' is no tolerance; expected a number from 0"),
        (("--rtol", "logits:nan"), "is no tolerance"),
        (("--rtol", "logits:-1"), "is no tolerance"),
        (("--rtol", "logits:1", "--atol", "logits:1"), "logits already has a tolerance"),
        (("--against", "bundle", "--checkpoint", "x"), "needs no --checkpoint"),
        (("--against", "reference"), "needs the weights of tap_micro; pass --checkpoint"),
        (("--prompts", "x.json"), "pass both"),
        (("--images", "x"), "are the reference for --images themselves; pass --checkpoint"),
        (("--bisect",), "--bisect of fp32 graphs needs PyTorch"),
        (("--bisect", "--backend", "tensorrt"), "--bisect runs graphs in onnxruntime on the CPU"),
    ],
)
def test_options_that_do_not_fit(bundle, options, message):
    refused(invoke("verify", bundle.path, *options), message)


def test_the_suite_passes(bundle, assets):
    checkpoint = ("--checkpoint", assets["checkpoint"])
    result = invoke("verify", bundle.path, "--suite", "short", *checkpoint)
    assert result.exit_code == 0, result.output
    for name in ("P=16 N=11", "3 x 200 pixels", "drawn twice", "again after others", "N=9"):
        assert name in result.stdout


def test_the_suite_finds_what_only_one_size_gets_wrong(micro_bundle):
    sessions = sessions_from_bundle(micro_bundle, RunOn(threads=1))

    def decode(inputs):
        outputs = sessions["prompt_decoder"].run(inputs)
        if len(inputs["point_labels"]) == 16:
            outputs["semantic_tokens"] = outputs["semantic_tokens"] + np.float32(0.01)
        return outputs

    wrong = FakeSession(sessions["prompt_decoder"].spec, decode)
    report = run_suite(
        sessions | {"prompt_decoder": wrong},
        micro_bundle.config,
        micro_bundle.golden(),
        sizes=SHORT,
        backend="onnxruntime",
        precision="fp32",
        tolerances=FP32_TOLERANCES,
    )
    failed = {(check.tensor, check.sample) for check in report.checks if not check.passed}
    assert failed == {("semantic_tokens", f"P=16 N={points}") for points in (1, 4, 11)}


def test_boundaries_of_masks():
    one, other = np.zeros((2, 40, 40), np.bool_)
    assert boundary_f(one, other, 2) == 1
    one[10:30, 10:30] = True
    assert boundary_f(one, other, 2) == 0
    other[10:30, 12:32] = True
    assert boundary_f(one, other, 2) == 1
    assert 0 < boundary_f(one, np.roll(other, 6, axis=1), 2) < 1
    assert boundary_f(one, np.roll(one, 1, axis=0), 0) < boundary_f(one, np.roll(one, 1, 0), 1) == 1
