"""Golden samples of a user's pictures, with the answers of sessions as the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import Golden, GoldenSample, GoldenText, logit_digest
from tap_deploy.config import BOS_ID, TapConfig
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.contract import Session, to_float32, to_spec_dtypes
from tap_deploy.verify.prompt_outputs import decode_all_tokens


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptedPicture:
    """A picture in the model frame, with prompts.

    Attributes:
        name: name for reports.
        images: uint8 BGR ``[1, S, S, 3]``.
        prompts: coordinates, XY in pixels of the model frame, float32 ``[P, N, 2]``, and labels,
            int32 ``[P, N]``; one pair for each number of points, which answers depend on.
    """

    name: str
    images: np.ndarray
    prompts: Sequence[tuple[np.ndarray, np.ndarray]]


def golden_from_sessions(
    sessions: Mapping[str, Session], config: TapConfig, picture: PromptedPicture
) -> Golden:
    """Return a picture with the outputs of sessions, without tokens of the whole vocabulary.

    Args:
        sessions: the reference, one session per graph.
        config: sizes of the model.
        picture: picture and prompts.

    Raises:
        SessionError: a graph fails to run.
    """
    encoder = sessions[graphs.IMAGE_ENCODER]
    embeddings = to_float32(encoder.run({graphs.IMAGES: picture.images}))[graphs.IMAGE_EMBEDDINGS]
    samples, texts = [], []
    for coords, labels in picture.prompts:
        decoder = sessions[graphs.PROMPT_DECODER]
        outputs = decode_all_tokens(decoder, config, coords, labels, embeddings)
        tokens = outputs[graphs.SEMANTIC_TOKENS][np.arange(len(coords)), outputs["mask_index"]]
        text, ids = _greedy(sessions[graphs.TEXT_DECODER], config, tokens)
        sample = GoldenSample(
            picture=picture.name,
            images=picture.images,
            image_embeddings=embeddings,
            point_coords=coords,
            point_labels=labels,
            caption_ids=ids,
            **outputs,
        )
        samples.append(sample)
        texts.append(text)
    return Golden(samples=tuple(samples), captions=GoldenText.concatenate(texts))


def _greedy(
    session: Session, config: TapConfig, tokens: np.ndarray
) -> tuple[GoldenText, np.ndarray]:
    """Return the steps of greedy captions that do not stop at EOS, and their ids, ``[P, T]``."""
    inputs = to_spec_dtypes(session.spec, {graphs.SEMANTIC_TOKENS: tokens})
    steps = CaptionSteps(session, config, inputs[graphs.SEMANTIC_TOKENS])
    ids, digests = [np.full(len(tokens), BOS_ID, np.int64)], []
    for _ in range(config.max_new_tokens):
        ids.append(steps.step(ids[-1]).astype(np.int64))
        digests.append(logit_digest(steps.logits.astype(np.float32)))
    captions = np.stack(ids, axis=1)
    text = GoldenText(
        semantic_tokens=tokens,
        input_ids=captions[:, :-1],
        next_ids=captions[:, 1:],
        logit_digests=np.stack(digests, axis=1),
    )
    return text, captions
