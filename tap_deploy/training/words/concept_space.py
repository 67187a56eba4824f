"""The concept space of the scenes: a vector per name, with related names close to each other.

A sentence encoder (all-MiniLM-L6-v2, Apache-2.0) encoded "a picture of an apple" and so on. Its
vectors were centred, reduced from 384 to 128 dimensions by PCA, and normalised. The result is
stored next to this file, so that neither training nor inference needs the encoder.
``scripts/make_concepts.py`` makes it, or vectors for other names in the same space.
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

CONCEPT_SIZE = 128  # size E of a semantic embedding
SENTENCE_SIZE = 384  # size of the encoder's vectors
# High enough that a perfect embedding gives its name a probability of at least 0.97 even with a
# close relative, and low enough that relatives of the true name score higher than other names.
LOGIT_SCALE = 20.0
SPACE_FILE = Path(__file__).with_name("concept_space.npz")


def concept_vocabulary() -> Vocabulary:
    """Return the vocabulary of ``OBJECT_NAMES``.

    Returns:
        The vocabulary; weights are unit columns times ``LOGIT_SCALE``, float32 [128, K].

    Raises:
        InputError: a name has no vector.
    """
    known = _known_vocabulary()
    columns = {name: column for column, name in enumerate(known.names)}
    missing = [name for name in OBJECT_NAMES if name not in columns]
    if missing:
        raise InputError(
            f"{len(missing)} names have no concept vector, such as {missing[0]!r}; expected names "
            f"in {SPACE_FILE.name}; make others with scripts/make_concepts.py"
        )
    weights = known.weights[:, [columns[name] for name in OBJECT_NAMES]]
    return Vocabulary(weights=np.ascontiguousarray(weights), names=OBJECT_NAMES)


def sentence_from_name(name: str) -> str:
    """Return the sentence to encode for a name."""
    return f"a picture of {with_article(name)}"


def weights_from_sentences(
    sentences: npt.NDArray[np.floating[Any]],
    mean: npt.NDArray[np.floating[Any]],
    projection: npt.NDArray[np.floating[Any]],
) -> npt.NDArray[np.float32]:
    """Return concept weights, float32 [128, N], for vectors of the sentence encoder.

    Args:
        sentences: vectors of the encoder, float [N, 384].
        mean: centre of the space, float [384].
        projection: orthogonal columns, float [384, 128].
    """
    directions = (sentences.astype(np.float64) - mean) @ projection.astype(np.float64)
    directions *= LOGIT_SCALE / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.ascontiguousarray(directions.T, np.float32)


def load_projection() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
    """Return mean float32 [384] and projection float16 [384, 128] of the concept space."""
    with np.load(SPACE_FILE, allow_pickle=False) as arrays:
        return arrays["mean"], arrays["projection"]


@functools.cache
def _known_vocabulary() -> Vocabulary:
    return Vocabulary.load(SPACE_FILE)
