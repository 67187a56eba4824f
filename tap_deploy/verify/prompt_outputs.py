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
    inputs = _inputs(session, point_coords, point_labels, image_embeddings)
    inputs[graphs.MASK_REQUEST] = request_candidates(prompts, config.num_mask_tokens)
    # In another order than the prompts, which a graph that ignores it does not follow.
    inputs[graphs.MASK_ROWS] = np.ascontiguousarray(mask_rows(prompts)[::-1])
    outputs = to_float32(session.run(inputs))
    outputs[graphs.LOW_RES_MASKS] = np.ascontiguousarray(outputs[graphs.LOW_RES_MASKS][::-1])
    answers = decode_answers(session, point_coords, point_labels, image_embeddings)
    return outputs | {graphs.MASK_INDEX: answers[graphs.MASK_INDEX]}


def decode_answers(
    session: Session,
    point_coords: np.ndarray,
    point_labels: np.ndarray,
    image_embeddings: np.ndarray,
) -> dict[str, np.ndarray]:
    """Run the prompt decoder for the token that it selects, as a predictor does.

    Returns:
        The outputs for that token, float32 ``[P, ...]``; ``iou_predictions`` of all tokens, ``[P,
        M]``; and ``mask_index``, int64 ``[P]``.

    Raises:
        SessionError: the graph fails to run.
    """
    prompts = len(point_labels)
    inputs = _inputs(session, point_coords, point_labels, image_embeddings)
    inputs[graphs.MASK_REQUEST] = request_answers(prompts)
    inputs[graphs.MASK_ROWS] = mask_rows(prompts)
    outputs = to_float32(session.run(inputs))
    answers = {n: a if n == graphs.IOU_PREDICTIONS else a[:, 0] for n, a in outputs.items()}
    return answers | {graphs.MASK_INDEX: answers[graphs.MASK_INDEX].astype(np.int64)}


def _inputs(
    session: Session,
    point_coords: np.ndarray,
    point_labels: np.ndarray,
    image_embeddings: np.ndarray,
) -> dict[str, np.ndarray]:
    inputs = {
        graphs.IMAGE_EMBEDDINGS: image_embeddings[:1],
        graphs.POINT_COORDS: point_coords,
        graphs.POINT_LABELS: point_labels,
    }
    return to_spec_dtypes(session.spec, inputs)
