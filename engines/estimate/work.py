"""Work of one call of a graph: operations, weights and activations, computed from the config.

The kernels mirror the graphs that ``tap-export export`` writes, with the names of their nodes; no
file is read. Like engine builders, the model fuses element-wise operators into the preceding matrix
product, and an attention into one kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from tap_deploy.config import (
    NUM_FEATURE_LEVELS,
    NUM_POINT_LABELS,
    PROMPT_DECODER_MLP_DIM,
    TEXT_HEAD_DIM,
    TapConfig,
)
from tap_deploy.graphs import IMAGE_ENCODER, PROMPT_DECODER, TEXT_DECODER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel launch.

    Attributes:
        name: name of its ONNX nodes, up to the slash.
        multiplications: multiplications of matrix products and convolutions; the rest is
            negligible.
        moved: activation elements read and written.
        weights: weight elements of a matrix product, which can be int8.
        other_weights: other weight elements read: biases, gains of norms.
    """

    name: str
    multiplications: int = 0
    moved: int = 0
    weights: int = 0
    other_weights: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphWork:
    """Work of one call of a graph at fixed sizes, in elements, independent of the precision.

    Attributes:
        graph: name of the graph.
        kernels: kernel launches, in order.
        in_int8: names of the kernels that run in int8.
        constant_elements: weight elements read by every call, in addition to those of kernels.
        table_elements: weight elements of lookup tables, of which a call reads only a few rows.
        peak_elements: peak of live activation elements, without inputs and outputs. An upper bound:
            it assumes that every attention stores its scores, which fused attention does not.
    """

    graph: str
    kernels: tuple[Kernel, ...]
    in_int8: frozenset[str]
    constant_elements: int
    table_elements: int
    peak_elements: int

    @property
    def flops(self) -> int:
        """Number of operations, two per multiplication."""
        return 2 * sum(kernel.multiplications for kernel in self.kernels)

    @property
    def int8_flops(self) -> int:
        """Number of operations in int8."""
        return 2 * sum(k.multiplications for k in self.kernels if k.name in self.in_int8)

    @property
    def read_weight_elements(self) -> int:
        """Weight elements read by a call."""
        read = sum(kernel.weights + kernel.other_weights for kernel in self.kernels)
        return self.constant_elements + read

    @property
    def weight_elements(self) -> int:
        """Weight elements stored in the plan."""
        return self.table_elements + self.read_weight_elements

    @property
    def int8_weight_elements(self) -> int:
        """Weight elements in int8."""
        return sum(kernel.weights for kernel in self.kernels if kernel.name in self.in_int8)

    @property
    def moved_elements(self) -> int:
        """Activation elements read and written by a call."""
        return sum(kernel.moved for kernel in self.kernels)


def graph_works(
    config: TapConfig,
    *,
    prompts: int,
    points: int,
    slots: int,
    quantized: Mapping[str, Collection[str]] | None = None,
) -> dict[str, GraphWork]:
    """Return the work of one call of each graph, for one image and one mask per prompt.

    Args:
        config: sizes of the model.
        prompts: P of the prompt decoder and the text decoder.
        points: N, padding included.
        slots: T, slots of the KV cache that a caption step reads.
        quantized: graph name -> names of the int8 nodes, as recorded in a bundle; None for all
            layers with weights.
    """
    works = (
        _encoder(config),
        _prompt_decoder(config, prompts, points),
        _text_decoder(config, prompts, slots),
    )
    if quantized is None:
        return {work.graph: work for work in works}
    return {
        work.graph: dataclasses.replace(work, in_int8=_kernel_names(quantized.get(work.graph, ())))
        for work in works
    }


def _kernel_names(nodes: Collection[str]) -> frozenset[str]:
    """Return the kernels of nodes, without Add nodes, whose arithmetic is negligible."""
    split = [node.rpartition("/") for node in nodes]
    return frozenset(kernel for kernel, _, operator in split if not operator.startswith("Add"))


