"""Typed fp16 graphs: one dtype per node, fp32 islands where needed, close to fp32."""

from __future__ import annotations

import collections
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir

from tap_deploy import TapPredictor, graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.engines.calibration.maxima import RangeSession
from tap_deploy.engines.fp16.convert import add_fp16, measure
from tap_deploy.engines.fp16.islands import OVERFLOW_LIMIT, Reason, choose_islands, weight_report
from tap_deploy.engines.fp16.rounding import load_rounding
from tap_deploy.engines.fp16.samples import (
    find_samples,
    golden_inputs,
    picture_inputs,
    read_samples,
    run_sample,
)
from tap_deploy.engines.fp16.typed import half_from_single
from tap_deploy.errors import InputError, VerificationError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.sessions.opening import sessions_from_variant

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

GOLDEN_NAMES = ["golden B=1 P=4 N=4", "golden B=1 P=3 N=1", "golden B=1 P=7 N=11"]


def islands_of(bundle, graph):
    return bundle.manifest.precisions["fp16"].fp16_graphs[graph].islands


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_every_node_has_one_float_dtype(fp16_bundle, name):
    """No weak typing: only Casts change a dtype, and only islands compute in fp32."""
    path = fp16_bundle.variant("fp16").path(name)
    model = ir.load(path)
    fp32 = {island.node for island in islands_of(fp16_bundle, name)}
    assert model.opset_imports[""] == 20
    assert model.ir_version == 10
    seen = collections.Counter()
    for node in model.graph:
        dtypes = {v.dtype for v in node.inputs if v is not None and v.dtype in FLOATS}
        if node.op_type == "Cast":
            continue
        dtypes |= {v.dtype for v in node.outputs if v.dtype in FLOATS}
        assert len(dtypes) <= 1, node.name
        if dtypes:
            expected = ir.DataType.FLOAT if node.name in fp32 else ir.DataType.FLOAT16
            assert dtypes == {expected}, node.name
            seen[node.name in fp32] += 1
    assert seen[True] and seen[False] > seen[True]


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_weights_are_fp16_outside_of_islands(fp16_bundle, name):
    model = ir.load(fp16_bundle.variant("fp16").path(name))
    fp32 = {island.node for island in islands_of(fp16_bundle, name)}
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            assert all(node.name in fp32 for node in value.consumers()), value.name
    sizes = [fp16_bundle.manifest.graphs[v][name].weights_bytes for v in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_casts_stand_only_where_the_dtype_changes(fp16_bundle):
    for name in graphs.GRAPH_NAMES:
        for node in ir.load(fp16_bundle.variant("fp16").path(name)).graph:
            if node.op_type == "Cast":
                assert node.inputs[0].dtype != node.outputs[0].dtype, node.name
                twins = [u for u in node.inputs[0].consumers() if u.op_type == "Cast"]
                targets = [twin.attributes["to"].value for twin in twins]
                assert len(targets) == len(set(targets)), node.name


def test_inputs_and_outputs_are_as_the_spec_says(fp16_bundle):
    for name, spec in fp16_bundle.variant("fp16").specs.items():
        model = ir.load(fp16_bundle.variant("fp16").path(name))
        for values, tensors in (
            (model.graph.inputs, spec.inputs),
            (model.graph.outputs, spec.outputs),
        ):
            found = {value.name: value.dtype.numpy().name for value in values}
            assert found == {tensor.name: tensor.dtype for tensor in tensors}


def test_islands_are_recorded(fp16_bundle):
    record = Bundle.open(fp16_bundle.path).manifest.precisions["fp16"]
    assert record.verification.passed
    assert record.verification.backend == "onnxruntime"
    assert [sample.name for sample in record.samples] == [*GOLDEN_NAMES, "coffee.jpg"]
    reasons = {
        name: {island.reason for island in islands_of(fp16_bundle, name)}
        for name in graphs.GRAPH_NAMES
    }
    always = {Reason.LAYER_NORM.value, Reason.SOFTMAX.value}
    assert reasons == {
        "image_encoder": always | {Reason.PIXELS.value},
        "prompt_decoder": always | {Reason.FOURIER.value},
        "text_decoder": always | {Reason.MASK.value},
    }
    for name in graphs.GRAPH_NAMES:
        nodes = {node.name: node for node in ir.load(fp16_bundle.variant("fp32").path(name)).graph}
        for island in islands_of(fp16_bundle, name):
            assert nodes[island.node].op_type == island.op_type
            assert island.max_abs > 0
        details = record.fp16_graphs[name]
        assert 0 < details.largest_fp16_activation.max_abs < OVERFLOW_LIMIT
        # the number that masks
        assert len(details.weights.overflowing) == (name == graphs.TEXT_DECODER)


def test_layer_norm_and_softmax_are_one_operator_in_fp32(fp16_bundle):
    for name in graphs.GRAPH_NAMES:
        graph = ir.load(fp16_bundle.variant("fp16").path(name)).graph
        kinds = {n.op_type: n.inputs[0].dtype for n in graph}
        assert kinds["LayerNormalization"] == kinds["Softmax"] == ir.DataType.FLOAT
        assert kinds["MatMul"] == ir.DataType.FLOAT16 or name == "prompt_decoder"


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_tensorrt_rtx_builds_it_strongly_typed(fp16_bundle, rtx_plan, name):
    spec = fp16_bundle.variant("fp16").specs[name]
    engine = rtx_plan(fp16_bundle.variant("fp16").path(name), spec)
    assert len(engine) > 0.9 * fp16_bundle.manifest.graphs["fp16"][name].weights_bytes


def test_predictor_runs_it_on_onnxruntime(fp16_bundle, photo):
    """Inputs and outputs of the predictor are float32, regardless of the graphs' dtype."""
    prompt = {"points": [[[285, 160, 1]]], "boxes": [[172, 17, 412, 308]]}
    with TapPredictor.from_bundle(fp16_bundle.path, precision="fp16") as half:
        encoded = half.encode(photo)
        actual = half.predict(encoded, **prompt)
    with TapPredictor.from_bundle(fp16_bundle.path) as single:
        expected = single.predict(photo, **prompt)
    assert encoded.image_embeddings.dtype == np.float32
    for field in ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings"):
        a, e = getattr(actual, field), getattr(expected, field)
        assert a.dtype == np.float32
        assert 0 < np.abs(a - e).max() < 1e-2 * np.abs(e).max()
    np.testing.assert_array_equal(actual.mask_index, expected.mask_index)


def test_ranges_are_those_of_the_tensors(micro_bundle):
    """Measured maxima equal those of a plain run of the graph."""
    name, sample = graphs.IMAGE_ENCODER, golden_inputs(micro_bundle)[0]
    session = RangeSession(micro_bundle.variant("fp32"), name)
    outputs = session.run({graphs.IMAGES: sample.images})
    largest = float(np.abs(outputs[graphs.IMAGE_EMBEDDINGS]).max())
    assert session.max_abs[graphs.IMAGE_EMBEDDINGS] == pytest.approx(largest)
    model = ir.load(micro_bundle.variant("fp32").path(name))
    floats = {v.name for n in model.graph for v in n.outputs if v.dtype == ir.DataType.FLOAT}
    assert set(session.max_abs) == floats
    before = dict(session.max_abs)
    session.run({graphs.IMAGES: np.zeros_like(sample.images)})
    assert all(session.max_abs[tensor] >= before[tensor] for tensor in floats)


def test_outputs_that_fp16_cannot_hold_are_refused(micro_bundle, monkeypatch, tmp_path):
    shutil.copytree(micro_bundle.path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    before = bundle.manifest
    monkeypatch.setattr(
        "tap_deploy.engines.fp16.convert.measure",
        lambda *_, **__: {n: {"logits": 4e4} for n in graphs.GRAPH_NAMES},
    )
    with pytest.raises(VerificationError, match=r"output logits reaches 4e\+04.*use fp32"):
        add_fp16(bundle)
    assert Bundle.open(bundle.path).manifest == before


def test_fp32_that_is_not_finite_is_no_range(micro_bundle, tmp_path):
    name, fp32 = graphs.TEXT_DECODER, micro_bundle.variant("fp32")
    model = fp32.load(name)
    value = model.graph.initializers["norm.weight"]
    value.const_value = ir.tensor(np.full(value.shape, np.inf, np.float32), name=value.name)
    record = save_graph(model, fp32.specs[name], tmp_path, "inf.onnx")
    sessions = sessions_from_variant(fp32)
    sessions[name] = RangeSession(fp32.with_graphs(tmp_path, {name: record}), name)
    with pytest.raises(VerificationError, match="output logits of the fp32 graph is not finite"):
        run_sample(sessions, micro_bundle.config, golden_inputs(micro_bundle)[0])


def test_pictures_are_found_and_prompted(photo, tmp_path, micro_config):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        shutil.copy(photo, tmp_path / name)
    found = find_samples([tmp_path, photo])
    assert [[p.name for p in files] for files in found] == [["a.jpg", "b.PNG"], [photo.name]]
    with pytest.raises(InputError, match="do not exist"):
        find_samples([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no pictures"):
        find_samples([tmp_path / "empty"])
    sample = picture_inputs(photo, micro_config, 0)
    assert sample.images.shape == (1, 512, 512, 3)
    assert {2, 3} <= set(sample.point_labels.flatten().tolist())
    assert sample.point_coords.max() <= 512


def test_a_broken_sample_of_a_folder_is_skipped(photo, tmp_path, micro_config, caplog):
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(photo, tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"")
    found = read_samples([tmp_path, photo], micro_config)
    assert [sample.name for sample in found] == ["a.jpg", "c.jpg", photo.name]
    assert "b.jpg" in caplog.text
    for paths, strict in [([tmp_path], True), ([tmp_path / "b.jpg", photo], False)]:
        with pytest.raises(InputError, match=r"b\.jpg"):
            read_samples(paths, micro_config, strict=strict)


# A small graph of our own, to see each rule work.

SPEC32 = GraphSpec(
    "small",
    inputs=(TensorSpec("x", "float32", ("P", 4)),),
    outputs=(TensorSpec("y", "float32", ("P", 4)), TensorSpec("z", "float32", ("P", 4))),
)
SPEC16 = GraphSpec(
    "small",
    inputs=(TensorSpec("x", "float16", ("P", 4)),),
    outputs=(TensorSpec("y", "float16", ("P", 4)), TensorSpec("z", "float32", ("P", 4))),
)


def small_model(weights):
    """y = relu(x @ a) @ b, z = relu(x @ a) + c."""
    names = dict.fromkeys("abc")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["P", 4]))
    for name in names:
        names[name] = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([4, 4]),
            const_value=ir.tensor(weights[name], name=name),
        )
    nodes = [ir.node("MatMul", [x, names["a"]], name="first")]
    nodes.append(ir.node("Relu", nodes[0].outputs, name="relu"))
    nodes.append(ir.node("MatMul", [nodes[1].outputs[0], names["b"]], name="second"))
    nodes.append(ir.node("Gemm", [nodes[1].outputs[0], names["c"]], name="third"))
    for node, name in zip(nodes, ("product", "positive", "y", "z"), strict=True):
        node.outputs[0].name = name
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["P", 4])
    graph = ir.Graph(
        [x],
        [nodes[2].outputs[0], nodes[3].outputs[0]],
        nodes=nodes,
        initializers=list(names.values()),
        opset_imports={"": 20},
        name="small",
    )
    return ir.Model(graph, ir_version=10)


