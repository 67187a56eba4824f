"""Names, axes and dtypes of every graph input and output: the only place that spells them.

Symbolic axes are strings: ``B`` images, ``P`` prompts (regions), ``N`` points in a prompt,
``M`` masks asked for per prompt, ``T`` slots of the KV cache, ``K`` candidates that a token is
drawn from. Everything else is fixed by the config.
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

# An entry of ``mask_request``: the token that answers the prompt, by the rule of the reference.
ANSWERING_TOKEN = -1
# Most candidates that a token is drawn from where the temperature is above 0.
DRAW_CANDIDATES = 64

Axis = int | str


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: name, NumPy dtype name, axes (``str`` = dynamic)."""

    name: str
    dtype: str
    shape: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Positions and names of the axes that may change from call to call."""
        return {i: axis for i, axis in enumerate(self.shape) if isinstance(axis, str)}


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One of the three graphs."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def kv_cache_shape(config: TapConfig, num_prompts: int, num_slots: int) -> tuple[int, ...]:
    """Shape of a KV cache: ``[layers, 2 (K, V), P, heads, slots, head_dim]``.

    Keys and values of one layer lie together, and so do the slots of one head: products read
    them where they are.
    """
    heads, depth = config.text_heads, config.text_depth
    return (depth, 2, num_prompts, heads, num_slots, TEXT_HEAD_DIM)


def past_names(config: TapConfig) -> tuple[str, ...]:
    """Names of the inputs that hold the cache, in the order of its first two axes."""
    return tuple(
        f"{PAST_KEY_VALUES}.{layer}.{kind}"
        for layer in range(config.text_depth)
        for kind in ("key", "value")
    )


def draw_candidates(config: TapConfig) -> int:
    """Return how many candidates a token is drawn from."""
    return min(DRAW_CANDIDATES, config.vocab_size)


def graph_specs(config: TapConfig, float_dtype: str = "float32") -> dict[str, GraphSpec]:
    """Return the three graphs of a model.

    ``image_encoder``: ``images`` are uint8 BGR pictures in the model frame (scaled, padded);
    normalisation is inside.

    ``prompt_decoder``: the embeddings of **one** image and P prompts of N points each,
    ``point_coords`` XY in pixels of the model frame, ``point_labels`` as in ``PointLabel``.
    ``mask_request`` says which mask tokens' answers leave the graph: 0 … num_mask_tokens - 1, or
    ``ANSWERING_TOKEN`` for the one that answers the prompt. Only their masks are computed.
    ``mask_index`` names them, ``low_res_masks`` are logits, and ``iou_predictions`` are those of
    all tokens.

    ``text_decoder``: one autoregressive step for P regions. ``position`` counts from 0, where
    the visual prefix stands (``input_ids`` is ignored there); BOS stands at 1. Slots ``0 …
    position - 1`` of the cache are attended to, all others are masked, so that T may be any
    number >= max(1, position). ``present_key_values`` is the new slot, to be written to slot
    ``position`` before the next step. The next token is that of the K largest logits whose sum
    of logit and ``gumbel_noise`` is the largest: ``[P, 1]`` zeros take the best token, Gumbel
    noise times a temperature draws from the softmax at that temperature.

    Coordinates, labels, ids and positions keep their dtype in every precision; the other
    floats take ``float_dtype``.
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
        ),
        outputs=(
            TensorSpec(LOW_RES_MASKS, float_dtype, ("P", "M", low_res, low_res)),
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
