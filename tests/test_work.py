"""The formulas match the work of the exported graphs and of the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tap_deploy import graphs
from tap_deploy.config import VARIANTS, TapConfig
from tap_deploy.engines.estimate.work import graph_works

P, N, T = 3, 5, 7
SIZES = {"B": 1, "P": P, "N": N, "M": 1, "Q": P, "T": T, "K": 1}
PRODUCTS = ("MatMul", "Gemm", "Conv")


@pytest.fixture(scope="module")
def works(micro_config):
    return graph_works(micro_config, prompts=P, points=N, slots=T)


@pytest.fixture(scope="module")
def counted(micro_bundle):
    """Graph -> (name of a kernel -> operations), by the shapes that onnxruntime makes."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return {
        name: operations_by_kernel(
            onnx.load(micro_bundle.variant("fp32").path(name)),
            micro_bundle.variant("fp32").specs[name],
        )
        for name in graphs.GRAPH_NAMES
    }


def operations_by_kernel(model, spec):
    import onnx
    import onnxruntime

    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    shapes = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    named = {value for node in products for value in (*node.input[:2], *node.output)}
    named -= {*shapes, *(value.name for value in model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(named))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {
        tensor.name: np.zeros([SIZES.get(axis, axis) for axis in tensor.shape], tensor.dtype)
        for tensor in spec.inputs
    }
    names = [value.name for value in session.get_outputs()]
    shapes |= {n: value.shape for n, value in zip(names, session.run(names, feeds), strict=True)}
    found = {}
    for node in products:
        left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
        inner = math.prod(right[1:]) if node.op_type == "Conv" else left[-1]
        kernel = node.name.rpartition("/")[0]
        found[kernel] = found.get(kernel, 0) + 2 * math.prod(out) * inner
    return found


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_every_product_of_the_exported_graphs(works, counted, name):
    """Per kernel, the number of operations equals that of onnxruntime exactly."""
    formula = {
        kernel.name: 2 * kernel.multiplications
        for kernel in works[name].kernels
        if kernel.multiplications
    }
    assert formula == counted[name]
    assert works[name].flops == sum(counted[name].values())


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_weights_of_the_exported_graphs(works, micro_bundle, micro_config, name):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(micro_bundle.variant("fp32").path(name)).graph
    sizes = {
        weight.name: math.prod(weight.dims)
        for weight in graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT
    }
    multiplied = {n.input[1] for n in graph.node if n.op_type in PRODUCTS} & set(sizes)
    assert works[name].int8_weight_elements == sum(sizes[name] for name in multiplied)
    # Both final attentions have the same biases and norm, which are stored once.
    shared = 4 * micro_config.image_embed_dim if name == graphs.PROMPT_DECODER else 0
    # A few scalars, and the scores that boxes add: not worth a formula.
    assert 0 <= sum(sizes.values()) + shared - works[name].weight_elements < 20
    record = micro_bundle.manifest.graphs["fp32"][name]
    assert 4 * works[name].weight_elements == pytest.approx(record.weights_bytes, rel=1e-3)


@pytest.mark.parametrize("model", VARIANTS)
def test_operations_of_the_reference(model):
    """By PyTorch's own counter, without any memory."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from tap_deploy.export.prompt_decoder import PromptDecoderGraph
    from tap_deploy.reference.state import meta_model

    c = TapConfig.from_name(model)
    tap, grid = meta_model(c).eval(), c.grid_size

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def operations(function, *args):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    work = graph_works(c, prompts=P, points=N, slots=T)
    assert work[graphs.IMAGE_ENCODER].flops == operations(
        tap.image_encoder, empty(1, 3, c.image_size, c.image_size)
    )
    # The graph attends between prompts and image with fewer operations than the reference.
    assert work[graphs.PROMPT_DECODER].flops == operations(
        PromptDecoderGraph(tap).to("meta"),
        empty(1, c.image_embed_dim, grid, grid),
        empty(P, N, 2),
        empty(P, N, dtype=torch.int32),
        empty(P, 1, dtype=torch.int32),
        torch.arange(P, dtype=torch.int32, device="meta"),
    )
    text = tap.text_decoder
    found = operations(text.encoder, empty(P, c.image_embed_dim))
    # A step sees T slots, itself among them.
    found += operations(text.decode, empty(P, 1, c.text_dim), text.new_cache(P), T - 1)
    rotations = 2 * P * c.text_depth * 2 * c.text_dim * 64  # the graph does them by products
    assert work[graphs.TEXT_DECODER].flops == found + rotations


def test_the_published_models():
    """Figures that are known of the published sizes, in GFLOP."""
    for name, gflop in {"tap_vit_b": 808, "tap_vit_l": 2702, "tap_vit_h": 5516}.items():
        work = graph_works(TapConfig.from_name(name), prompts=1, points=2, slots=20)
        assert work[graphs.IMAGE_ENCODER].flops / 1e9 == pytest.approx(gflop, rel=0.001)
    config = TapConfig.from_name("tap_vit_b")
    known = {1: (2.9, 0.11), 16: (34, 1.7), 64: (132, 7.0), 256: (526, 28)}
    for prompts, (decoder, text) in known.items():
        work = graph_works(config, prompts=prompts, points=2, slots=20)
        assert work[graphs.PROMPT_DECODER].flops / 1e9 == pytest.approx(decoder, rel=0.05)
        assert work[graphs.TEXT_DECODER].flops / 1e9 == pytest.approx(text, rel=0.05)


def test_kernels_of_the_text_decoder(works, micro_config):
    # Four products, two norms and an attention a layer; prefix, last norm, logits, top-k.
    assert len(works[graphs.TEXT_DECODER].kernels) == 7 * micro_config.text_depth + 4


def test_the_encoder_reads_and_writes_each_activation_of_its_products(works, micro_config):
    c = micro_config
    side = c.grid_size**2 * c.encoder_dim  # one activation of full width
    norms = 2 * (2 * c.encoder_depth + 1)
    # Read and written: qkv 1 + 3, attention 3 + 1, proj 1 + 1, fc1 1 + 4, fc2 4 + 1.
    blocks = c.encoder_depth * (4 + 4 + 2 + 5 + 5)
    bottlenecks = 4 * (1.5 + 1 + 1.5)
    ends = c.image_size**2 * 3 + side + side + 3 * c.grid_size**2 * c.image_embed_dim
    moved = (norms + blocks + bottlenecks) * side + ends
    assert works[graphs.IMAGE_ENCODER].moved_elements == moved


# By a walk over the exported graphs that followed every value from the node that makes it to the
# last one that reads it. Model, points -> elements of the encoder, of the prompt decoder for one
# prompt of 64 (or of 4 or 2), of the text decoder for one of 64. Element-wise operators reuse an
# input that nothing else reads, and matrix products read transposed inputs in place.
WALKED = {
    ("tap_micro", 16): (1_572_864, 12_583_424 / 64, 1_372_265 / 64),
    ("tap_micro", 64): (1_572_864, 1_197_640 / 4, 1_372_265 / 64),
    ("tap_demo", 16): (393_216, 8_085_504 / 64, 2_056_297 / 64),
    ("tap_demo", 64): (393_216, 972_288 / 4, 2_056_297 / 64),
    ("tap_vit_b", 16): (25_165_824, 6_291_520 / 2, 31_690_857 / 64),
}


@pytest.mark.parametrize(("model", "points"), WALKED)
def test_most_activations_that_are_alive_at_once(micro_config, model, points):
    c = micro_config if model == "tap_micro" else TapConfig.from_name(model)
    encoder, prompt, text = WALKED[model, points]
    found = {
        name: work.peak_elements
        for name, work in graph_works(c, prompts=1, points=points, slots=40).items()
    }
    assert found[graphs.IMAGE_ENCODER] == encoder
    assert found[graphs.PROMPT_DECODER] == pytest.approx(prompt, rel=0.015)
    # The walk freed the cache layer by layer; it is an input, and counted apart.
    cache = math.prod(graphs.kv_cache_shape(c, 1, 40))
    assert found[graphs.TEXT_DECODER] + cache == pytest.approx(text, rel=0.03)


def test_int8_covers_the_products_with_stored_weights(works):
    for work in works.values():
        assert 0 < work.int8_flops < work.flops
        assert not any(name.endswith(".attn") for name in work.in_int8)


@pytest.mark.parametrize("attention", [False, True])
def test_int8_covers_what_is_quantized(micro_bundle, micro_config, counted, attention):
    ir = pytest.importorskip("onnx_ir")
    from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes

    nodes = {}
    for name in graphs.GRAPH_NAMES:
        model = ir.load(micro_bundle.variant("fp32").path(name))
        nodes[name] = ChosenNodes.default(model, attention=attention, residuals=True).nodes
    works = graph_works(micro_config, prompts=P, points=N, slots=T, quantized=nodes)
    for name, work in works.items():
        kernels = {node.partition("/")[0] for node in nodes[name] if "/Add" not in node}
        assert work.int8_flops == sum(counted[name][kernel] for kernel in kernels)
    encoder = works[graphs.IMAGE_ENCODER]
    assert ("blocks.0.attn" in encoder.in_int8) == attention
    assert "patch_embed" not in encoder.in_int8  # kept wider by default
    everything = graph_works(micro_config, prompts=P, points=N, slots=T)[graphs.IMAGE_ENCODER]
    patches = 3 * micro_config.patch_size**2 * micro_config.encoder_dim
    left = everything.int8_weight_elements - encoder.int8_weight_elements
    assert left == patches
