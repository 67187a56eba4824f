"""A bundle takes further precisions, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import pytest

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.marks import mark_variant
from tap_deploy.bundle.precision_record import PrecisionRecord, SelftestMark
from tap_deploy.bundle.update import bundle_addition, revise_precision
from tap_deploy.errors import BundleError, InputError
from tap_deploy.precisions import variant_for
from tap_deploy.storage.files import atomic_folder, sha256_of, sha256_of_file


def add_fp16(bundle, content=b"weights"):
    with bundle_addition(bundle) as addition:
        records = {}
        for name, record in bundle.manifest.graphs["fp32"].items():
            file = addition.folder / "onnx" / "fp16" / f"{name}.onnx"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            records[name] = dataclasses.replace(record, file=f"onnx/fp16/{name}.onnx")
        addition.graphs["fp16"] = records
        addition.precisions["fp16"] = PrecisionRecord(made_from="fp32")


def test_an_addition_is_part_of_the_bundle(bundle):
    add_fp16(bundle)
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    assert (again.path / "onnx/fp16/image_encoder.onnx").read_bytes() == b"weights"
    assert again.manifest.precisions == {"fp16": PrecisionRecord(made_from="fp32")}
    assert not list(bundle.path.glob(".*partial-*"))


def test_an_addition_can_be_replaced(bundle):
    add_fp16(bundle)
    add_fp16(bundle, b"better")
    assert (Bundle.open(bundle.path).path / "onnx/fp16/text_decoder.onnx").read_bytes() == b"better"


def test_a_failed_addition_changes_nothing(bundle):
    before = bundle.manifest
    with pytest.raises(RuntimeError), bundle_addition(bundle) as addition:
        (addition.folder / "file").write_bytes(b"half")
        raise RuntimeError
    assert Bundle.open(bundle.path).manifest == before
    assert not list(bundle.path.glob(".*partial-*"))


@pytest.mark.parametrize("calls", range(12))
@pytest.mark.parametrize("function", ["os.rename", "os.replace", "os.fsync"])
def test_an_interrupted_replacement_is_undone(bundle, monkeypatch, function, calls):
    """The call that fails is any of those that a replacement makes."""
    add_fp16(bundle)
    before, manifest = digests(bundle.path), bundle.manifest
    with monkeypatch.context() as patched:
        fails_after(patched, function, calls)
        try:
            add_fp16(bundle, b"better")
        except InputError as exc:
            assert "No space left on device" in str(exc)
            assert digests(bundle.path) == before
            assert Bundle.open(bundle.path).manifest == bundle.manifest == manifest
        else:
            # "fsync" is called for each file and folder, and twice for each manifest.
            assert calls >= {"os.rename": 6, "os.replace": 2, "os.fsync": 12}[function]
    add_fp16(bundle, b"better")
    assert (Bundle.open(bundle.path).path / "onnx/fp16/text_decoder.onnx").read_bytes() == b"better"


@pytest.mark.parametrize("calls", range(8))
@pytest.mark.parametrize("function", ["os.rename", "os.replace"])
def test_a_signal_right_after_a_move_undoes_it_too(bundle, monkeypatch, function, calls):
    add_fp16(bundle)
    before, manifest = digests(bundle.path), bundle.manifest
    with monkeypatch.context() as patched:
        made = interrupted_after(patched, function, calls)
        try:
            add_fp16(bundle, b"better")
        except KeyboardInterrupt:
            assert digests(bundle.path) == before
            assert Bundle.open(bundle.path).manifest == bundle.manifest == manifest
        else:
            assert len(made) == {"os.rename": 6, "os.replace": 2}[function]
    assert not list(bundle.path.glob(".*partial-*"))


def interrupted_after(patched, function, calls):
    """One call of a function of the system is made, and then a signal arrives."""
    name, made = function.removeprefix("os."), []
    real = getattr(os, name)

    def counted(*args):
        real(*args)
        made.append(args)
        if len(made) == calls + 1:
            raise KeyboardInterrupt

    patched.setattr(function, counted)
    return made


def digests(folder):
    return {
        path.relative_to(folder): sha256_of_file(path) if path.is_file() else None
        for path in folder.rglob("*")
    }


def fails_after(patched, function, calls):
    """One call of a function of the system fails, as on a full disk."""
    name = function.removeprefix("os.")
    real, count = getattr(os, name), 0

    def counted(*args):
        nonlocal count
        count += 1
        if count == calls + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    patched.setattr(function, counted)


def test_records_of_a_precision_are_merged(bundle):
    add_fp16(bundle)
    revise_precision(bundle, "fp16", lambda record: dataclasses.replace(record, score_limit=7.0))
    expected = {"fp16": PrecisionRecord(made_from="fp32", score_limit=7.0)}
    assert Bundle.open(bundle.path).manifest.precisions == expected


def add_variant(bundle, variant, content=b"weights", based_on=()):
    """Add graphs that are no more than some bytes."""
    with bundle_addition(bundle, based_on=based_on) as addition:
        addition.graphs[variant] = {}
        for name, record in bundle.manifest.graphs["fp32"].items():
            file = f"onnx/{variant}/{name}.onnx"
            (addition.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (addition.folder / file).write_bytes(content)
            addition.graphs[variant][name] = dataclasses.replace(record, file=file)


@pytest.fixture
def other(bundle):
    """The same bundle as another command has it."""
    return Bundle.open(bundle.path)


def test_what_others_add_meanwhile_stays(bundle, other):
    mark = SelftestMark(passed=False, error=None)
    with bundle_addition(bundle, based_on=("fp32",)) as addition:
        (addition.folder / "reports").mkdir()
        (addition.folder / "reports" / "mine").touch()
        add_variant(other, "fp16")
        mark_variant(other, "fp32", "onnxruntime", mark)
    revise_precision(bundle, "fp32", lambda record: dataclasses.replace(record, made_from="me"))
    opened = Bundle.open(bundle.path)
    assert set(opened.manifest.graphs) == {"fp32", "fp16"}
    assert "reports/mine" in opened.manifest.files
    record = PrecisionRecord(made_from="me", selftest={"onnxruntime": {"": mark}})
    assert opened.manifest.precisions["fp32"] == record
    assert bundle.manifest == opened.manifest


@pytest.mark.parametrize("changed", ["fp32", "fp16"])
def test_what_was_made_of_other_graphs_is_not_added(bundle, other, changed):
    """The source was replaced, or the variant was added by another process meanwhile."""
    add_variant(other, changed, b"by another command")
    after = Bundle.open(bundle.path).manifest
    message = rf"another command changed its {changed} graphs meanwhile; nothing was written"
    with pytest.raises(BundleError, match=message):
        add_variant(bundle, "fp16", based_on=("fp32",))
    with pytest.raises(BundleError, match=message):
        mark_variant(bundle, changed, "onnxruntime", SelftestMark(passed=True, error=None))
    assert Bundle.open(bundle.path).manifest == after
    assert sorted(os.listdir(bundle.path)) == sorted(os.listdir(other.path))


def test_what_was_made_of_a_bundle_that_is_gone_does_not_come_back(bundle, micro_bundle):
    """``export --force`` replaces the folder while a variant is being added."""
    message = "another command replaced it meanwhile"
    with pytest.raises(BundleError, match=message), bundle_addition(bundle) as addition:
        (addition.folder / "reports").mkdir()
        (addition.folder / "reports" / "mine").touch()
        with atomic_folder(bundle.path, force=True, marker="manifest.json") as folder:
            shutil.copytree(micro_bundle.path, folder, dirs_exist_ok=True)
    with pytest.raises(BundleError, match=message), bundle_addition(bundle) as addition:
        records = bundle.manifest.graphs["fp32"]
        addition.graphs["fp16"] = {
            name: dataclasses.replace(record, file=f"onnx/fp16/{name}.onnx")
            for name, record in records.items()
        }
    assert Bundle.open(bundle.path).manifest == micro_bundle.manifest
    assert sorted(os.listdir(bundle.path)) == sorted(os.listdir(micro_bundle.path))


def test_a_reader_that_is_overtaken_reads_again(bundle, other, monkeypatch):
    add_variant(other, "fp16", b"old")
    digest, calls = sha256_of, []

    def overtaken(file):
        calls.append(file)
        if len(calls) == 1:  # the manifest was read, the files were not
            add_variant(other, "fp16", b"new")
        return digest(file)

    monkeypatch.setattr("tap_deploy.bundle.bundle.sha256_of", overtaken)
    monkeypatch.setattr("tap_deploy.bundle.bundle.usable_cores", lambda: 1)  # one file at a time
    opened = Bundle.open(bundle.path)
    assert opened.manifest == other.manifest
    assert (opened.path / "onnx/fp16/image_encoder.onnx").read_bytes() == b"new"


def test_files_that_nothing_needs_any_more_go(bundle):
    add_variant(bundle, "int8")
    with bundle_addition(bundle) as addition:
        records = bundle.manifest.graphs
        addition.graphs["int8"] = {
            **records["fp32"],
            "text_decoder": records["int8"]["text_decoder"],
        }
    Bundle.open(bundle.path)
    assert os.listdir(bundle.path / "onnx" / "int8") == ["text_decoder.onnx"]


def test_int8_on_a_cpu_lies_over_fp32():
    assert variant_for("int8", on_cpu=True) == "int8_fp32"
    assert variant_for("int8", on_cpu=False) == "int8"
    assert variant_for("fp16", on_cpu=True) == "fp16"
    with pytest.raises(InputError, match="unknown precision 'fp8'"):
        variant_for("fp8", on_cpu=True)
