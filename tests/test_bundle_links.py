"""Bundles whose files are links, as in caches and copies, with external weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnx_ir")
import onnx_ir as ir

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.cli import main
from tap_deploy.engines.verdict.kernels import kernels_in_onnxruntime
from tap_deploy.errors import BundleError, InputError, SessionError
from tap_deploy.sessions.opening import create_session

OUTSIDE = "../weights.bin"


@pytest.fixture(scope="module")
def beside(micro_model, tmp_path_factory):
    """A bundle in fp32 and fp16 with all weights beside its graphs."""
    from tap_deploy.bundle.manifest import CheckpointRecord
    from tap_deploy.engines.fp16.convert import add_fp16
    from tap_deploy.export.bundle_export import export_bundle

    digests = {"sha256": "0" * 64, "md5": "0" * 32}
    record = CheckpointRecord(file="made", **digests, known_as=None, synthetic=True)
    path = tmp_path_factory.mktemp("beside") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tap_deploy.bundle.graph_files.EXTERNAL_DATA_BYTES", 0)
        bundle = export_bundle(micro_model, path, name="tap_micro", checkpoint=record).bundle
        add_fp16(bundle, threads=1)
    assert len(list(bundle.path.rglob("*.onnx.data"))) == 6
    return bundle


@pytest.fixture(autouse=True)
def small_graphs_keep_their_weights_beside_them(monkeypatch):
    monkeypatch.setattr("tap_deploy.bundle.graph_files.EXTERNAL_DATA_BYTES", 0)


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def hard_links(source, folder):
    """``cp -al``"""
    return shutil.copytree(source, folder / "bundle", copy_function=os.link)


def symlinks(source, folder):
    """``cp -as``, git-annex"""
    for file in files(source):
        link(folder / "bundle" / file.relative_to(source), file)
    return folder / "bundle"


def folder_link(source, folder):
    """The whole folder, and the folders in it."""
    for entry in source.iterdir():
        link(folder / "parts" / entry.name, entry)
    link(folder / "bundle", "parts")
    return folder / "bundle"


def hub_cache(source, folder):
    """Snapshots of files that lie, named by their digests, in one folder."""
    snapshot, blobs = folder / "snapshots" / "1", folder / "blobs"
    blobs.mkdir()
    for file in files(source):
        blob = shutil.copyfile(file, blobs / hashlib.sha256(file.read_bytes()).hexdigest())
        path = snapshot / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


def kubernetes_volume(source, folder):
    """Every file is a link through ``..data``, which points to the current folder."""
    bundle = folder / "bundle"
    shutil.copytree(source, bundle / "..2026_11_26")
    link(bundle / "..data", "..2026_11_26")
    for file in files(source):
        name = file.relative_to(source)
        up = pathlib.Path(*[".."] * (len(name.parts) - 1))
        link(bundle / name, up / "..data" / name)
    return bundle


def dvc_cache(source, folder):
    """Every file in a separate folder, named by the start of its digest."""
    for file in files(source):
        digest = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        blob = folder / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link(folder / "bundle" / file.relative_to(source), blob)
    return folder / "bundle"


LAYOUTS = [hard_links, symlinks, folder_link, hub_cache, kubernetes_volume, dvc_cache]


def invoke(command, bundle, *options):
    result = CliRunner().invoke(main, [command, str(bundle), *map(str, options)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_load(layout, beside, tmp_path, photo):
    linked = layout(beside.path, tmp_path)
    invoke("inspect", linked)
    regions = json.loads(invoke("run", linked, photo, "--point", "100,100", "--json"))
    assert len(regions["regions"]) == 1
    for graph in beside.variant("fp32").specs:
        loaded, expected = (
            bundle.variant("fp32").load(graph).graph.initializers.values()
            for bundle in (Bundle.open(linked), beside)
        )
        for value, same in zip(loaded, expected, strict=True):
            assert np.array_equal(value.const_value.numpy(), same.const_value.numpy())


@pytest.mark.parametrize("layout", [hard_links, dvc_cache])
def test_all_commands(layout, beside, tmp_path, pictures):
    """Links are replaced by files, and their targets stay unchanged."""
    linked = layout(beside.path, tmp_path)
    sources = files(beside.path) + files(tmp_path / ".dvc")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sources}
    invoke("plan", linked, "--device", "orin-nano")
    invoke("verify", linked, "--precision", "fp16")
    invoke("selftest", linked, "--threads", 1)
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        invoke("build", linked, "--backend", "tensorrt_rtx", "--compute-capability", "86")
    invoke("convert", linked, "--precision", "fp16", "--force", "--threads", 1)
    invoke(
        "quantize", linked, "--calibration-data", pictures, "--threads", 1, "--method", "max",
        "--smoothquant", "on", "--no-speed", "--min-calibration-pictures", 1,
        "--min-miou", 0, "--min-top1", 0, "--min-captions", 0,
    )  # fmt: skip
    assert set(Bundle.open(linked).manifest.graphs) == {"fp32", "fp16", "int8", "int8_fp32"}
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sources} == before


def test_nothing_is_written_into_a_folder_that_others_may_share(beside, tmp_path):
    linked = Bundle.open(folder_link(beside.path, tmp_path))
    before = [(path, path.stat().st_mtime_ns) for path in files(beside.path)]
    message = rf"its folder onnx/fp16 resolves by a link to {beside.path}/onnx/fp16"
    with pytest.raises(InputError, match=message), bundle_addition(linked) as addition:
        (addition.folder / "onnx" / "fp16").mkdir(parents=True)
        (addition.folder / "onnx" / "fp16" / "file").touch()
    with pytest.raises(InputError, match=message), bundle_addition(linked) as addition:
        addition.dropped = ("onnx/fp16/",)
    assert [(path, path.stat().st_mtime_ns) for path in files(beside.path)] == before
    Bundle.open(linked.path)


def test_kernels_are_counted_behind_links(beside, tmp_path):
    path = Bundle.open(dvc_cache(beside.path, tmp_path)).variant("fp32").path("text_decoder")
    assert kernels_in_onnxruntime(path).float_weights > 0


@pytest.mark.parametrize("location", [OUTSIDE, "other.data", "{folder}/weights.bin"])
def test_weights_that_no_manifest_vouches_for(beside, tmp_path, location):
    bundle = Bundle.open(shutil.copytree(beside.path, tmp_path / "bundle"))
    path = bundle.variant("fp32").path("text_decoder")
    location = location.format(folder=tmp_path)
    shutil.copyfile(f"{path}.data", path.parent / location)
    model = ir.load(path)
    for value in model.graph.initializers.values():
        found = value.const_value
        if isinstance(found, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                location,
                found.offset,
                found.length,
                found.dtype,
                shape=found.shape,
                name=found.name,
            )
    ir.save(model, path)
    message = rf"has data in '{location}'; expected only .* lists for it: text_decoder\.onnx\.data"
    with pytest.raises(BundleError, match=message):
        load_graph(path)
    if location != "other.data":  # of which onnxruntime has no reason to think ill
        with pytest.raises(SessionError, match="onnxruntime cannot load"):
            create_session("onnxruntime", path, bundle.variant("fp32").specs["text_decoder"])
