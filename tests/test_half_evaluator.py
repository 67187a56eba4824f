"""The evaluators that round to fp16 agree with each other, and see what onnxruntime hides."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir

from tap_deploy import graphs
from tap_deploy.caption_steps import step_inputs
from tap_deploy.engines import evaluators
from tap_deploy.engines.evaluators import rounding_evaluator
from tap_deploy.engines.half_evaluator import TorchHalfSession
from tap_deploy.engines.reference_evaluator import OnnxReferenceSession
from tap_deploy.errors import InputError, MissingDependencyError, SessionError
from tap_deploy.golden import GoldenSample
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.masks import request_answers
from tap_deploy.sessions import create_session

HALF_UNIT = 2.0**-11


def feeds(bundle):
    """Golden inputs of the three graphs, in fp16; the text decoder stands in mid-caption."""
    sample = GoldenSample.load(bundle.golden_path())
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, 2, 4, 2, 6, 64)).astype(np.float16)  # K and V of two layers
    return {
        graphs.IMAGE_ENCODER: {graphs.IMAGES: sample.images},
        graphs.PROMPT_DECODER: {
            graphs.IMAGE_EMBEDDINGS: sample.image_embeddings.astype(np.float16),
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
            graphs.MASK_REQUEST: request_answers(4),
        },
        graphs.TEXT_DECODER: step_inputs(
            bundle.config,
            sample.chosen_tokens.astype(np.float16),
            np.array([1, 7, 80, 499]),
            4,  # two of the slots are masked
            cache,
        ),
    }


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_torch_and_onnx_round_alike(fp16_bundle, name):
    """To a few roundings: only the order of their sums differs."""
    path, spec = fp16_bundle.graph_path(name, "fp16"), fp16_bundle.graph_specs("fp16")[name]
    feed = feeds(fp16_bundle)[name]
    ours = TorchHalfSession(path, spec).run(feed)
    reference = OnnxReferenceSession(path, spec).run(feed)
    for tensor, expected in reference.items():
        assert ours[tensor].dtype == expected.dtype
        difference = np.abs(ours[tensor].astype(np.float64) - expected.astype(np.float64))
        scale = np.abs(expected.astype(np.float64))
        assert difference.mean() <= 4 * HALF_UNIT * scale.mean(), tensor
        assert difference.max() <= 8 * HALF_UNIT * scale.max(), tensor
    np.testing.assert_array_equal(ours.get(graphs.NEXT_IDS, 0), reference.get(graphs.NEXT_IDS, 0))


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_in_fp32_it_computes_what_onnxruntime_does(micro_bundle, name):
    """The same code on the fp32 graph: every operator is right, not only close to another's."""
    path, spec = micro_bundle.graph_path(name, "fp32"), micro_bundle.graph_specs()[name]
    dtypes = {tensor.name: tensor.dtype for tensor in spec.inputs}
    feed = {n: np.asarray(a, dtypes[n]) for n, a in feeds(micro_bundle)[name].items()}
    ours = TorchHalfSession(path, spec).run(feed)
    theirs = create_session("onnxruntime", path, spec).run(feed)
    for tensor, expected in theirs.items():
        np.testing.assert_allclose(ours[tensor], expected, atol=1e-4 * np.abs(expected).max())


def product_graph(tmp_path, *, second=ir.DataType.FLOAT16):
    """y = relu(x @ w): a graph whose product passes 65504 for x = 200."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["P", 4]))
    weight = np.full((4, 4), 100, second.numpy())
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"), type=ir.TensorType(second))
    w.shape = ir.Shape([4, 4])
    product = ir.node("MatMul", [x, w], name="product")
    divided = ir.node("Relu", product.outputs, name="relu")
    for node, name in ((product, "p"), (divided, "y")):
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT16
        node.outputs[0].shape = ir.Shape(["P", 4])
    graph = ir.Graph(
        [x],
        divided.outputs,
        nodes=[product, divided],
        initializers=[w],
        opset_imports={"": 20},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    spec = GraphSpec(
        "g",
        inputs=(TensorSpec("x", "float16", ("P", 4)),),
        outputs=(TensorSpec("y", "float16", ("P", 4)),),
    )
    return tmp_path / "g.onnx", spec


@pytest.mark.parametrize("kind", [TorchHalfSession, OnnxReferenceSession])
def test_a_product_beyond_the_limit_is_infinite(tmp_path, kind):
    path, spec = product_graph(tmp_path)
    session = kind(path, spec)
    assert np.isinf(session.run({"x": np.full((1, 4), 200, np.float16)})["y"]).all()
    outputs = session.run({"x": np.full((1, 4), 100, np.float16)})
    np.testing.assert_array_equal(outputs["y"], np.float16(40000))
    session.close()


def test_mixed_dtypes_are_refused(tmp_path):
    """torch would promote them; a strongly typed builder does not."""
    path, spec = product_graph(tmp_path, second=ir.DataType.FLOAT)
    session = TorchHalfSession(path, spec)
    with pytest.raises(SessionError, match=r"node product mixes .*float16.*float32.*not typed"):
        session.run({"x": np.ones((1, 4), np.float16)})


def test_unknown_operators_are_named(tmp_path):
    path, spec = product_graph(tmp_path)
    model = ir.load(path)
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Celu"
    ir.save(model, path)
    with pytest.raises(SessionError, match="does not know Celu"):
        TorchHalfSession(path, spec)


def test_choice_of_the_evaluator(tmp_path, monkeypatch):
    path, spec = product_graph(tmp_path)
    paths, specs = {"g": path}, {"g": spec}
    assert rounding_evaluator(paths, specs).name == "torch-half"
    assert rounding_evaluator(paths, specs, "onnx-reference").name == "onnx-reference"
    with pytest.raises(InputError, match="unknown evaluator 'gpu'"):
        rounding_evaluator(paths, specs, "gpu")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert rounding_evaluator(paths, specs).name == "onnx-reference"
    with pytest.raises(MissingDependencyError, match=r"evaluator|torch"):
        rounding_evaluator(paths, specs, "torch-half")
    # onnx's evaluator would take days for a large model
    monkeypatch.setattr(evaluators, "REFERENCE_LIMIT_BYTES", 10)
    assert rounding_evaluator(paths, specs) is None
