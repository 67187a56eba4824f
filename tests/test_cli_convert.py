"""fp16 on the command line: made by export or later, verified with fp16 rounding."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.json_record import record_to_json
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.export import samples
from tap_deploy.storage.files import sha256_of_file
from tests.commands import failed, invoke, refused

GOLDEN_NAMES = ["golden B=1 P=4 N=4", "golden B=1 P=3 N=1", "golden B=1 P=7 N=11"]


@pytest.fixture(scope="module")
def converted(micro_bundle, tmp_path_factory, photo):
    """A bundle, and what ``convert`` printed when it added fp16."""
    path = tmp_path_factory.mktemp("convert") / "bundle"
    shutil.copytree(micro_bundle.path, path)
    args = ("--precision", "fp16", "--samples", photo, "--threads", 1, "--json")
    result = invoke("convert", path, *args)
    assert result.exit_code == 0, result.output
    return path, json.loads(result.stdout)


def test_convert_prints_what_it_recorded(converted):
    path, printed = converted
    manifest = Bundle.open(path).manifest
    assert printed["precision"] == "fp16"
    assert printed["precisions"] == {"fp16": record_to_json(manifest.precisions["fp16"])}
    assert set(printed["graphs"]) == set(manifest.graphs["fp16"])
    names = [sample["name"] for sample in printed["precisions"]["fp16"]["samples"]]
    assert names == [*GOLDEN_NAMES, "coffee.jpg"]
    assert manifest.graphs["fp32"]


def test_convert_replaces_only_when_told_to(converted, tmp_path):
    path = shutil.copytree(converted[0], tmp_path / "bundle")
    before = sha256_of_file(path / "manifest.json")
    refused(invoke("convert", path, "--precision", "fp16"), "pass --force to replace them")
    assert sha256_of_file(path / "manifest.json") == before
    result = invoke("convert", path, "--precision", "fp16", "--force")
    assert result.exit_code == 0, result.output
    assert "image_encoder: 16 nodes stay fp32" in result.stdout
    assert "PASSED: 51 comparisons, 0 failed (onnxruntime, fp16)" in result.stdout
    record = Bundle.open(path).manifest.precisions["fp16"]
    assert [sample.name for sample in record.samples] == GOLDEN_NAMES


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert", "B", "--precision", "int8"), "tap-export quantize"),
        (("convert", "B", "--precision", "fp32"), "every bundle has fp32 already"),
        (("convert", "B"), "--precision"),
        (("convert", "B", "--precision", "fp16", "--samples", "gone"), "gone do not exist"),
        (("export", "--precision", "int8", "-o", "out"), "--calibration-data DIR"),
        (("verify", "B", "--precision", "fp16"), "has no precision 'fp16'"),
    ],
)
def test_what_cannot_be_done_is_said_first(micro_bundle, args, message):
    refused(invoke(*(micro_bundle.path if arg == "B" else arg for arg in args)), message)


def test_export_makes_both_precisions(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "GOLDEN_SIZES", samples.GOLDEN_SIZES[:1])
    inputs = ("--config", assets["config"], "--checkpoint", assets["checkpoint"])
    precisions = ("--precision", "fp32", "--precision", "fp16", "--precision", "fp16")
    result = invoke("export", *inputs, *precisions, "-o", tmp_path / "bundle", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed["graphs"]) == ["fp32", "fp16"]
    assert printed["precisions"]["fp16"]["verification"]["passed"] is True
    assert set(Bundle.open(tmp_path / "bundle").manifest.graphs) == {"fp32", "fp16"}


def test_verify_rounds_fp16_on_a_cpu(converted, monkeypatch):
    """By itself onnxruntime would compute in fp32; that needs no torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {}
    for precision in ("fp32", "fp16"):
        result = invoke("verify", converted[0], "--precision", precision, "--json")
        assert result.exit_code == 0, result.output
        found[precision] = json.loads(result.stdout)
    report = found["fp16"]
    assert (report["passed"], report["backend"]) == (True, "onnxruntime")
    assert report["precision"] == "fp16"
    with monkeypatch.context() as patch:
        patch.setattr("tap_deploy.engines.fp16.rounding.round_to_half", lambda model: None)
        hidden = json.loads(invoke("verify", converted[0], "--precision", "fp16", "--json").stdout)
    rows = zip(report["checks"], hidden["checks"], strict=True)
    larger = [row["mean_abs"] > other["mean_abs"] for row, other in rows if row["mean_abs"]]
    assert sum(larger) > len(larger) / 2


def test_without_onnx_ir_fp16_is_not_checked_on_a_cpu(converted, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    result = invoke("verify", converted[0], "--precision", "fp16")
    refused(result, 'a check of fp16 on a CPU needs it: pip install "tap-deploy[quantize]"')
    assert invoke("verify", converted[0]).exit_code == 0


def test_a_provider_is_refused_on_a_cpu_in_fp16_too(converted):
    result = invoke("verify", converted[0], "--precision", "fp16", "--provider", "cuda")
    refused(result, "provider needs backend 'onnxruntime' and device 'cuda'")


def test_verify_fails_with_1_on_another_graph(converted, tmp_path):
    """An error of 2 % in one layer is larger than rounding errors."""
    bundle = Bundle.open(shutil.copytree(converted[0], tmp_path / "bundle"))
    name = "prompt_decoder"
    with bundle_addition(bundle) as addition:
        for graph, record in bundle.manifest.graphs["fp16"].items():
            target = addition.folder / record.file
            target.parent.mkdir(parents=True, exist_ok=True)
            model = ir.load(bundle.path / record.file)
            if graph == name:
                value = model.graph.initializers["upscaler.up2.weight.T"]
                array = value.const_value.numpy() * np.float16(1.02)
                value.const_value = ir.tensor(array.astype(np.float16), name=value.name)
            ir.save(model, target)
        addition.graphs["fp16"] = bundle.manifest.graphs["fp16"]
    result = invoke("verify", bundle.path, "--precision", "fp16")
    failed(result, "first: prompt_decoder low_res_masks", code=1)
