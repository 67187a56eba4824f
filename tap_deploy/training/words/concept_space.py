"""The concept space of the scenes: a vector for every name, related names near each other.

A sentence encoder (all-MiniLM-L6-v2, Apache-2.0) has read "a picture of an apple" and so on. Its
vectors were centred, cut to 128 of 384 directions by principal components, and normalised. What
came out lies beside this file, so that neither training nor use needs the encoder;
``scripts/make_concepts.py`` makes it anew, or vectors for other names in the same space.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.training.scenes.captions import with_article
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES

CONCEPT_SIZE = 128  # E, the length of a semantic embedding
SENTENCE_SIZE = 384  # what the encoder gives
# Sharp enough that a perfect embedding gets 0.97 or more for its name even beside its nearest
# relative, and soft enough that relatives of the right answer are better than strangers.
LOGIT_SCALE = 20.0
SPACE_FILE = Path(__file__).with_name("concept_space.npz")


def concept_vocabulary() -> Vocabulary:
    """Return the vocabulary of ``OBJECT_NAMES``.

    Returns:
        weights float32 [128, K]: columns of length 1 times ``LOGIT_SCALE``.

    Raises:
        InputError: a name has no vector.
    """
    known = _known_vocabulary()
    columns = {name: column for column, name in enumerate(known.names)}
    missing = [name for name in OBJECT_NAMES if name not in columns]
    if missing:
        raise InputError(
            f"{len(missing)} names have no concept vector, {missing[0]!r} for one; expected some "
            f"of the {len(columns)} in {SPACE_FILE.name}: scripts/make_concepts.py makes others"
        )
    weights = known.weights[:, [columns[name] for name in OBJECT_NAMES]]
    return Vocabulary(weights=np.ascontiguousarray(weights), names=OBJECT_NAMES)


def sentence_from_name(name: str) -> str:
    """Return what the sentence encoder has to read for a name."""
    return f"a picture of {with_article(name)}"


def weights_from_sentences(
    sentences: npt.NDArray[np.floating[Any]],
    mean: npt.NDArray[np.floating[Any]],
    projection: npt.NDArray[np.floating[Any]],
) -> npt.NDArray[np.float32]:
    """Return concept weights, float32 [128, N], for vectors of the sentence encoder.

    Args:
        sentences: float [N, 384].
        mean: float [384], what the space is centred on.
        projection: float [384, 128], columns at right angles to each other.
    """
    directions = (sentences.astype(np.float64) - mean) @ projection.astype(np.float64)
    directions *= LOGIT_SCALE / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.ascontiguousarray(directions.T, np.float32)


def load_projection() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
    """Return what leads from sentences into the space: mean [384] and projection [384, 128]."""
    with np.load(SPACE_FILE, allow_pickle=False) as arrays:
        return arrays["mean"], arrays["projection"]


@functools.cache
def _known_vocabulary() -> Vocabulary:
    return Vocabulary.load(SPACE_FILE)
