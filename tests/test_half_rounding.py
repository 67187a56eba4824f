"""fp16 graphs on a CPU, each value rounded: what onnxruntime hides by itself shows."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from tap_deploy import graphs
from tap_deploy.engines.fp16.rounding import load_rounding
from tap_deploy.errors import InputError, SessionError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions.ort import session as backend

HALF_UNIT = 2.0**-11
ON, OFF = "ORT_ENABLE_ALL", "ORT_DISABLE_ALL"


@pytest.fixture(params=[ON, OFF], autouse=True)
def optimisation(request, monkeypatch):
    """Every test runs with the graph optimisations of onnxruntime, and without."""
    session_options = backend.session_options

    def with_level(*args):
        options = session_options(*args)
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, request.param
        )
        return options

    monkeypatch.setattr(backend, "session_options", with_level)
    return request.param


def feeds(bundle):
    """Golden inputs of both decoders, in fp16; the text decoder stands in mid-caption."""
    sample = bundle.golden().samples[0]
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((4, 4, 2, 6, 64)).astype(np.float16)  # K and V of two layers
    return {
        graphs.PROMPT_DECODER: {
            graphs.IMAGE_EMBEDDINGS: sample.image_embeddings.astype(np.float16),
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
            graphs.MASK_REQUEST: request_answers(4),
            graphs.MASK_ROWS: mask_rows(4),
        },
        graphs.TEXT_DECODER: {
            graphs.SEMANTIC_TOKENS: sample.chosen_tokens.astype(np.float16),
            graphs.INPUT_IDS: np.array([1, 7, 80, 499], np.int32),
            graphs.POSITION: np.array([4], np.int32),  # two of the slots are masked
            graphs.GUMBEL_NOISE: np.zeros((4, 1), np.float32),
            **dict(zip(graphs.past_names(bundle.config), cache, strict=True)),
        },
    }


@pytest.fixture(scope="module", params=[graphs.PROMPT_DECODER, graphs.TEXT_DECODER])
def reference(fp16_bundle, request):
    """Name of a graph, its inputs, and what onnx's evaluator in NumPy makes of them.

    It would take minutes for the image encoder.
    """
    name, feed = request.param, feeds(fp16_bundle)[request.param]
    evaluator = ReferenceEvaluator(onnx.load(fp16_bundle.variant("fp16").path(name)))
    with np.errstate(all="ignore"):
        values = evaluator.run(None, feed)
    return name, feed, dict(zip(evaluator.output_names, values, strict=True))


def test_it_rounds_as_the_reference_of_onnx_does(fp16_bundle, reference):
    """To a few roundings: only the order of their sums differs."""
    name, feed, reference = reference
    path, spec = fp16_bundle.variant("fp16").path(name), fp16_bundle.variant("fp16").specs[name]
    ours = load_rounding(path, spec).run(feed)
    for tensor, expected in reference.items():
        assert ours[tensor].dtype == expected.dtype
        difference = np.abs(ours[tensor].astype(np.float64) - expected.astype(np.float64))
        scale = np.abs(expected.astype(np.float64))
        assert difference.mean() <= 4 * HALF_UNIT * scale.mean(), tensor
        assert difference.max() <= 8 * HALF_UNIT * scale.max(), tensor
    np.testing.assert_array_equal(ours.get(graphs.NEXT_IDS, 0), reference.get(graphs.NEXT_IDS, 0))


def load(tmp_path, text, *, threads=1, **weights):
    """Load a graph from ONNX's text form, with further weights."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for name, array in weights.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
        old = next(v for g in model.graphs() for n in g for v in n.inputs if v and v.name == name)
        old.replace_all_uses_with(value)
        model.graph.inputs.remove(old)
        model.graph.register_initializer(value)
    for graph in model.graphs():
        for index, node in enumerate(graph):
            node.name = node.name or f"{graph.name}/{node.op_type}_{index}"
    ir.save(model, tmp_path / "g.onnx")
    onnx.checker.check_model(tmp_path / "g.onnx")
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "g.onnx"), strict_mode=True)
    onnx.save(inferred, tmp_path / "g.onnx")

    def tensors(values):
        return tuple(TensorSpec(v.name, v.dtype.numpy().name, tuple(v.shape)) for v in values)

    spec = GraphSpec("g", inputs=tensors(model.graph.inputs), outputs=tensors(model.graph.outputs))
    return load_rounding(tmp_path / "g.onnx", spec, threads=threads)


def numbers(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float16)


