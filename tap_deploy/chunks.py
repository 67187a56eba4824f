"""Chunk sizes of graph calls under a memory limit, and the memory check for full-size masks."""

from __future__ import annotations

from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.graphs import draw_candidates
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import memory_of

BYTES_PER_FLOAT = 4
SMALL_BYTES = 1 << 28  # below this size, masks are allocated without querying free memory
EVEN_PROMPTS = 8  # threads share the products of single prompts: 7 prompts take almost as long as 8


def prompts_per_call(config: TapConfig, num_points: int, limit_bytes: int) -> int:
    """Return how many prompts of ``num_points`` points the prompt decoder may take, at least 1.

    A multiple of ``EVEN_PROMPTS`` if it is larger.
    """
    query = 2 * config.num_mask_tokens + 1 + num_points
    # Live floats per prompt and image token: copies of the image features (C each) and of the
    # upscaled map (2 C), two copies of the attention scores of one layer (heads x query), two of
    # the mask. The factor 7 was measured with onnxruntime; tests/test_full_size.py checks it.
    floats_per_token = 7 * config.image_embed_dim + 2 * config.prompt_decoder_heads * query + 32
    prompts = _at_least_one(limit_bytes, floats_per_token * config.grid_size**2)
    return prompts - prompts % EVEN_PROMPTS if prompts > EVEN_PROMPTS else prompts


def captions_per_call(config: TapConfig, limit_bytes: int) -> int:
    """Return how many captions the text decoder may write in one batch, at least 1."""
    cache = config.text_seq_len * config.text_depth * 2 * config.text_dim
    # The cache counts twice: growing it and dropping finished rows both copy it. Sampling holds
    # the noise of all steps, generated in float64.
    noise = 3 * config.text_seq_len * draw_candidates(config)
    return _at_least_one(limit_bytes, 2 * cache + config.vocab_size + noise)


def require_room_for_masks(count: int, height: int, width: int) -> None:
    """Check that masks bool [count, height, width] fit into free memory.

    Raises:
        InputError: the masks are larger than the available memory.
    """
    needed = count * height * width
    if needed < SMALL_BYTES:
        return
    available = memory_of(Host()).available_bytes
    if needed > available:
        raise InputError(
            f"{count} masks of {width} x {height} pixels take {needed / 1e9:.1f} GB; expected at "
            f"most {available / 1e9:.1f} GB, the free memory; pass masks='rle' for compact run "
            "lengths, or fewer prompts per call"
        )


def _at_least_one(limit_bytes: int, floats: int) -> int:
    return max(1, limit_bytes // (BYTES_PER_FLOAT * floats))
