"""The work counted from the graphs is the work that the architecture asks for."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxscript")

from tap_deploy import graphs
from tap_deploy.config import PROMPT_DECODER_MLP_DIM, TapConfig
from tap_deploy.engines.activations import peak_elements, traffic_elements
from tap_deploy.engines.products import product_of
from tap_deploy.engines.work import count_work
from tap_deploy.errors import BundleError
from tap_deploy.graphs import GraphSpec, TensorSpec


def encoder_flops(c: TapConfig) -> int:
    """By hand: patches, blocks, bottlenecks, neck; two operations a multiplication."""
    tokens, dim, out = c.grid_size**2, c.encoder_dim, c.image_embed_dim
    patches = tokens * dim * 3 * c.patch_size**2
    attention = 2 * tokens * c.window_size**2 * dim
    block = tokens * dim * dim * (3 + 1 + 4 + 4) + attention
    bottleneck = 2 * tokens * dim * dim // 2 + 9 * tokens * (dim // 2) ** 2
    neck = tokens * dim * out + 9 * tokens * out * out
    return 2 * (patches + c.encoder_depth * block + 4 * bottleneck + neck)


def prompt_decoder_flops(c: TapConfig, prompts: int, points: int, asked_for: int = 1) -> int:
    """By hand; what block 0 does with the image alone is done once for all prompts."""
    image, channels, masks = c.grid_size**2, c.image_embed_dim, c.num_mask_tokens
    query, half = 2 * masks + 1 + points, c.image_embed_dim // 2
    self_attention = 4 * query * channels**2 + 2 * query**2 * channels
    mlp = 2 * query * channels * PROMPT_DECODER_MLP_DIM
    on_image = image * channels * half  # one projection of the image side
    on_query = query * channels * half
    cross_products = 2 * query * image * half
    token_to_image = 2 * on_query + cross_products
    image_to_token = 2 * on_query + cross_products + on_image
    # k and v of the tokens' attention and q of the image's: shared in block 0 only.
    shared, own = 3 * on_image, (2 + 1 + 2) * on_image
    upscaler = image * channels**2 * 3 // 2 + asked_for * channels // 8 * 16 * image
    kernels = masks * (2 * channels**2 + channels * channels // 8)
    iou = 2 * channels**2 + channels * masks
    semantic = asked_for * (channels * c.sem_embed_dim + 2 * c.sem_embed_dim**2)
    fourier = points * 2 * half
    each = 2 * (self_attention + mlp + image_to_token) + 3 * token_to_image + own
    each += upscaler + kernels + iou + semantic + fourier
    return 2 * (shared + prompts * each)


def text_decoder_flops(c: TapConfig, prompts: int, slots: int) -> int:
    dim = c.text_dim
    rotation = 2 * dim * 64  # of q and k
    block = dim * dim * (3 + 1 + 4 + 4) + rotation + 2 * slots * dim
    prefix, logits = c.image_embed_dim * dim, dim * c.vocab_size
    return 2 * prompts * (prefix + c.text_depth * block + logits)


def counted(bundle, name, **sizes):
    return count_work(bundle.graph_path(name, "fp32"), bundle.graph_specs()[name], sizes)


@pytest.mark.parametrize("images", [1, 3])
def test_encoder(micro_bundle, micro_config, images):
    work = counted(micro_bundle, graphs.IMAGE_ENCODER, B=images)
    assert work.flops == images * encoder_flops(micro_config)


@pytest.mark.parametrize(("prompts", "points"), [(1, 2), (16, 2), (5, 7)])
def test_prompt_decoder(micro_bundle, micro_config, prompts, points):
    for asked_for in (1, 4):
        work = counted(micro_bundle, graphs.PROMPT_DECODER, P=prompts, N=points, M=asked_for)
        assert work.flops == prompt_decoder_flops(micro_config, prompts, points, asked_for)


@pytest.mark.parametrize(("prompts", "slots"), [(1, 1), (1, 40), (16, 20)])
def test_text_decoder(micro_bundle, micro_config, prompts, slots):
    work = counted(micro_bundle, graphs.TEXT_DECODER, P=prompts, T=slots, K=1)
    assert work.flops == text_decoder_flops(micro_config, prompts, slots)


def test_the_published_models():
    """The formulas above give the figures that are known of the published sizes."""
    known = {"tap_vit_b": 808, "tap_vit_l": 2702, "tap_vit_h": 5516}
    for name, gflop in known.items():
        assert encoder_flops(TapConfig.from_name(name)) / 1e9 == pytest.approx(gflop, rel=0.02)
    config = TapConfig.from_name("tap_vit_b")
    for prompts, gflop in {1: 3.7, 16: 47, 64: 187, 256: 744}.items():
        found = prompt_decoder_flops(config, prompts, 2, asked_for=4) / 1e9
        assert found == pytest.approx(gflop, rel=0.05)
    for prompts, gflop in {1: 0.11, 16: 1.7, 64: 7.0, 256: 28}.items():
        found = text_decoder_flops(config, prompts, 20) / 1e9
        assert found == pytest.approx(gflop, rel=0.05)


def test_weights_and_kernels_of_the_text_decoder(micro_bundle, micro_config):
    work = counted(micro_bundle, graphs.TEXT_DECODER, P=4, T=40, K=1)
    c = micro_config
    products = c.image_embed_dim * c.text_dim + c.text_depth * 12 * c.text_dim**2
    products += c.text_dim * c.vocab_size
    assert work.product_weight_elements == products
    table = c.vocab_size * c.text_dim  # rows are looked up, the table is not read
    # Rotations are looked up as well: a matrix of 64 x 64 a position.
    assert work.weight_elements - work.read_weight_elements == table + c.text_seq_len * 64**2
    # Four products, two norms and an attention a layer; prefix, last norm, logits, top-k.
    assert work.kernels == 7 * c.text_depth + 4


def test_the_encoder_reads_and_writes_each_activation_of_its_products(micro_bundle, micro_config):
    work = counted(micro_bundle, graphs.IMAGE_ENCODER, B=1)
    c = micro_config
    side = c.grid_size**2 * c.encoder_dim  # one activation of full width
    norms = 2 * (2 * c.encoder_depth + 1)
    # Read and written: qkv 1 + 3, attention 3 + 1, proj 1 + 1, fc1 1 + 4, fc2 4 + 1.
    blocks = c.encoder_depth * (4 + 4 + 2 + 5 + 5)
    bottlenecks = 4 * (1.5 + 1 + 1.5)
    ends = c.image_size**2 * 3 + side + side + 3 * c.grid_size**2 * c.image_embed_dim
    assert work.traffic_elements == (norms + blocks + bottlenecks) * side + ends


def test_masks_are_most_of_what_many_prompts_keep_alive(micro_bundle, micro_config):
    one = counted(micro_bundle, graphs.PROMPT_DECODER, P=1, N=2, M=1).peak_elements
    many = counted(micro_bundle, graphs.PROMPT_DECODER, P=64, N=2, M=1).peak_elements
    upscaled = micro_config.grid_size**2 * 16 * micro_config.image_embed_dim // 8
    assert many > 40 * one
    assert 64 * upscaled <= many <= 3 * 64 * upscaled


def test_a_quantized_product_is_seen(tmp_path):
    """Q/DQ nodes on both sides, the weight stored in INT8."""
    path, spec = tmp_path / "qdq.onnx", product_spec()
    ir.save(quantized_product(), path)
    work = count_work(path, spec, {"P": 5})
    assert work.quantized_flops == work.weighted_flops == work.flops == 2 * 5 * 8 * 6
    assert work.product_weight_elements == work.weight_elements == 8 * 6


def test_an_unquantized_graph_has_no_quantized_product(micro_bundle):
    work = counted(micro_bundle, graphs.TEXT_DECODER, P=1, T=1, K=1)
    assert work.quantized_flops == 0
    assert 0 < work.weighted_flops < work.flops


def test_convolutions():
    image = value("x", (1, 6, 10, 10))
    conv = ir.node("Conv", [image, weight("w", (8, 3, 3, 3))], name="conv", attributes={"group": 2})
    conv.outputs[0].shape = ir.Shape((1, 8, 8, 8))
    assert product_of(conv).flops == 2 * 8 * 64 * 3 * 9
    up = ir.node("ConvTranspose", [image, weight("u", (6, 4, 2, 2))], name="up")
    up.outputs[0].shape = ir.Shape((1, 4, 20, 20))
    assert product_of(up).flops == 2 * 6 * 100 * 4 * 4


def test_a_transposed_gemm():
    node = ir.node(
        "Gemm", [value("a", (7, 5)), weight("b", (7, 3))], name="gemm", attributes={"transA": 1}
    )
    node.outputs[0].shape = ir.Shape((5, 3))
    assert product_of(node).flops == 2 * 5 * 3 * 7


def test_memory_of_a_chain_is_its_widest_pair():
    """x 4 -> 100 -> in place -> 10: the wide one and its neighbour are alive together."""
    x = value("x", (1, 4))
    wide = ir.node("MatMul", [x, weight("w", (4, 100))], name="wide")
    relu = ir.node("Relu", [wide.outputs[0]], name="relu")
    narrow = ir.node("MatMul", [relu.outputs[0], weight("v", (100, 10))], name="narrow")
    for node, width in ((wide, 100), (relu, 100), (narrow, 10)):
        node.outputs[0].shape = ir.Shape((1, width))
    graph = ir.Graph([x], narrow.outputs, nodes=[wide, relu, narrow], name="chain")
    assert peak_elements(graph) == 110
    assert traffic_elements(graph) == 4 + 100 + 100 + 10


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "graph.onnx").write_bytes(b"\x00nothing")
    with pytest.raises(BundleError, match=r"graph\.onnx cannot be read as ONNX"):
        count_work(tmp_path / "graph.onnx", product_spec(), {"P": 1})


def test_a_shape_that_depends_on_values_is_not_guessed(tmp_path):
    x = value("x", (None, 8))
    x.name = "x"
    nonzero = ir.node("NonZero", [x], name="nonzero")
    cast = ir.node("Cast", nonzero.outputs, name="cast", attributes={"to": ir.DataType.FLOAT})
    product = ir.node("MatMul", [weight("w", (6, 2)), cast.outputs[0]], name="product")
    product.outputs[0].name = "y"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ir.save(model_of([x], [nonzero, cast, product], ["w"]), tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match="not known in numbers"):
        count_work(tmp_path / "graph.onnx", product_spec(), {"P": 1})


def value(name, shape):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def weight(name, shape, dtype=np.float32):
    tensor = ir.tensor(np.ones(shape, dtype), name=name)
    return ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def model_of(inputs, nodes, initializer_names):
    graph = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": 20}, name="graph")
    found = {v.name: v for node in nodes for v in node.inputs if v.name in initializer_names}
    for initializer in found.values():
        graph.register_initializer(initializer)
    return ir.Model(graph, ir_version=10)


def product_spec():
    return GraphSpec(
        "product",
        inputs=(TensorSpec("x", "float32", ("P", 8)),),
        outputs=(TensorSpec("y", "float32", ("P", 6)),),
    )


def quantized_product():
    x, scale, zero = value("x", (None, 8)), weight("scale", ()), weight("zero", (), np.int8)
    stored = weight("w", (8, 6), np.int8)
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name="q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name="dq")
    weights = ir.node("DequantizeLinear", [stored, scale, zero], name="dqw")
    product = ir.node("MatMul", [dequantize.outputs[0], weights.outputs[0]], name="product")
    product.outputs[0].name = "y"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    nodes = [quantize, dequantize, weights, product]
    assert math.prod(stored.shape.numpy()) == 48
    return model_of([x], nodes, ["scale", "zero", "w"])