def test_a_product_beyond_the_limit_is_infinite(tmp_path):
    session = load(
        tmp_path,
        """g (float16[1,4] x, float16[4,4] w) => (float16[1,4] y)
        { p = MatMul(x, w)  y = Relu(p) }""",
        w=np.full((4, 4), 100, np.float16),
    )
    assert np.isinf(session.run({"x": np.full((1, 4), 200, np.float16)})["y"]).all()
    outputs = session.run({"x": np.full((1, 4), 100, np.float16)})
    np.testing.assert_array_equal(outputs["y"], np.float16(40000))
    session.close()


def test_a_value_that_only_another_node_sees_overflows_too(tmp_path):
    """Finite in fp32, and at the end of the graph."""
    session = load(
        tmp_path,
        "g (float16[4] x, float16[4] a) => (float16[4] y) { p = Mul(x, a)  y = Div(p, a) }",
    )
    x, a = np.array([1, 400, -400, 655], np.float16), np.array([200] * 3 + [100], np.float16)
    expected = np.array([1, np.inf, -np.inf, 655], np.float16)
    np.testing.assert_array_equal(session.run({"x": x, "a": a})["y"], expected)


def test_subnormal_values_lose_their_digits(tmp_path):
    """Steps of 2**-24 below 2**-14, and nothing at all below half a step."""
    session = load(
        tmp_path,
        "g (float16[4] x, float16[4] a) => (float16[4] y) { p = Mul(x, a)  y = Div(p, a) }",
    )
    a = np.full(4, 2.0**-14, np.float16)
    x = np.array([1.25 * 2**-10, 1.75 * 2**-10, 2**-12, 1.0], np.float16)
    expected = np.array([2**-10, 2**-9, 0, 1], np.float16)
    np.testing.assert_array_equal(session.run({"x": x, "a": a})["y"], expected)


def test_every_value_is_rounded(tmp_path):
    """Bit by bit what NumPy makes of it, which rounds after each operation."""
    session = load(
        tmp_path,
        """g (float16[999] x, float16[999] a, float16[999] b) => (float16[999] y, float16[999] s)
        { p = Mul(x, a)  s = Add(p, b)  d = Sub(s, x)  q = Mul(d, d)  y = Add(q, p) }""",
        b=numbers(999, 2),
    )
    x, a, b = (numbers(999, seed) for seed in range(3))
    product = x * a
    total = product + b
    y = (total - x) * (total - x) + product
    outputs = session.run({"x": x, "a": a})
    np.testing.assert_array_equal(outputs["s"], total)
    np.testing.assert_array_equal(outputs["y"], y)
    x, a, b = (array.astype(np.float32) for array in (x, a, b))
    once = (x * a + b - x) ** 2 + x * a
    assert (once.astype(np.float16) != y).mean() > 0.3  # not what fp32 comes to


@pytest.mark.parametrize(("operator", "tail"), [("MatMul", []), ("Conv", [1, 1])])
def test_sums_of_products_are_rounded_once(tmp_path, operator, tail):
    """2048 and many halves: a sum in fp16 would not move."""
    x = np.array([2048.0] + [1.0] * 64, np.float16).reshape(1, 65, *tail)
    w = np.array([1.0] + [0.5] * 64, np.float16)
    w = w.reshape(1, 65, *tail) if tail else w.reshape(65, 1)
    shapes = [",".join(map(str, shape)) for shape in (x.shape, w.shape, (1, 1, *tail))]
    session = load(
        tmp_path,
        f"g (float16[{shapes[0]}] x, float16[{shapes[1]}] w) => (float16[{shapes[2]}] y) "
        f"{{ y = {operator}(x, w) }}",
        w=w,
    )
    assert session.run({"x": x})["y"].item() == 2080


def test_islands_stay_fp32(tmp_path):
    session = load(
        tmp_path,
        """g (float16[999] x, float[999] c) => (float16[999] y, float[999] z)
        { f = Cast<to = 1>(x)  large = Mul(f, c)  z = Mul(large, c)
          small = Div(z, c)  back = Div(small, c)  h = Cast<to = 10>(back)  y = Add(h, x) }""",
        c=np.full(999, 70000, np.float32),
    )
    x, c = numbers(999), np.float32(70000)
    outputs = session.run({"x": x})
    z = x.astype(np.float32) * c * c
    np.testing.assert_array_equal(outputs["z"], z)
    np.testing.assert_array_equal(outputs["y"], (z / c / c).astype(np.float16) + x)


