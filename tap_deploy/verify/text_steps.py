"""Runs the text decoder on given tokens, with a cache as a host and as a GPU holds it."""

from __future__ import annotations

import dataclasses

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenText, logit_digest
from tap_deploy.config import TapConfig
from tap_deploy.sessions.caption_steps import CaptionSteps, step_inputs
from tap_deploy.sessions.contract import Session, to_spec_dtypes
from tap_deploy.verify.recorder import choice_margins

# Magnitude of what the unused slots of a whole cache hold, about that of keys and values.
_RUBBISH = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextRun:
    """What the text decoder makes of given tokens.

    Attributes:
        next_ids: likeliest token after each of them, int64 ``[R, steps]``.
        logit_digests: float32 ``[R, steps, 16]``.
        margins: distance between the scores of ``next_ids`` and of the reference's tokens, float64
            ``[R, steps]``.
        scale: largest magnitude of the logits.
    """

    next_ids: np.ndarray
    logit_digests: np.ndarray
    margins: np.ndarray
    scale: float


def run_text(
    session: Session, config: TapConfig, text: GoldenText, *, whole_cache: bool
) -> TextRun:
    """Feed the tokens of ``text``, so that an early mismatch does not affect later steps.

    Args:
        session: session of the text decoder.
        config: sizes of the model.
        text: the tokens.
        whole_cache: hand all slots to every step, as a GPU does, with rubbish in those that the
            position hides. False hands over a cache that grows.

    Raises:
        SessionError: the graph fails to run.
    """
    most = session.limits.get("P", len(text.input_ids))
    runs = [
        _run(session, config, text.rows(slice(start, start + most)), whole_cache)
        for start in range(0, len(text.input_ids), most)
    ]
    return TextRun(
        next_ids=np.concatenate([run.next_ids for run in runs]),
        logit_digests=np.concatenate([run.logit_digests for run in runs]),
        margins=np.concatenate([run.margins for run in runs]),
        scale=max(run.scale for run in runs),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Tokens that the text decoder draws with given noise, and those that it should draw.

    Attributes:
        ids: its tokens, int64 ``[R]``.
        expected: tokens drawn on the host from its logits, int64 ``[R]``.
        margins: by how much the scores of ``ids`` miss the best ones, as a share of the largest
            magnitude of the scores of the row, float64 ``[R]``.
    """

    ids: np.ndarray
    expected: np.ndarray
    margins: np.ndarray


def draw_tokens(session: Session, config: TapConfig, text: GoldenText) -> Draws:
    """Draw a token for each row with noise, from hardly any to more than the logits differ by.

    Args:
        session: session of the text decoder.
        config: sizes of the model.
        text: its semantic tokens are used.

    Raises:
        SessionError: the graph fails to run.
    """
    tokens = text.semantic_tokens[: session.limits.get("P")]
    rows = len(tokens)
    candidates = session.limits.get("K", graphs.draw_candidates(config))
    noise = np.random.default_rng(rows).gumbel(size=(rows, candidates))
    noise = (noise * np.geomspace(0.1, 100, rows)[:, None]).astype(np.float32)
    cache = np.zeros(graphs.kv_cache_shape(config, rows, 1), np.float32)
    inputs = step_inputs(config, tokens, np.zeros(rows, np.int32), 0, cache, noise)
    outputs = session.run(to_spec_dtypes(session.spec, inputs))
    ids = outputs[graphs.NEXT_IDS].astype(np.int64)
    logits = outputs[graphs.LOGITS].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :candidates]
    values = np.take_along_axis(logits, order, axis=1)  # [R, K]
    scores = values + noise
    best = scores.argmax(axis=1)[:, None]
    # Equal logits may be in any order: a token is right with the noise of any candidate of its own
    # logit.
    own = np.take_along_axis(logits, np.clip(ids, 0, logits.shape[1] - 1)[:, None], axis=1)
    misses = np.maximum(np.abs(own - values), scores.max(axis=1, keepdims=True) - scores)
    return Draws(
        ids=ids,
        expected=np.take_along_axis(order, best, axis=1)[:, 0],
        margins=misses.min(axis=1) / np.abs(scores).max(axis=1),
    )


def logits_of(
    session: Session, config: TapConfig, semantic_tokens: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Return the logits after each of the given tokens, float32 ``[P, steps, V]``.

    Args:
        session: session of the text decoder.
        config: sizes of the model.
        semantic_tokens: float ``[P, C]``.
        ids: tokens at the positions 1, 2, …, int64 ``[P, steps]``.

    Raises:
        SessionError: the graph fails to run.
    """
    steps, logits = CaptionSteps(session, config, semantic_tokens), []
    for column in ids.T:
        steps.step(column)
        logits.append(steps.logits.astype(np.float32))
    return np.stack(logits, axis=1)


def _run(session: Session, config: TapConfig, text: GoldenText, whole_cache: bool) -> TextRun:
    decoder = (_WholeCache if whole_cache else CaptionSteps)(session, config, text.semantic_tokens)
    next_ids, digests, margins, scale = [], [], [], 0.0
    for step, column in enumerate(text.input_ids.T):
        ids = decoder.step(column).astype(np.int64)
        logits = decoder.logits.astype(np.float32)
        next_ids.append(ids)
        digests.append(logit_digest(logits))
        margins.append(choice_margins(logits, ids, text.next_ids[:, step]))
        scale = max(scale, float(np.abs(logits).max()))
    return TextRun(
        next_ids=np.stack(next_ids, axis=1),
        logit_digests=np.stack(digests, axis=1),
        margins=np.stack(margins, axis=1),
        scale=scale,
    )


class _WholeCache:
    """Decodes like ``CaptionSteps``, with all slots of the cache in every step."""

    def __init__(self, session: Session, config: TapConfig, semantic_tokens: np.ndarray) -> None:
        self._session, self._config, self._position = session, config, 0
        self._tokens = semantic_tokens
        shape = graphs.kv_cache_shape(config, len(semantic_tokens), config.text_seq_len)
        rng = np.random.default_rng(len(semantic_tokens))
        self._cache = rng.uniform(-_RUBBISH, _RUBBISH, shape).astype(np.float32)
        self.step(np.zeros(len(semantic_tokens), np.int32))

    def step(self, input_ids: np.ndarray) -> np.ndarray:
        """Run the next position and return the next tokens, int32 ``[P]``."""
        inputs = step_inputs(self._config, self._tokens, input_ids, self._position, self._cache)
        outputs = self._session.run(to_spec_dtypes(self._session.spec, inputs))
        self._cache[..., self._position, :] = outputs[graphs.PRESENT_KEY_VALUES]
        self._position += 1
        self.logits = outputs[graphs.LOGITS]
        return outputs[graphs.NEXT_IDS]