def small_weights(**scales):
    rng = np.random.default_rng(0)
    return {
        name: (scales.get(name, 1.0) * rng.standard_normal((4, 4))).astype(np.float32)
        for name in "abc"
    }


SMALL = {"x": 1.0, "product": 2.0, "positive": 2.0, "y": 3.0, "z": 3.0}


def reasons_of(model, max_abs):
    return {name: island.reason for name, island in choose_islands(model, max_abs).items()}


def test_a_graph_in_range_has_no_islands():
    assert reasons_of(small_model(small_weights()), SMALL) == {}


def test_what_touches_a_large_value_is_an_island():
    """Producer and consumers alike: the value is never stored in fp16."""
    reasons = reasons_of(small_model(small_weights()), SMALL | {"product": 33000.0})
    assert reasons == {"first": Reason.OVERFLOW, "relu": Reason.OVERFLOW}
    assert reasons_of(small_model(small_weights()), SMALL | {"product": 32000.0}) == {}


def test_weights_that_fp16_cannot_hold_are_islands():
    model = small_model(small_weights(a=1e6, c=1e-6))
    assert reasons_of(model, SMALL) == {"first": Reason.WEIGHTS, "third": Reason.UNDERFLOW}
    report = weight_report(model, {"first", "third"})
    assert report.overflowing == ("a",)
    assert (report.num_weights, report.num_fp32, report.num_subnormal) == (48, 32, 0)