def test_constants_in_fp16_are_read(tmp_path):
    """ONNX's text form gives fp16 numbers by their bits: 15360 is 1."""
    session = load(
        tmp_path,
        """g (float16[3] x, int64[1] n) => (float16[3] y)
        { one = ConstantOfShape<value = float16[1] {15360}>(n)  half = Cast<to = 10>(n)
          s = Add(x, one)  p = Mul(s, half)  h = Cast<to = 10>(p)  y = Identity(h) }""",
        n=np.array([3]),
    )
    x = np.array([2048, 1, 60000], np.float16)
    outputs = session.run({"x": x})
    np.testing.assert_array_equal(outputs["y"], np.array([6144, 6, np.inf], np.float16))


def test_graphs_inside_of_a_graph_are_rounded(tmp_path):
    """A branch that reads from outside, and a loop that carries fp16."""
    session = load(
        tmp_path,
        """g (float16[4] x, bool c, int64 n, float16[4] w) => (float16[4] y, float16[4] z)
        { s = Mul(x, w)
          t = If (c) <
            then_branch = a () => (float16[4] u) { p = Mul(s, w)  u = Div(p, w) },
            else_branch = b () => (float16[4] v) { v = Identity(s) } >
          y = Add(t, x)
          z = Loop (n, c, x) <
            body = l (int64 i, bool more, float16[4] before) => (bool still, float16[4] after)
            { still = Identity(more)  q = Mul(before, w)  r = Add(q, w)  after = Div(r, w) } > }""",
        w=np.array([10, 200, 3, 7], np.float16),
    )
    x, w = np.array([1.1, 1.7, 2.3, 5.9], np.float16), np.array([10, 200, 3, 7], np.float16)
    z = x
    for _ in range(3):
        z = (z * w + w) / w
    with np.errstate(over="ignore"):
        y = x * w * w / w + x
    inputs = {"x": x, "c": np.array(True), "n": np.array(3)}
    outputs = session.run(inputs)
    np.testing.assert_array_equal(outputs["z"], z)
    np.testing.assert_array_equal(outputs["y"], y)
    assert np.isinf(y[1])
    other = session.run(inputs | {"c": np.array(False)})
    np.testing.assert_array_equal(other["y"], x * w + x)


def test_scales_of_quantized_values_may_be_fp16(tmp_path):
    session = load(
        tmp_path,
        """g (float16[9] x, float16 scale, int8 zero) => (float16[9] y)
        { q = QuantizeLinear(x, scale, zero)  d = DequantizeLinear(q, scale, zero)
          y = Mul(d, d) }""",
        scale=np.array(0.1, np.float16),
        zero=np.array(3, np.int8),
    )
    x, scale = 4 * numbers(9), np.float32(np.float16(0.1))
    steps = np.clip(np.rint(x.astype(np.float32) / scale), -131, 124)
    back = (steps * scale).astype(np.float16)
    np.testing.assert_array_equal(session.run({"x": x})["y"], back * back)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # A strongly typed builder refuses it; a Cast to fp32 would hide it.
        (
            "(float16[4] x, float[4] w) => (float16[4] y) { [product] y = Mul(x, w) }",
            "node product mixes float16 and float32",
        ),
        # It would pass through unrounded.
        (
            "(float16[4] x, float16[4] w) => (float16[4] y) { [product] p = Mul(x, w) y = Neg(p) }",
            "output p of node product has no dtype",
        ),
    ],
)
def test_untyped_graphs_are_refused(tmp_path, text, message):
    path = tmp_path / "g.onnx"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {text}')
    onnx.save(model, path)
    second = "float32" if "float[4] w" in text else "float16"
    spec = GraphSpec(
        "g",
        inputs=(TensorSpec("x", "float16", (4,)), TensorSpec("w", second, (4,))),
        outputs=(TensorSpec("y", "float16", (4,)),),
    )
    with pytest.raises(SessionError, match=f"graph g: {message}"):
        load_rounding(path, spec)


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch):
    """Weights stand in a file of their own while onnxruntime loads them."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    weight = numbers(10000).reshape(100, 100)
    session = load(
        tmp_path,
        "g (float16[1,100] x, float16[100,100] w) => (float16[1,100] y) { y = MatMul(x, w) }",
        w=weight,
    )
    assert list(folder.iterdir()) == []
    x = np.eye(100, dtype=np.float16)[:1]
    np.testing.assert_array_equal(session.run({"x": x})["y"], weight[:1])


def test_threads_are_checked(tmp_path):
    text = "g (float16[4] x) => (float16[4] y) { y = Neg(x) }"
    with pytest.raises(InputError, match="threads is 0"):
        load(tmp_path, text, threads=0)
