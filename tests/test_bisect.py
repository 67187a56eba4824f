"""Bisection names the first layer that differs, whatever the size of the pieces."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from tap_deploy import graphs
from tap_deploy.bundle.graph_files import write_model
from tap_deploy.engines.bisect.bisect import OTHER_SHAPE, first_divergence
from tap_deploy.engines.bisect.pair import CHOICE, MISSING, RESCALED
from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes
from tap_deploy.engines.qdq.graph import qdq_from_ranges
from tap_deploy.engines.smoothing.smoothquant import fold, smoothing_points
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import create_session
from tap_deploy.verify.difference import CHUNK_VALUES, difference
from tap_deploy.verify.tolerances import FP16_TOLERANCES, Tolerance

TIGHT = Tolerance(max=1e-5, relative=True)


@pytest.fixture(scope="module")
def fp32(micro_bundle):
    return micro_bundle.variant("fp32")


@pytest.fixture(scope="module")
def feeds(micro_bundle, fp32):
    """Graph name -> golden inputs; two steps of the text decoder."""
    sample = micro_bundle.golden().samples[0]
    prompts = len(sample.point_labels)
    steps = []
    name = graphs.TEXT_DECODER
    with create_session("onnxruntime", fp32.path(name), fp32.specs[name], threads=1) as session:

        def compute(inputs):
            steps.append({name: array.copy() for name, array in inputs.items()})
            return session.run(inputs)

        decoding = CaptionSteps(
            FakeSession(session.spec, compute), micro_bundle.config, sample.chosen_tokens
        )
        for position in range(1, 4):
            decoding.step(sample.caption_ids[:, position - 1])
    return {
        graphs.IMAGE_ENCODER: [{graphs.IMAGES: sample.images}],
        graphs.PROMPT_DECODER: [
            {
                graphs.IMAGE_EMBEDDINGS: sample.image_embeddings,
                graphs.POINT_COORDS: sample.point_coords,
                graphs.POINT_LABELS: sample.point_labels,
                graphs.MASK_REQUEST: request_answers(prompts),
                graphs.MASK_ROWS: mask_rows(prompts),
            }
        ],
        graphs.TEXT_DECODER: [steps[0], steps[3]],
    }


def middle(model, op_type, has):
    """Return the node in the middle of those with an operator that fit."""
    nodes = [node for node in model.graph if node.op_type == op_type and has(node)]
    return nodes[len(nodes) // 2]


def weight(node, position):
    """Return a weight that only this node reads, or None."""
    value = node.inputs[position] if position < len(node.inputs) else None
    alone = value is not None and value.is_initializer() and len(value.uses()) == 1
    return value if alone and value.const_value.shape.rank() > 0 else None


def replace(value, change):
    array = change(value.const_value.numpy())
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def scale_weight(model):
    op_type = "Gemm" if model.graph.name == graphs.TEXT_DECODER else "MatMul"
    node = middle(model, op_type, lambda node: weight(node, 1) is not None)
    replace(weight(node, 1), lambda array: array * np.float32(1.01))
    return node


def drop_bias(model):
    op_type, position = ("Gemm", 2) if model.graph.name == graphs.TEXT_DECODER else ("Add", 1)
    node = middle(model, op_type, lambda node: weight(node, position) is not None)
    replace(weight(node, position), np.zeros_like)
    return node


def approximate_gelu(model):
    node = middle(model, "Gelu", lambda node: True)
    node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    return node


def change_epsilon(model):
    node = middle(model, "LayerNormalization", lambda node: True)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    return node


def mutated(fp32, graph, change, folder):
    model = fp32.load(graph)
    node = change(model)
    write_model(model, folder / f"{graph}.onnx")
    return folder / f"{graph}.onnx", node


def bisect(path, fp32, graph, feeds, tolerance=TIGHT, **options):
    return first_divergence(path, fp32.path(graph), feeds[graph], tolerance, threads=1, **options)


@pytest.mark.parametrize("change", [scale_weight, drop_bias, approximate_gelu, change_epsilon])
@pytest.mark.parametrize("graph", graphs.GRAPH_NAMES)
def test_a_changed_node_is_named(fp32, feeds, graph, change, tmp_path):
    path, node = mutated(fp32, graph, change, tmp_path)
    found = bisect(path, fp32, graph, feeds)
    divergence = found.divergence
    assert (divergence.layer.node, divergence.layer.op_type) == (node.name, node.op_type)
    assert divergence.layer.tensor == node.outputs[0].name
    assert divergence.layer.error.max_rel > TIGHT.max
    assert divergence.before.tensor in {value.name for value in node.inputs if value is not None}
    assert divergence.before.error.max_rel < TIGHT.max
    assert node.name in str(found) and divergence.before.node in str(found)
    assert found.compared < found.comparable


@pytest.mark.parametrize("graph", graphs.GRAPH_NAMES)
def test_an_equal_graph_has_no_divergence(fp32, feeds, graph):
    found = bisect(fp32.path(graph), fp32, graph, feeds, Tolerance(max=0, mean=0))
    assert found.divergence is None
    tensors = {value.name for node in fp32.load(graph).graph for value in node.outputs}
    assert found.compared == found.comparable == len(tensors)
    assert not any(found.left_out.values())
    outputs = {tensor.name for tensor in fp32.specs[graph].outputs}
    assert outputs <= {layer.tensor for layer in found.growth} | {
        graphs.NEXT_IDS,
        graphs.MASK_INDEX,
    }


@pytest.mark.parametrize("graph", graphs.GRAPH_NAMES)
def test_small_pieces_give_the_same_answer(fp32, feeds, graph, tmp_path):
    path, _ = mutated(fp32, graph, scale_weight, tmp_path)
    limits = {graphs.IMAGE_ENCODER: 2_000_000}
    small = bisect(path, fp32, graph, feeds, limit_bytes=limits.get(graph, 20_000))
    large = bisect(path, fp32, graph, feeds, limit_bytes=1 << 40)
    assert small.divergence.layer.tensor == large.divergence.layer.tensor
    assert small.divergence.before.tensor == large.divergence.before.tensor
    assert (small.compared, small.left_out) == (large.compared, large.left_out)
    assert [layer.tensor for layer in small.growth] == [layer.tensor for layer in large.growth]


def test_pieces_are_run_up_to_the_divergence_only(fp32, feeds, tmp_path):
    graph = graphs.IMAGE_ENCODER
    path, _ = mutated(fp32, graph, scale_weight, tmp_path)
    calls = []
    bisect(
        path,
        fp32,
        graph,
        feeds,
        limit_bytes=2_000_000,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert len(calls) > 5
    assert calls == sorted(calls)
    assert calls[-1][0] < calls[-1][1]


def test_int8_differs_at_its_first_product(fp32, feeds, ranges, tmp_path):
    """And layers that SmoothQuant rescales are left out."""
    graph = graphs.IMAGE_ENCODER
    model = fp32.load(graph)
    chosen = ChosenNodes.default(model)
    point = smoothing_points(model)[0]
    factors = np.linspace(0.5, 2, len(weight(point.norm, 1).const_value.numpy()))
    fold(model, point.smoothing(factors.astype(np.float32)))
    path = tmp_path / "int8.onnx"
    write_model(qdq_from_ranges(model, ranges[graph], chosen, for_cpu=True), path)
    first = next(node for node in model.graph if node.name in chosen.nodes)

    found = bisect(path, fp32, graph, feeds, rescaled=[point.norm.name])
    assert found.divergence.layer.node == first.name
    assert found.left_out[RESCALED] == 1 and found.left_out[MISSING] == 0
    assert bisect(path, fp32, graph, feeds).divergence.layer.node == point.norm.name

    loose = Tolerance(max=1e9, relative=True)
    errors = bisect(path, fp32, graph, feeds, loose, rescaled=[point.norm.name]).growth
    assert errors[-1].tensor == graphs.IMAGE_EMBEDDINGS
    assert 1e-4 < errors[0].error.mean_rel < 0.5


def test_a_wrong_scale_of_an_int8_graph_is_named(fp32, feeds, ranges, tmp_path):
    graph = graphs.IMAGE_ENCODER
    chosen = ChosenNodes.default(fp32.load(graph))
    model = qdq_from_ranges(fp32.path(graph), ranges[graph], chosen, for_cpu=True)
    names = [name for name in chosen.nodes if name.endswith("MatMul")]
    node = next(node for node in model.graph if node.name == names[len(names) // 2])
    replace(node.inputs[1].producer().inputs[1], lambda scales: 2 * scales)
    write_model(model, tmp_path / "int8.onnx")
    # Rounding gives single values large errors, but hardly changes the mean.
    tolerance = Tolerance(max=2, mean=0.25, relative=True)
    found = bisect(tmp_path / "int8.onnx", fp32, graph, feeds, tolerance)
    assert found.divergence.layer.node == node.name


@pytest.mark.parametrize("graph", [graphs.PROMPT_DECODER, graphs.TEXT_DECODER])
def test_fp16_values_are_rounded(fp16_bundle, fp32, feeds, graph):
    path = fp16_bundle.variant("fp16").path(graph)
    found = bisect(path, fp32, graph, feeds, Tolerance(max=1e-7, relative=True))
    assert 1e-6 < found.divergence.layer.error.max_rel < 2.0**-10
    assert found.left_out[CHOICE] > 0
    within = bisect(path, fp32, graph, feeds, FP16_TOLERANCES[graphs.IMAGE_EMBEDDINGS])
    assert within.divergence is None, str(within)


def test_a_changed_node_of_an_fp16_graph_is_named(fp16_bundle, fp32, feeds, tmp_path):
    path, node = mutated(fp16_bundle.variant("fp16"), graphs.TEXT_DECODER, drop_bias, tmp_path)
    tolerance = FP16_TOLERANCES[graphs.LOGITS]
    found = bisect(path, fp32, graphs.TEXT_DECODER, feeds, tolerance)
    assert found.divergence.layer.node == node.name


def small_graph(path, text):
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    write_model(model, path)
    return path


REFERENCE = """
g (float[4] x) => (float[4] y, int64 c) {
  a = Neg(x)
  b = Abs(x)
  s = Shape(a)
  t = Log(a)
  c = ArgMax<axis=0, keepdims=0>(b)
  y = Add(a, b)
}
"""


@pytest.fixture
def pair(tmp_path):
    reference = small_graph(tmp_path / "reference.onnx", REFERENCE)

    def compare(text, x=(1, -2, 3, 0), **options):
        subject = small_graph(tmp_path / "subject.onnx", text)
        inputs = [{"x": np.array(x, np.float32)}]
        return first_divergence(subject, reference, inputs, TIGHT, threads=1, **options)

    return compare


def test_infinity_and_nan_in_the_same_places_fit(pair):
    found = pair(REFERENCE)  # the logarithm has both
    assert found.divergence is None and found.compared == 6


def test_nan_in_one_graph_is_a_divergence(pair):
    found = pair(REFERENCE.replace("Log(a)", "Sqrt(b)"))
    assert found.divergence.layer.tensor == "t"
    assert math.isinf(found.divergence.layer.error.max_abs)
    assert "NaN or infinity" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_another_index_is_a_divergence(pair):
    found = pair(REFERENCE.replace("ArgMax", "ArgMin"))
    assert (found.divergence.layer.tensor, found.divergence.layer.op_type) == ("c", "ArgMin")
    assert found.divergence.before.tensor == "b"


def test_another_order_of_the_nodes(pair):
    lines = REFERENCE.strip().splitlines()
    turned = "\n".join([lines[0], *(lines[i] for i in (2, 1, 6, 3, 4, 5)), lines[7]])
    for limit in (1, 1 << 20):
        assert pair(turned, limit_bytes=limit).divergence is None
        wrong = turned.replace("Neg(x)", "Abs(x)")
        assert pair(wrong, limit_bytes=limit).divergence.layer.tensor == "a"


def test_tensors_of_other_shapes_are_left_out(pair):
    other = REFERENCE.replace("t = Log(a)", "u = Concat<axis=0>(a, a)\n  t = Log(u)")
    found = pair(other)
    assert found.divergence is None
    assert found.left_out[OTHER_SHAPE] == 1 and "1 left out (another shape)" in str(found)


def test_missing_names_are_counted(pair):
    found = pair(REFERENCE.replace("t = Log", "other = Log"))
    assert found.left_out[MISSING] == 1 and found.compared == 5
    with pytest.raises(InputError, match="no tensor of the same name"):
        pair("g (float[4] x) => (float[4] z) { z = Neg(x) }")


def test_feeds_are_checked(fp32, feeds):
    graph = graphs.IMAGE_ENCODER
    with pytest.raises(InputError, match="no inputs"):
        bisect(fp32.path(graph), fp32, graph, {graph: []})
    with pytest.raises(InputError, match=r"inputs are \['x'\]; expected \['images'\]"):
        bisect(fp32.path(graph), fp32, graph, {graph: [{"x": np.zeros(1)}]})


def test_differences_of_long_tensors():
    expected = np.linspace(-1, 1, 2 * CHUNK_VALUES + 3, dtype=np.float32)
    actual = expected.copy()
    actual[-1] += 0.5
    found = difference(actual, expected)
    assert found.max_abs == found.max_rel == 0.5
    assert found.mean_rel == pytest.approx(0.5 / np.abs(expected).sum())
    assert difference(expected, expected).max_abs == 0
    assert math.isinf(difference(actual, np.zeros_like(actual)).max_rel)
    assert difference(np.array([], np.float32), np.array([], np.float32)).max_abs == 0
