"""How many regions one call of a graph may take under a bound, and whether masks fit at all."""

from __future__ import annotations

from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.graphs import draw_candidates
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import memory_of

BYTES_PER_FLOAT = 4
SMALL_BYTES = 1 << 28  # masks that nobody asks a machine about


def prompts_per_call(config: TapConfig, num_points: int, limit_bytes: int) -> int:
    """Return how many prompts of ``num_points`` points the prompt decoder may take, at least 1."""
    query = 2 * config.num_mask_tokens + 1 + num_points
    # Alive at once per prompt and image token: copies of the image side (C floats each) and of
    # the upscaled map (2 C), the scores of one attention (heads x query) twice, the mask
    # twice. The factor 14 was measured with onnxruntime; tests/test_full_size.py holds it.
    floats_per_token = 14 * config.image_embed_dim + 2 * config.prompt_decoder_heads * query + 32
    return _at_least_one(limit_bytes, floats_per_token * config.grid_size**2)


def captions_per_call(config: TapConfig, limit_bytes: int) -> int:
    """Return how many captions the text decoder may write at once, at least 1."""
    cache = config.text_seq_len * config.text_depth * 2 * config.text_dim
    # Twice the cache: it grows, and finished rows are dropped, by copying it. Draws have the noise
    # of all steps, made as float64.
    noise = 3 * config.text_seq_len * draw_candidates(config)
    return _at_least_one(limit_bytes, 2 * cache + config.vocab_size + noise)


def require_room_for_masks(count: int, height: int, width: int) -> None:
    """Refuse masks bool [count, height, width] that would fill the memory, before the work.

    Raises:
        InputError: there is less memory left.
    """
    needed = count * height * width
    if needed < SMALL_BYTES:
        return
    available = memory_of(Host()).available_bytes
    if needed > available:
        raise InputError(
            f"{count} masks of {width} x {height} pixels take {needed / 1e9:.1f} GB of memory, of "
            f"which {available / 1e9:.1f} GB are free; pass masks='rle' for run lengths, which "
            "take little, or fewer prompts a call"
        )


def _at_least_one(limit_bytes: int, floats: int) -> int:
    return max(1, limit_bytes // (BYTES_PER_FLOAT * floats))
