"""Names, axes and dtypes of every graph input and output: the only place that spells them.

Symbolic axes are strings: ``B`` images, ``P`` prompts (regions), ``N`` points in a prompt,
``T`` past slots of the KV cache. Everything else is fixed by the config.
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
LOW_RES_MASKS = "low_res_masks"
IOU_PREDICTIONS = "iou_predictions"
SEMANTIC_TOKENS = "semantic_tokens"
SEMANTIC_EMBEDDINGS = "semantic_embeddings"
INPUT_IDS = "input_ids"
POSITION = "position"
PAST_KEY_VALUES = "past_key_values"
NEXT_IDS = "next_ids"
LOGITS = "logits"
PRESENT_KEY_VALUES = "present_key_values"

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


def kv_slot_shape(config: TapConfig, num_prompts: Axis) -> tuple[Axis, ...]:
    """Shape of one cache slot: ``[layers, 2 (K, V), P, heads, head_dim]``."""
    return (config.text_depth, 2, num_prompts, config.text_heads, TEXT_HEAD_DIM)


def kv_cache_shape(config: TapConfig, num_prompts: int) -> tuple[int, ...]:
    """Shape of a whole cache: one slot per position, ``[text_seq_len, *slot]``."""
    heads = (config.text_heads, TEXT_HEAD_DIM)
    return (config.text_seq_len, config.text_depth, 2, num_prompts, *heads)


def graph_specs(config: TapConfig, float_dtype: str = "float32") -> dict[str, GraphSpec]:
    """Return the three graphs of a model.

    ``image_encoder``: ``images`` are uint8 BGR pictures in the model frame (scaled, padded);
    normalisation is inside.

    ``prompt_decoder``: the embeddings of **one** image and P prompts of N points each,
    ``point_coords`` XY in pixels of the model frame, ``point_labels`` as in ``PointLabel``.
    ``low_res_masks`` are logits.

    ``text_decoder``: one autoregressive step for P regions. ``position`` counts from 0, where
    the visual prefix stands (``input_ids`` is ignored there); BOS stands at 1. The cache is
    sequence-major: slots ``0 … position - 1`` of ``past_key_values`` are attended to, all
    others are masked, so that T may be any number >= max(1, position): the exact past, a
    dummy slot at position 0, or a whole preallocated cache. ``present_key_values`` is the
    new slot, made to be written in place at slot ``position``.

    Coordinates, labels, ids and positions keep their dtype in every precision; the other
    floats take ``float_dtype``.
    """
    c, m, grid = config.image_embed_dim, config.num_mask_tokens, config.grid_size
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
        ),
        outputs=(
            TensorSpec(LOW_RES_MASKS, float_dtype, ("P", m, low_res, low_res)),
            TensorSpec(IOU_PREDICTIONS, float_dtype, ("P", m)),
            TensorSpec(SEMANTIC_TOKENS, float_dtype, ("P", m, c)),
            TensorSpec(SEMANTIC_EMBEDDINGS, float_dtype, ("P", m, config.sem_embed_dim)),
        ),
    )
    slot = kv_slot_shape(config, "P")
    text_decoder = GraphSpec(
        TEXT_DECODER,
        inputs=(
            TensorSpec(SEMANTIC_TOKENS, float_dtype, ("P", c)),
            TensorSpec(INPUT_IDS, "int32", ("P",)),
            TensorSpec(POSITION, "int32", (1,)),
            TensorSpec(PAST_KEY_VALUES, float_dtype, ("T", *slot)),
        ),
        outputs=(
            TensorSpec(NEXT_IDS, "int32", ("P",)),
            TensorSpec(LOGITS, float_dtype, ("P", config.vocab_size)),
            TensorSpec(PRESENT_KEY_VALUES, float_dtype, (1, *slot)),
        ),
    )
    return {g.name: g for g in (encoder, prompt_decoder, text_decoder)}
