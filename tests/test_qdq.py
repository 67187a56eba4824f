"""Explicit Q/DQ: its structure, its numbers, and its use by builders and onnxruntime."""

from __future__ import annotations

import re

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from conftest import is_residual

from tap_deploy import graphs
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.engines.calibration.table import CalibrationTable
from tap_deploy.engines.qdq.chosen_nodes import (
    SENSITIVE,
    ChosenNodes,
    attention_nodes,
    default_nodes,
    makes_graph_output,
    residual_nodes,
)
from tap_deploy.engines.qdq.graph import qdq_from_ranges
from tap_deploy.engines.qdq.writer import quantized_weight, scales_from_amax
from tap_deploy.errors import InputError
from tap_deploy.sessions.ort.session import session_options

INT8_KERNELS = {"MatMulIntegerToFloat", "QGemm", "QLinearConv"}


@pytest.fixture
def model_of(micro_bundle):
    return lambda name: ir.load(micro_bundle.variant("fp32").path(name))


def table_of(ranges, graph="g"):
    return CalibrationTable(
        graph=graph,
        method="max",
        ranges=ranges,
        onnx_sha256="",
        data_fingerprint="",
        num_samples=1,
    )


def linear_model(op_type="Gemm", rank=2, bias=True, trans_b=True):
    """``x @ w + b`` with 3 inputs and 2 outputs; x has ``rank`` axes."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 3) if trans_b else (3, 2)).astype(np.float32)
    leading = {2: ["P"], 3: [1, 4]}[rank]
    nodes = [onnx.helper.make_node("Relu", ["x"], ["a"], name="Relu")]
    biases = ["b"] if bias else []
    if op_type == "Gemm":
        nodes.append(
            onnx.helper.make_node(
                "Gemm", ["a", "w", *biases], ["y"], name="fc/Gemm", transB=int(trans_b)
            )
        )
    else:
        nodes.append(onnx.helper.make_node("MatMul", ["a", "w"], ["m"], name="fc/MatMul"))
        nodes.append(onnx.helper.make_node("Add", ["m", "b"], ["y"], name="fc/Add"))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", onnx.TensorProto.FLOAT, [*leading, 3])],
        [info("y", onnx.TensorProto.FLOAT, [*leading, 2])],
        [
            onnx.numpy_helper.from_array(weight, "w"),
            onnx.numpy_helper.from_array(np.array([0.5, -2.0], np.float32), "b"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def session_of(model):
    options = session_options(onnxruntime)
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model, x):
    return session_of(model).run(None, {"x": x})[0]


def optimised(path, tmp_path):
    """The graph that onnxruntime really runs."""
    options = session_options(onnxruntime, 1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimised.onnx").graph


def optimised_ops(path, tmp_path):
    return [node.op_type for node in optimised(path, tmp_path).node]


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_structure(model_of, ranges, name, for_cpu):
    model = model_of(name)
    chosen = ChosenNodes.default(model)
    quantized = qdq_from_ranges(model, ranges[name], chosen, for_cpu=for_cpu)
    assert quantized.opset_imports[""] <= 20
    assert quantized.ir_version <= 10
    assert len(list(model.graph)) < len(list(quantized.graph))
    nodes = {node.name: node for node in quantized.graph}
    assert {node.name for node in model.graph} <= set(nodes)
    skipped = {n for n in chosen.nodes if for_cpu and nodes[n].outputs[0].is_graph_output()}
    for node in quantized.graph:
        producers = [v.producer().op_type for v in node.inputs[:2] if v and v.producer()]
        if node.name in set(chosen.nodes) - skipped:
            assert producers == ["DequantizeLinear"] * 2
            assert all(v.producer() is None for v in node.inputs[2:])  # float biases
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source, scale, zero_point = (value.const_value for value in node.inputs)
            assert zero_point.numpy().dtype == np.int8
            assert not zero_point.numpy().any()
            if source is None:
                assert scale.numpy().shape == ()
            else:  # a weight: int8, a scale per output channel
                assert source.numpy().dtype == np.int8
                axis = node.attributes.get_int("axis")
                assert scale.numpy().shape == (source.numpy().shape[axis],)
                assert source.numpy().min() >= -127
    tensors = [n.inputs[0].name for n in quantized.graph if n.op_type == "QuantizeLinear"]
    if not for_cpu:
        assert len(tensors) == len(set(tensors))  # one Q per tensor
    kept = {v.name for v in model.graph.outputs}
    assert kept == {v.name for v in quantized.graph.outputs}
    assert kept == {v.name for v in quantized.graph.outputs if v.producer().op_type[0] != "D"}


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_what_decides_is_left_alone(model_of, name):
    nodes = default_nodes(model_of(name))
    assert nodes
    heads = re.compile(r"mask_pred|iou_pred|sem_pred|upscaler|prompt_encoder|norm")
    assert not [node for node in nodes if heads.search(node)]
    assert "patch_embed/MatMul" not in nodes
    if name != graphs.TEXT_DECODER:  # its only head, text_proj, stays int8
        assert any(n.name.startswith(SENSITIVE) for n in model_of(name).graph)


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_onnxruntime_computes_every_node_in_int8(micro_bundle, model_of, ranges, name, tmp_path):
    model = model_of(name)
    chosen = ChosenNodes.default(model)
    quantized = qdq_from_ranges(model, ranges[name], chosen, for_cpu=True)
    record = save_graph(quantized, micro_bundle.variant("fp32").specs[name], tmp_path, "q.onnx")
    ops = optimised_ops(tmp_path / "q.onnx", tmp_path)
    outputs = sum(n.name in chosen.nodes and makes_graph_output(n) for n in model.graph)
    assert sum(op in INT8_KERNELS for op in ops) == len(chosen.nodes) - outputs
    assert record.weights_bytes < micro_bundle.manifest.graphs["fp32"][name].weights_bytes
    # In the form for engines some of them are computed behind DequantizeLinear.
    save_graph(
        qdq_from_ranges(model, ranges[name], chosen),
        micro_bundle.variant("fp32").specs[name],
        tmp_path,
        "e.onnx",
    )
    engine_ops = optimised_ops(tmp_path / "e.onnx", tmp_path)
    assert sum(op in INT8_KERNELS for op in engine_ops) < len(chosen.nodes) - outputs


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image_encoder", {"attention": True}),
        ("text_decoder", {"for_cpu": True}),
    ],
)
def test_an_nvidia_builder_compiles_it(
    micro_bundle, model_of, ranges, rtx_plan, name, options, tmp_path
):
    """Over fp32; tests/test_quantize.py builds all three over fp16."""
    model, spec = model_of(name), micro_bundle.variant("fp32").specs[name]
    chosen = ChosenNodes.default(model)
    if options.pop("attention", False):
        chosen = ChosenNodes.default(model, attention=True, residuals=True)
        closing = {n.name for n in model.graph if n.op_type == "Add" and is_residual(n)}
        assert closing and closing < set(chosen.nodes)  # and what ends a cross_conv
    quantized = qdq_from_ranges(model, ranges[name], chosen, **options)
    save_graph(quantized, spec, tmp_path, "q.onnx")
    assert rtx_plan(tmp_path / "q.onnx", spec)


def test_residual_sums(model_of):
    """Two a block, and one at the end of each level but the last; no sum inside an attention."""
    names = {name: residual_nodes(model_of(name)) for name in graphs.GRAPH_NAMES}
    encoder = [name.partition("/")[0] for name in names["image_encoder"]]
    depth, stages = 4, 4
    assert sorted(encoder) == sorted(
        [f"blocks.{i}" for i in range(depth) for _ in range(2)]
        + [f"cross_conv.{i}" for i in range(stages - 1)]
    )
    for name in ("prompt_decoder", "text_decoder"):
        nodes = {node.name: node for node in model_of(name).graph}
        readers = [{u.node.op_type for u in nodes[n].outputs[0].uses()} for n in names[name]]
        assert readers and all("LayerNormalization" in kinds for kinds in readers)


def test_attention_pattern(model_of, ranges):
    """Q/DQ on q and k, behind the softmax, on v."""
    model = model_of("image_encoder")
    chosen = ChosenNodes(graph="image_encoder", nodes=attention_nodes(model))
    assert len(chosen.nodes) == 2 * 4  # two products in each of four blocks
    quantized = qdq_from_ranges(model, ranges["image_encoder"], chosen)
    products = [n for n in quantized.graph if n.name in chosen.nodes]
    sources = [
        [value.producer().inputs[0].producer().inputs[0].producer().op_type for value in n.inputs]
        for n in products
    ]
    assert sources == [["Mul", "Transpose"], ["Softmax", "Squeeze"]] * 4


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize(
    ("op_type", "rank", "bias", "trans_b"),
    [
        ("Gemm", 2, True, True),
        ("Gemm", 2, True, False),
        ("Gemm", 2, False, True),
        ("MatMul", 3, True, False),
    ],
)
@pytest.mark.parametrize(("reduce_range", "levels"), [(False, 127), (True, 64)])
def test_numbers(op_type, rank, bias, trans_b, reduce_range, levels, for_cpu):
    """The quantized Linear is what int8 arithmetic by hand says."""
    model = linear_model(op_type, rank, bias, trans_b)
    chosen = ChosenNodes(graph="g", nodes=(f"fc/{op_type}",))
    quantized = qdq_from_ranges(
        model, table_of({"a": 2.0}), chosen, for_cpu=for_cpu, reduce_range=reduce_range
    )
    shape = {2: (5, 3), 3: (1, 4, 3)}[rank]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 2
    weight = model.graph.initializers["w"].const_value.numpy()
    weight = weight.T if trans_b else weight
    scale = np.abs(weight).max(axis=0) / levels
    steps = np.clip(np.rint(np.maximum(x, 0) / (2 / 127)), -127, 127)
    expected = steps @ np.rint(weight / scale) * (2 / 127) * scale
    expected = expected + (np.array([0.5, -2.0]) if bias else 0)
    np.testing.assert_allclose(run(quantized, x), expected, rtol=1e-4, atol=1e-5)
    assert "w" not in quantized.graph.initializers
    assert "w" in model.graph.initializers  # the argument is as it was
    assert next(node.op_type for node in model.graph) == "Relu"


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_weights_of_reduced_range_stay_int8_on_every_cpu(model_of, ranges, tmp_path, name):
    """Without VNNI, onnxruntime converts int8 weights that may saturate to uint8, which is slow."""
    model = model_of(name)
    quantized = qdq_from_ranges(
        model, ranges[name], ChosenNodes.default(model), for_cpu=True, reduce_range=True
    )
    ir.save(quantized, tmp_path / "quantized.onnx")
    graph = optimised(tmp_path / "quantized.onnx", tmp_path)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    place = {"MatMulIntegerToFloat": 1, "QGemm": 3, "QLinearConv": 3}  # of the weight
    weights = [constants[n.input[place[n.op_type]]] for n in graph.node if n.op_type in place]
    assert weights
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}
    largest = [int(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max()) for t in weights]
    assert set(largest) == {64}


@pytest.mark.parametrize("name", ["image_encoder", "text_decoder"])
def test_outputs_stay_near(micro_bundle, model_of, ranges, name):
    spec = micro_bundle.variant("fp32").specs[name]
    sample = micro_bundle.golden().samples[0]
    model = model_of(name)
    quantized = qdq_from_ranges(model, ranges[name], ChosenNodes.default(model), for_cpu=True)
    rng = np.random.default_rng(0)
    if name == "image_encoder":
        inputs = {"images": sample.images}
    else:
        cache = rng.normal(size=(4, 2, 2, 3, 64)).astype(np.float32)  # K and V of two layers
        names = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
        inputs = {
            "semantic_tokens": sample.semantic_tokens[:2, 0],
            "input_ids": np.array([1, 7], np.int32),
            "position": np.array([3], np.int32),
            "gumbel_noise": np.zeros((2, 1), np.float32),
            **dict(zip(names, cache, strict=True)),
        }
    found, expected = [
        session_of(m).run([spec.outputs[-2 if name == "text_decoder" else 0].name], inputs)[0]
        for m in (quantized, model)
    ]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def test_casts_of_a_typed_graph_are_seen_through(model_of, ranges):
    """The fp16 graph reads ``x/fp16``, a Cast of what the fp32 graph calls x."""
    model = linear_model()
    relu, gemm = list(model.graph)
    cast = ir.node("Cast", [relu.outputs[0]], {"to": 1}, name="a/fp16/Cast")
    cast.outputs[0].name, cast.outputs[0].shape = "a/fp16", relu.outputs[0].shape
    model.graph.insert_after(relu, cast)
    gemm.replace_input_with(0, cast.outputs[0])
    chosen = ChosenNodes(graph="g", nodes=("fc/Gemm",))
    quantized = qdq_from_ranges(model, table_of({"a": 1.27}), chosen)
    q = next(n for n in quantized.graph if n.op_type == "QuantizeLinear")
    assert q.inputs[0].name == "a/fp16"
    assert q.inputs[1].const_value.numpy() == pytest.approx(0.01)


def test_scales_are_normal_numbers():
    amax = np.array([0.0, 1e-9, 1e-3, 1.0, 6e4])
    for dtype in ("float16", "float32"):
        scales = scales_from_amax(amax, dtype)
        assert scales.dtype == dtype
        assert (scales >= np.finfo(dtype).smallest_normal).all()
        np.testing.assert_allclose(scales[3:].astype(float), amax[3:] / 127, rtol=1e-3)


def test_weights_are_rounded_to_the_scale_that_the_graph_has():
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    weight[:, 3] = 1e-5  # a channel whose scale is below the range of fp16
    values, scales = quantized_weight(weight, 1, "float16")
    assert values.dtype == np.int8
    assert scales.dtype == np.float16
    error = np.abs(values * scales.astype(np.float32) - weight)
    # Half a step; the largest value of a channel may be clipped by the rounding of its scale.
    assert (error <= scales.astype(np.float32) * 0.57).all()


def test_plans_that_cannot_be(model_of, ranges):
    model = linear_model()
    nodes = {"Relu": "is a Relu; expected MatMul", "none": "has no node 'none'"}
    for node, message in nodes.items():
        with pytest.raises(InputError, match=message):
            chosen = ChosenNodes(graph="g", nodes=(node,))
            qdq_from_ranges(model, table_of({"a": 1.0}), chosen)
    chosen = ChosenNodes(graph="g", nodes=("fc/Gemm",))
    with pytest.raises(InputError, match="no range of a, needed by fc/Gemm"):
        qdq_from_ranges(model, table_of({}), chosen)
    with pytest.raises(InputError, match="listed twice"):
        ChosenNodes(graph="g", nodes=("fc/Gemm", "fc/Gemm"))
    model.opset_imports[""] = 17
    with pytest.raises(InputError, match="has opset 17; Q/DQ needs 19"):
        qdq_from_ranges(model, table_of({"a": 1.0}), chosen)
