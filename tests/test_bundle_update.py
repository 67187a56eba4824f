"""A bundle takes further precisions, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest

from tap_deploy.bundle import Bundle
from tap_deploy.bundle_update import bundle_addition, record_precision
from tap_deploy.errors import BundleError, InputError
from tap_deploy.precisions import variant_for


@pytest.fixture
def bundle(micro_bundle, tmp_path):
    shutil.copytree(micro_bundle.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def add_fp16(bundle, content=b"weights"):
    with bundle_addition(bundle) as addition:
        records = {}
        for name, record in bundle.manifest.graphs["fp32"].items():
            file = addition.folder / "onnx" / "fp16" / f"{name}.onnx"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            records[name] = dataclasses.replace(record, file=f"onnx/fp16/{name}.onnx")
        addition.graphs["fp16"] = records
        addition.precisions["fp16"] = {"islands": [1, 2]}


def test_an_addition_is_part_of_the_bundle(bundle):
    add_fp16(bundle)
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    assert again.graph_path("image_encoder", "fp16").read_bytes() == b"weights"
    assert again.manifest.precisions == {"fp16": {"islands": [1, 2]}}
    assert not list(bundle.path.glob(".partial-*"))


def test_an_addition_can_be_replaced(bundle):
    add_fp16(bundle)
    add_fp16(bundle, b"better")
    assert Bundle.open(bundle.path).graph_path("text_decoder", "fp16").read_bytes() == b"better"


def test_a_failed_addition_changes_nothing(bundle):
    before = bundle.manifest
    with pytest.raises(RuntimeError), bundle_addition(bundle) as addition:
        (addition.folder / "file").write_bytes(b"half")
        raise RuntimeError
    assert Bundle.open(bundle.path).manifest == before
    assert not list(bundle.path.glob(".partial-*"))


def test_an_interrupted_replacement_is_not_vouched_for(bundle, monkeypatch):
    add_fp16(bundle)
    monkeypatch.setattr("os.replace", interrupted_after(2))
    with pytest.raises(KeyboardInterrupt):
        add_fp16(bundle, b"better")
    opened = Bundle.open(bundle.path)  # what is left is whole
    with pytest.raises(BundleError, match="no precision 'fp16'"):
        opened.graph_path("image_encoder", "fp16")


def interrupted_after(calls):
    replace, count = os.replace, 0

    def counted(source, target):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        replace(source, target)

    return counted


def test_records_of_a_precision_are_merged(bundle):
    add_fp16(bundle)
    record_precision(bundle, "fp16", {"verdict": "use it"})
    expected = {"fp16": {"islands": [1, 2], "verdict": "use it"}}
    assert Bundle.open(bundle.path).manifest.precisions == expected


def test_int8_on_a_cpu_lies_over_fp32():
    assert variant_for("int8", on_cpu=True) == "int8_fp32"
    assert variant_for("int8", on_cpu=False) == "int8"
    assert variant_for("fp16", on_cpu=True) == "fp16"
    with pytest.raises(InputError, match="unknown precision 'fp8'"):
        variant_for("fp8", on_cpu=True)
