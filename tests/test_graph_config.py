"""Each graph holds the sizes of its model, and the manifest must agree with them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

import onnxruntime

from tap_deploy import TapPredictor, graphs
from tap_deploy.bundle.bundle import Bundle, file_records
from tap_deploy.bundle.graph_config import CONFIG_KEY, require_config
from tap_deploy.bundle.graph_references import require_listed_data
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.bundle.plans import load_plan, save_plan
from tap_deploy.errors import BundleError
from tests.commands import invoke

# All but the last of them change no input or output of a graph.
OTHER_SIZES = {
    "text_seq_len": 8,
    "encoder_depth": 8,
    "encoder_heads": 2,
    "window_size": 8,
    "patch_size": 32,
    "prompt_decoder_depth": 1,
    "text_depth": 1,
}


def with_config(bundle, **sizes):
    """The bundle with other sizes in its manifest, as an editor leaves it."""
    path = bundle.path / MANIFEST_NAME
    values = json.loads(path.read_text("utf-8"))
    values["config"] |= sizes
    path.write_text(json.dumps(values), "utf-8")
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_another_size_in_the_manifest_is_refused(bundle, micro_config, name):
    was, size = getattr(micro_config, name), OTHER_SIZES[name]
    other = with_config(bundle, **{name: size})
    match = f"image_encoder.onnx is of a model with {name} {was}, not {size} as in the manifest"
    with pytest.raises(BundleError, match=match):
        other.variant("fp32")
    with pytest.raises(BundleError, match=match):
        TapPredictor.from_bundle(bundle.path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("command", ["verify", "selftest", "run"])
def test_every_command_refuses_it(bundle, photo, command, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    with_config(bundle, encoder_depth=8)
    words = [photo, "--point", "1,1"] if command == "run" else []
    result = invoke(command, bundle.path, *words, "--backend", backend)
    assert result.exit_code == 2
    assert "encoder_depth 4, not 8 as in the manifest" in result.stderr.splitlines()[-1]


def test_a_graph_without_sizes_is_refused(bundle):
    file = bundle.manifest.graphs["fp32"][graphs.TEXT_DECODER].file
    model = bundle.variant("fp32").load(graphs.TEXT_DECODER)
    del model.metadata_props[CONFIG_KEY]
    ir.save(model, bundle.path / file)
    files = bundle.manifest.files | {file: file_records(bundle.path)[file]}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    with pytest.raises(BundleError, match=r"does not hold the sizes of its model; .* export the"):
        TapPredictor.from_bundle(bundle.path)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x72\xff\xff\xff\xff\x0f"])
def test_a_file_that_is_no_graph_is_refused(tmp_path, micro_config, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot be read: .*; export the bundle again"):
        require_config(path, micro_config)


def test_a_graph_of_too_many_fields_is_refused(tmp_path, micro_config, monkeypatch):
    """Else a file of nothing but small fields takes minutes."""
    monkeypatch.setattr("tap_deploy.storage.protobuf.MAX_FIELDS", 1000)
    path, version = tmp_path / "a.onnx", b"\x08\x07"  # ModelProto.ir_version
    path.write_bytes(version * 1001)
    for check, listed in ((require_config, micro_config), (require_listed_data, ())):
        with pytest.raises(BundleError, match="more than 1000 fields"):
            check(path, listed)
    path.write_bytes(version * 1000)
    require_listed_data(path, ())


@pytest.mark.parametrize("text", ["[]", "{", "7", '{"text_seq_len": 40}', "[" * 100_000])
def test_other_metadata_is_refused(tmp_path, micro_bundle, micro_config, text):
    model = micro_bundle.variant("fp32").load(graphs.TEXT_DECODER)
    model.metadata_props[CONFIG_KEY] = text
    ir.save(model, tmp_path / "a.onnx")
    with pytest.raises(BundleError, match="export the bundle again"):
        require_config(tmp_path / "a.onnx", micro_config)


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_converted_graphs_keep_it(fp16_bundle, micro_config, variant):
    for name in graphs.GRAPH_NAMES:
        path = fp16_bundle.variant(variant).path(name)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map[CONFIG_KEY]
        assert json.loads(text) == micro_config.to_dict()


def test_quantized_graphs_keep_it(micro_bundle, micro_config, ranges):
    from tap_deploy.engines.qdq.chosen_nodes import default_selection
    from tap_deploy.engines.qdq.graph import qdq_from_ranges

    fp32, name = micro_bundle.variant("fp32"), graphs.IMAGE_ENCODER
    chosen = default_selection(fp32)[name]
    model = qdq_from_ranges(
        fp32.load(name),
        ranges[name],
        chosen,
        float_dtype=np.dtype("float32").name,
        for_cpu=True,
        reduce_range=False,
    )
    assert json.loads(model.metadata_props[CONFIG_KEY]) == micro_config.to_dict()


def test_an_engine_of_other_sizes_is_refused(bundle):
    target = {"backend": "tensorrt", "backend_version": "10.3.0", "variant": "fp32"}
    graph = graphs.TEXT_DECODER
    record = PlanRecord(
        **target,
        graph=graph,
        compute_capabilities=("8.7",),
        minimum_compute_capability=None,
        version_compatible=False,
        gpu=None,
        driver=None,
        onnx_sha256=bundle.variant("fp32").digests(graph)[0],
        onnx_data_sha256=None,
        plan_sha256="0" * 64,
        size_bytes=4,
        profiles={},
        flags={},
        options=(),
        build_seconds=1.0,
        layer_precisions=None,
    )
    save_plan(bundle, b"plan", record)
    other = with_config(bundle, text_seq_len=8)
    with pytest.raises(BundleError, match="text_seq_len 40, not 8 as in the manifest"):
        load_plan(other, **target, compute_capability="8.7", graph=graph)