def test_values_that_are_all_subnormal_are_islands():
    reasons = reasons_of(small_model(small_weights()), SMALL | {"y": 1e-6})
    assert reasons == {"second": Reason.UNDERFLOW}


@pytest.mark.parametrize("islands", [(), ("first",), ("relu", "third"), ("second", "third")])
def test_any_islands_give_a_typed_graph(tmp_path, islands):
    """A strict type check passes, and the outputs have the names and dtypes of the spec."""
    weights = small_weights()
    model = small_model(weights)
    half_from_single(model, SPEC16, islands)
    save_graph(model, SPEC16, tmp_path, "small.onnx")
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float16)
    outputs = load_rounding(tmp_path / "small.onnx", SPEC16).run({"x": x})
    assert {name: array.dtype.name for name, array in outputs.items()} == {
        "y": "float16",
        "z": "float32",
    }
    hidden = np.maximum(x.astype(np.float64) @ weights["a"], 0)
    for name, weight in (("y", "b"), ("z", "c")):
        expected = hidden @ weights[weight]
        np.testing.assert_allclose(outputs[name], expected, atol=3e-3 * np.abs(expected).max())


def test_a_weight_read_by_both_kinds_is_stored_twice(tmp_path):
    model = small_model(small_weights())
    second = next(node for node in model.graph if node.name == "second")
    second.replace_input_with(1, model.graph.initializers["a"])
    half_from_single(model, SPEC16, {"second"})
    save_graph(model, SPEC16, tmp_path, "small.onnx")
    dtypes = {v.name: v.dtype.numpy().name for v in model.graph.initializers.values()}
    assert dtypes["a"] == "float32"
    assert dtypes["a/fp16"] == "float16"