def _work(
    graph: str, kernels: Iterator[Kernel], *, constants: int, tables: int, peak: int
) -> GraphWork:
    found = tuple(kernels)
    return GraphWork(
        graph=graph,
        kernels=found,
        in_int8=frozenset(kernel.name for kernel in found if kernel.weights),
        constant_elements=constants,
        table_elements=tables,
        peak_elements=peak,
    )


def _linear(
    name: str, rows: int, inputs: int, outputs: int, *, taps: int = 1, has_bias: bool = True
) -> Kernel:
    """Return the kernel of a Linear layer, or a convolution with ``taps``, on ``rows`` tokens."""
    weights = taps * inputs * outputs
    return Kernel(
        name=name,
        multiplications=rows * weights,
        moved=rows * (inputs + outputs),
        weights=weights,
        other_weights=outputs * has_bias,
    )


def _norm(name: str, rows: int, width: int) -> Kernel:
    return Kernel(name=name, moved=2 * rows * width, other_weights=2 * width)


def _attention(name: str, *, queries: int, seen: int, keys: int, width: int) -> Kernel:
    """Return the kernel of an attention in which each query sees ``seen`` of ``keys`` keys."""
    return Kernel(
        name=name,
        multiplications=2 * queries * seen * width,
        moved=2 * (queries + keys) * width,
    )


def _encoder(c: TapConfig) -> GraphWork:
    tokens, dim, seen = c.grid_size**2, c.encoder_dim, c.window_size**2
    side, scores = tokens * dim, tokens * seen * c.encoder_heads
    biases = c.encoder_depth * c.encoder_heads * seen**2
    return _work(
        IMAGE_ENCODER,
        _encoder_kernels(c),
        constants=tokens * dim + biases + 6,  # positions; 6: mean and std of the colour channels
        tables=0,
        # The largest of: the picture in two layouts; attention scores, residual stream, q, k and v;
        # residual stream, fused qkv, and q, k and v.
        peak=max(2 * 3 * c.image_size**2, scores + 4 * side, 7 * side),
    )


