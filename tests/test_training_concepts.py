"""The concept space of the scenes."""

from __future__ import annotations

import numpy as np
import pytest

from tap_deploy.errors import InputError
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES
from tap_deploy.training.words import concept_space
from tap_deploy.training.words.concept_space import (
    CONCEPT_SIZE,
    LOGIT_SCALE,
    SENTENCE_SIZE,
    concept_vocabulary,
    load_projection,
    sentence_from_name,
    weights_from_sentences,
)


def test_there_is_a_vector_for_every_name_of_the_scenes():
    vocabulary = concept_vocabulary()
    assert vocabulary.names == OBJECT_NAMES
    assert vocabulary.weights.shape == (CONCEPT_SIZE, len(OBJECT_NAMES))
    lengths = np.linalg.norm(vocabulary.weights, axis=0)
    np.testing.assert_allclose(lengths, LOGIT_SCALE, rtol=1e-5)


def test_a_perfect_embedding_is_sure_of_its_name():
    vocabulary = concept_vocabulary()
    probabilities = vocabulary.scores(np.ascontiguousarray(vocabulary.weights.T))
    assert np.diag(probabilities).min() > 0.97


@pytest.mark.parametrize(
    ("name", "relative", "stranger"),
    [("apple", "pear", "bus"), ("guitar", "saxophone", "cheese"), ("cat", "tiger", "bucket"),
     ("car", "truck", "owl"), ("dress", "t-shirt", "hot dog")],
)  # fmt: skip
def test_related_names_lie_near_each_other(name, relative, stranger):
    columns = [OBJECT_NAMES.index(word) for word in (name, relative, stranger)]
    here, near, far = concept_vocabulary().weights.T[columns]
    assert here @ near > here @ far + 0.15 * LOGIT_SCALE**2


def test_names_come_in_the_order_of_the_scenes(monkeypatch):
    weights = concept_vocabulary().weights
    monkeypatch.setattr(concept_space, "OBJECT_NAMES", ("owl", "apple"))
    turned = concept_vocabulary()
    assert turned.names == ("owl", "apple")
    columns = [OBJECT_NAMES.index(name) for name in turned.names]
    np.testing.assert_array_equal(turned.weights, weights[:, columns])


def test_a_name_without_a_vector(monkeypatch):
    monkeypatch.setattr(concept_space, "OBJECT_NAMES", ("apple", "unicorn"))
    with pytest.raises(InputError, match=r"such as 'unicorn'.*scripts/make_concepts.py"):
        concept_vocabulary()


def test_sentences_lead_into_the_space():
    mean, projection = load_projection()
    assert mean.shape == (SENTENCE_SIZE,) and projection.shape == (SENTENCE_SIZE, CONCEPT_SIZE)
    wide = projection.astype(np.float64)
    np.testing.assert_allclose(wide.T @ wide, np.eye(CONCEPT_SIZE), atol=2e-3)
    sentences = mean + np.stack([projection[:, 3], -2 * projection[:, 5]])
    expected = np.zeros((CONCEPT_SIZE, 2))
    expected[3, 0], expected[5, 1] = LOGIT_SCALE, -LOGIT_SCALE
    weights = weights_from_sentences(sentences, mean, projection)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, atol=0.05)
    assert sentence_from_name("owl") == "a picture of an owl"