def test_measuring_needs_whole_captions(micro_bundle):
    """Position 0, at which the mask hides a dummy slot, is measured too."""
    max_abs = measure(micro_bundle, golden_inputs(micro_bundle))
    assert max_abs[graphs.TEXT_DECODER][graphs.PRESENT_KEY_VALUES] > 0
    assert max(max_abs[graphs.TEXT_DECODER].values()) > 1e38


def test_sessions_are_closed_when_a_sample_or_a_check_fails(micro_bundle, tmp_path, monkeypatch):
    closed = []
    close = RangeSession.close

    def noted(session):
        closed.append(session.spec.name)
        close(session)

    def fail(*args, **options):
        raise VerificationError("not finite")

    monkeypatch.setattr(RangeSession, "close", noted)
    with monkeypatch.context() as patch, pytest.raises(VerificationError):
        patch.setattr("tap_deploy.engines.fp16.convert.run_sample", fail)
        measure(micro_bundle, golden_inputs(micro_bundle), threads=1)
    assert sorted(closed) == sorted(graphs.GRAPH_NAMES)
    closed.clear()
    monkeypatch.setattr("tap_deploy.engines.fp16.convert.verify_sessions", fail)
    monkeypatch.setattr("tap_deploy.sessions.ort.session.OnnxRuntimeSession.close", noted)
    monkeypatch.setattr(
        "tap_deploy.engines.fp16.convert.measure", lambda bundle, *args, **options: maxima
    )
    maxima = {name: {} for name in graphs.GRAPH_NAMES}
    bundle = Bundle.open(shutil.copytree(micro_bundle.path, tmp_path / "bundle"))
    with pytest.raises(VerificationError):
        add_fp16(bundle, threads=1)
    assert sorted(closed) == sorted(graphs.GRAPH_NAMES)