def _encoder_kernels(c: TapConfig) -> Iterator[Kernel]:
    tokens, dim, out = c.grid_size**2, c.encoder_dim, c.image_embed_dim
    yield _linear("patch_embed", tokens, 3 * c.patch_size**2, dim)
    for block in range(c.encoder_depth):
        at = f"blocks.{block}"
        yield _norm(f"{at}.norm1", tokens, dim)
        yield _linear(f"{at}.attn.qkv", tokens, dim, 3 * dim)
        yield _attention(
            f"{at}.attn", queries=tokens, seen=c.window_size**2, keys=tokens, width=dim
        )
        yield _linear(f"{at}.attn.proj", tokens, dim, dim)
        yield _norm(f"{at}.norm2", tokens, dim)
        yield from _mlp(f"{at}.mlp", tokens, dim, 4 * dim)
    yield _norm("norm", tokens, dim)
    for level in range(NUM_FEATURE_LEVELS):
        at = f"cross_conv.{level}"
        yield _linear(f"{at}.conv1", tokens, dim, dim // 2)
        yield _linear(f"{at}.conv2", tokens, dim // 2, dim // 2, taps=9)
        yield _linear(f"{at}.conv3", tokens, dim // 2, dim)
    yield _linear("lateral_conv", tokens, dim, out)
    yield _linear("output_conv", tokens, out, out, taps=9)


def _mlp(name: str, rows: int, dim: int, hidden: int) -> Iterator[Kernel]:
    yield _linear(f"{name}.fc1", rows, dim, hidden)
    yield _linear(f"{name}.fc2", rows, hidden, dim)


def _prompt_decoder(c: TapConfig, prompts: int, points: int) -> GraphWork:
    image, dim = c.grid_size**2, c.image_embed_dim
    queries = 2 * c.num_mask_tokens + 1 + points
    side, scores = image * dim, image * queries * c.prompt_decoder_heads
    # Queries and their positions. With an attention: its scores, and its queries per head. With the
    # MLP: a copy of the queries, and the hidden layer.
    attention = 2 * queries * dim + scores + c.prompt_decoder_heads * queries * dim
    mlp = 3 * queries * dim + queries * PROMPT_DECODER_MLP_DIM
    block = 2 * side + max(attention, mlp)  # the image and its keys
    return _work(
        PROMPT_DECODER,
        _prompt_decoder_kernels(c, prompts, points),
        # Positions of the image, the learned queries that every prompt starts with, columns of each
        # head, and biases of queries of the image.
        constants=side
        + (2 * c.num_mask_tokens + 1) * dim
        + (c.prompt_decoder_heads + c.prompt_decoder_depth - 1) * dim // 2,
        tables=NUM_POINT_LABELS * dim,
        peak=prompts * max(block, 3 * side),  # the image, once upscaled and twice, which is larger
    )


def _prompt_decoder_kernels(c: TapConfig, prompts: int, points: int) -> Iterator[Kernel]:
    dim, masks, image = c.image_embed_dim, c.num_mask_tokens, c.grid_size**2
    yield _linear("prompt_encoder", prompts * points, 2, dim // 2, has_bias=False)
    queries = 2 * masks + 1 + points
    for block in range(c.prompt_decoder_depth):
        yield from _two_way_block(c, block, prompts, queries)
    for at, tokens in (("final_iou", prompts), ("final", 2 * prompts)):  # IoU; mask and semantic
        yield from _token_to_image(c, f"decoder.transformer.{at}.attn", tokens, images=prompts)
        yield _norm(f"decoder.transformer.{at}.norm", tokens, dim)
    yield from _head("decoder.iou_pred", prompts, dim, dim, masks)
    for mask in range(masks):
        yield from _head(f"decoder.mask_pred.{mask}", prompts, dim, dim, dim // 8)
    pixels = prompts * image
    yield _linear("upscaler.up1", pixels, dim, dim)
    yield _norm("upscaler.norm", 4 * pixels, dim // 4)
    yield _linear("upscaler.up2", 4 * pixels, dim // 4, dim // 2)
    yield Kernel(
        name="upscaler",  # hypernetwork outputs of the masks times the upscaled image
        multiplications=16 * pixels * dim // 8,
        moved=16 * pixels * (dim // 8 + 1) + prompts * dim // 8,
    )
    yield from _head("decoder.sem_pred", prompts, dim, c.sem_embed_dim, c.sem_embed_dim)


def _two_way_block(c: TapConfig, block: int, prompts: int, queries: int) -> Iterator[Kernel]:
    at, dim, image = f"decoder.transformer.blocks.{block}", c.image_embed_dim, c.grid_size**2
    rows = prompts * queries
    for side in "qkv":
        yield _linear(f"{at}.self_attn.{side}_proj", rows, dim, dim)
    yield _attention(f"{at}.self_attn", queries=rows, seen=queries, keys=rows, width=dim)
    yield _linear(f"{at}.self_attn.proj", rows, dim, dim)
    yield _norm(f"{at}.norm1", rows, dim)
    if block:
        yield from _token_to_image(c, f"{at}.cross_attn_token_to_image", rows, images=prompts)
    else:
        yield from _token_to_shared_image(f"{at}.cross_attn_token_to_image", dim, rows, image)
    yield _norm(f"{at}.norm2", rows, dim)
    yield from _mlp(f"{at}.mlp", rows, dim, PROMPT_DECODER_MLP_DIM)
    yield _norm(f"{at}.norm3", rows, dim)
    yield from _image_to_token(
        c, f"{at}.cross_attn_image_to_token", prompts, queries, shares_image=block == 0
    )
    yield _norm(f"{at}.norm4", prompts * image, dim)


def _token_to_shared_image(at: str, dim: int, rows: int, image: int) -> Iterator[Kernel]:
    """Yield the kernels of an attention from tokens to one image, at half the width."""
    half = dim // 2
    yield _linear(f"{at}.q_proj", rows, dim, half)
    yield _linear(f"{at}.k_proj", image, dim, half)
    yield _linear(f"{at}.v_proj", image, dim, half)
    yield _attention(at, queries=rows, seen=image, keys=image, width=half)
    yield _linear(f"{at}.proj", rows, half, dim)


def _token_to_image(c: TapConfig, at: str, rows: int, *, images: int) -> Iterator[Kernel]:
    """Yield the kernels of an attention from tokens, one per head, to an image per prompt."""
    dim, per_head = c.image_embed_dim, rows * c.prompt_decoder_heads
    seen = c.grid_size**2
    yield _linear(f"{at}.q_proj", rows, dim, dim // 2)
    yield _linear(f"{at}.k_proj", per_head, dim // 2, dim, has_bias=False)
    yield _attention(at, queries=per_head, seen=seen, keys=images * seen, width=dim)
    yield _linear(f"{at}.v_proj", per_head, dim, dim // 2)
    yield _linear(f"{at}.proj", rows, dim // 2, dim)


def _image_to_token(
    c: TapConfig, at: str, prompts: int, queries: int, *, shares_image: bool
) -> Iterator[Kernel]:
    """Yield the kernels of an attention from an image to tokens, one per head."""
    dim, half, image = c.image_embed_dim, c.image_embed_dim // 2, c.grid_size**2
    rows, per_head = prompts * queries, prompts * queries * c.prompt_decoder_heads
    yield _linear(f"{at}.k_proj", rows, dim, half)
    if shares_image:
        yield _linear(f"{at}.q_proj", image, dim, half)
    else:
        yield _linear(f"{at}.q_proj", per_head, half, dim, has_bias=False)
    width = half if shares_image else dim  # of the scores; the values have the image's
    seen = _attention(
        at, queries=prompts * image, seen=per_head // prompts, keys=per_head, width=dim
    )
    scores = prompts * image * (per_head // prompts)
    yield dataclasses.replace(seen, multiplications=scores * (width + dim))
    yield _linear(f"{at}.v_proj", rows, dim, half)
    yield _linear(f"{at}.proj", per_head, half, dim)


def _head(at: str, rows: int, dim: int, hidden: int, out: int) -> Iterator[Kernel]:
    for layer, (inputs, outputs) in enumerate(((dim, hidden), (hidden, hidden), (hidden, out))):
        yield _linear(f"{at}.layers.{layer}", rows, inputs, outputs)


def _text_decoder(c: TapConfig, prompts: int, slots: int) -> GraphWork:
    return _work(
        TEXT_DECODER,
        _text_decoder_kernels(c, prompts, slots),
        constants=0,
        # Token embeddings, and rotation matrices of all positions.
        tables=c.vocab_size * c.text_dim + c.text_seq_len * TEXT_HEAD_DIM**2,
        # New slots of all layers, residual stream, fused qkv, and q, k and v.
        peak=prompts * c.text_dim * (2 * c.text_depth + 7),
    )


def _text_decoder_kernels(c: TapConfig, prompts: int, slots: int) -> Iterator[Kernel]:
    dim, rotation = c.text_dim, TEXT_HEAD_DIM**2
    yield _linear("encoder", prompts, c.image_embed_dim, dim, has_bias=False)
    for block in range(c.text_depth):
        at = f"blocks.{block}"
        yield _norm(f"{at}.norm1", prompts, dim)
        yield _linear(f"{at}.qkv", prompts, dim, 3 * dim)
        # q and k are rotated by a matrix product; every prompt has its own cache.
        seen = _attention(at, queries=prompts, seen=slots, keys=prompts * slots, width=dim)
        yield dataclasses.replace(
            seen,
            multiplications=seen.multiplications + 2 * prompts * dim * TEXT_HEAD_DIM,
            moved=seen.moved + 4 * prompts * dim + 2 * rotation,
        )
        yield _linear(f"{at}.proj", prompts, dim, dim)
        yield _norm(f"{at}.norm2", prompts, dim)
        yield from _mlp(f"{at}.mlp", prompts, dim, 4 * dim)
    yield _norm("norm", prompts, dim)
    yield _linear("text_proj", prompts, dim, c.vocab_size, has_bias=False)
    yield Kernel(name="TopK", moved=prompts * c.vocab_size)
