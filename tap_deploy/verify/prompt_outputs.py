"""Runs the prompt decoder for all mask tokens, which a reference is compared on."""

from __future__ import annotations

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import TapConfig
from tap_deploy.masks import mask_rows, request_answers, request_candidates
from tap_deploy.sessions.contract import Session, to_float32, to_spec_dtypes


def decode_all_tokens(
    session: Session,
    config: TapConfig,
    point_coords: np.ndarray,
    point_labels: np.ndarray,
    image_embeddings: np.ndarray,
) -> dict[str, np.ndarray]:
    """Run the prompt decoder for all mask tokens, and for the token that it selects.

    Args:
        session: session of the prompt decoder.
        config: sizes of the model.
        point_coords: XY in pixels of the model frame, float32 ``[P, N, 2]``.
        point_labels: codes of ``PointLabel``, int32 ``[P, N]``.
        image_embeddings: float ``[B, C, grid, grid]``; the first entry is used.

    Returns:
        The outputs for all tokens, float32 ``[P, M, ...]``, and ``mask_index``, int64 ``[P]``, the
        token that the graph selects.

    Raises:
        SessionError: the graph fails to run.
    """
    prompts = len(point_labels)
    inputs = {
        graphs.IMAGE_EMBEDDINGS: image_embeddings[:1],
        graphs.POINT_COORDS: point_coords,
        graphs.POINT_LABELS: point_labels,
        # In another order than the prompts, which a graph that ignores it does not follow.
        graphs.MASK_ROWS: np.ascontiguousarray(mask_rows(prompts)[::-1]),
    }
    every, selected = (
        to_float32(
            session.run(to_spec_dtypes(session.spec, inputs | {graphs.MASK_REQUEST: request}))
        )
        for request in (
            request_candidates(prompts, config.num_mask_tokens),
            request_answers(prompts),
        )
    )
    every[graphs.LOW_RES_MASKS] = np.ascontiguousarray(every[graphs.LOW_RES_MASKS][::-1])
    return every | {graphs.MASK_INDEX: selected[graphs.MASK_INDEX][:, 0].astype(np.int64)}
