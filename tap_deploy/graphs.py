"""Names, axes and dtypes of every graph input and output.

Dynamic axes are strings: ``B`` images, ``P`` prompts (regions), ``N`` points per prompt,
``M`` requested masks per prompt, ``T`` slots of the KV cache, ``K`` candidates that a token is
drawn from. The config fixes all other axes.
"""

from __future__ import annotations

import dataclasses

from tap_deploy.config import TEXT_HEAD_DIM, TapConfig

IMAGE_ENCODER = "image_encoder"
PROMPT_DECODER = "prompt_decoder"
TEXT_DECODER = "text_decoder"
GRAPH_NAMES = (IMAGE_ENCODER, PROMPT_DECODER, TEXT_DECODER)

IMAGES = "images"
IMAGE_EMBEDDINGS = "image_embeddings"
POINT_COORDS = "point_coords"
POINT_LABELS = "point_labels"
MASK_REQUEST = "mask_request"
MASK_ROWS = "mask_rows"
LOW_RES_MASKS = "low_res_masks"
IOU_PREDICTIONS = "iou_predictions"
MASK_INDEX = "mask_index"
SEMANTIC_TOKENS = "semantic_tokens"
SEMANTIC_EMBEDDINGS = "semantic_embeddings"
INPUT_IDS = "input_ids"
POSITION = "position"
GUMBEL_NOISE = "gumbel_noise"
PAST_KEY_VALUES = "past_key_values"
NEXT_IDS = "next_ids"
LOGITS = "logits"
PRESENT_KEY_VALUES = "present_key_values"

# Value of ``mask_request`` that selects the mask token by the rule of the reference model.
ANSWERING_TOKEN = -1
# Top-k of sampling: a token is drawn from this many candidates when the temperature is above 0.
DRAW_CANDIDATES = 64

Axis = int | str


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One graph input or output.

    Attributes:
        name: name of the tensor.
        dtype: NumPy dtype name.
        shape: axes; an int is fixed, a str is the name of a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Positions and names of the dynamic axes."""
        return {i: axis for i, axis in enumerate(self.shape) if isinstance(axis, str)}


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one of the three graphs.

    Attributes:
        name: one of ``GRAPH_NAMES``.
        inputs: input tensors, in order.
        outputs: output tensors, in order.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def kv_cache_shape(config: TapConfig, num_prompts: int, num_slots: int) -> tuple[int, ...]:
    """Return the shape of a KV cache: ``[layers, 2 (K, V), P, heads, slots, head_dim]``.

    The keys (or values) of one layer are contiguous, and so are the slots of one head, so that
    attention reads them without a copy.
    """
    heads, depth = config.text_heads, config.text_depth
    return (depth, 2, num_prompts, heads, num_slots, TEXT_HEAD_DIM)


def past_names(config: TapConfig) -> tuple[str, ...]:
    """Return the names of the cache inputs, in the order of the cache's first two axes."""
    return tuple(
        f"{PAST_KEY_VALUES}.{layer}.{kind}"
        for layer in range(config.text_depth)
        for kind in ("key", "value")
    )


def draw_candidates(config: TapConfig) -> int:
    """Return the number of candidates that a token is drawn from."""
    return min(DRAW_CANDIDATES, config.vocab_size)


def graph_specs(config: TapConfig, float_dtype: str = "float32") -> dict[str, GraphSpec]:
    """Return the three graphs of a model.

    ``image_encoder``: ``images`` are uint8 BGR pictures in the model frame (scaled, padded). The
    graph normalises them.

    ``prompt_decoder``: takes the embeddings of **one** image and P prompts of N points each:
    ``point_coords`` XY in pixels of the model frame, ``point_labels`` as in ``PointLabel``.
    ``mask_request`` selects the mask tokens to output: 0 … num_mask_tokens - 1, or
    ``ANSWERING_TOKEN`` for the token that answers the prompt. ``mask_rows`` are the Q prompts, at
    least one, whose masks of these tokens are computed. ``mask_index`` holds the selected tokens,
    ``low_res_masks`` are logits, and ``iou_predictions`` cover all tokens.

    ``text_decoder``: one autoregressive step for P regions. ``position`` 0 is the visual prefix
    (``input_ids`` is ignored there), ``position`` 1 is BOS. The step attends to the cache slots
    ``0 … position - 1`` and masks all others, so T may be any number >= max(1, position).
    ``present_key_values`` is the new slot; the caller writes it to slot ``position`` before the
    next step. Among the K largest logits, the next token maximises logit plus ``gumbel_noise``:
    zeros ``[P, 1]`` give greedy decoding; Gumbel noise times a temperature draws from the softmax
    at that temperature.

    Coordinates, labels, ids, positions, noise and masks keep their dtype in every precision; all
    other floats are ``float_dtype``. Masks are float32 because the host would take longer to
    convert them than a GPU to compute them.
    """
    c, grid = config.image_embed_dim, config.grid_size
    size, low_res = config.image_size, config.low_res_mask_size
    embeddings = TensorSpec(IMAGE_EMBEDDINGS, float_dtype, ("B", c, grid, grid))
    one_image = dataclasses.replace(embeddings, shape=(1, c, grid, grid))
    encoder = GraphSpec(
        IMAGE_ENCODER,
        inputs=(TensorSpec(IMAGES, "uint8", ("B", size, size, 3)),),
        outputs=(embeddings,),
    )
    prompt_decoder = GraphSpec(
        PROMPT_DECODER,
        inputs=(
            one_image,
            TensorSpec(POINT_COORDS, "float32", ("P", "N", 2)),
            TensorSpec(POINT_LABELS, "int32", ("P", "N")),
            TensorSpec(MASK_REQUEST, "int32", ("P", "M")),
            TensorSpec(MASK_ROWS, "int32", ("Q",)),
        ),
        outputs=(
            TensorSpec(LOW_RES_MASKS, "float32", ("Q", "M", low_res, low_res)),
            TensorSpec(IOU_PREDICTIONS, float_dtype, ("P", config.num_mask_tokens)),
            TensorSpec(MASK_INDEX, "int32", ("P", "M")),
            TensorSpec(SEMANTIC_TOKENS, float_dtype, ("P", "M", c)),
            TensorSpec(SEMANTIC_EMBEDDINGS, float_dtype, ("P", "M", config.sem_embed_dim)),
        ),
    )
    past = ("P", config.text_heads, "T", TEXT_HEAD_DIM)
    present = (config.text_depth, 2, "P", config.text_heads, TEXT_HEAD_DIM)
    text_decoder = GraphSpec(
        TEXT_DECODER,
        inputs=(
            TensorSpec(SEMANTIC_TOKENS, float_dtype, ("P", c)),
            TensorSpec(INPUT_IDS, "int32", ("P",)),
            TensorSpec(POSITION, "int32", (1,)),
            TensorSpec(GUMBEL_NOISE, "float32", ("P", "K")),
            *(TensorSpec(name, float_dtype, past) for name in past_names(config)),
        ),
        outputs=(
            TensorSpec(NEXT_IDS, "int32", ("P",)),
            TensorSpec(LOGITS, float_dtype, ("P", config.vocab_size)),
            TensorSpec(PRESENT_KEY_VALUES, float_dtype, present),
        ),
    )
    return {g.name: g for g in (encoder, prompt_decoder, text_decoder)}
