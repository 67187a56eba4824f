"""Vocabularies: scores against golden data, files, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError, TapError

GOLDEN = Path(__file__).parent / "data" / "tap_micro_outputs.npz"


@pytest.fixture
def vocabulary() -> Vocabulary:
    weights = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    return Vocabulary(weights=weights, names=("cat", "dog", "Bär", "cat"))


def test_names_and_scores_equal_the_golden_ones() -> None:
    with np.load(GOLDEN) as golden:
        vocabulary = Vocabulary(
            weights=golden["concept_weights"], names=tuple(golden["concept_vocabulary"].tolist())
        )
        rows = np.arange(8)
        embeddings = golden["semantic_embeddings"][rows, golden["mask_index"]]
        ranking = vocabulary.top_k(embeddings, 3)
        names = [[name for name, _ in region] for region in ranking]
        scores = [[score for _, score in region] for region in ranking]
        assert names == golden["concept_names"].tolist()
        np.testing.assert_allclose(scores, golden["concept_scores"], rtol=0, atol=1e-5)


def test_scores_are_probabilities_whatever_the_length(vocabulary: Vocabulary) -> None:
    embeddings = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    scores = vocabulary.scores(embeddings)
    assert scores.dtype == np.float32
    assert scores.shape == (3, 4)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    for factor in (1e-20, 1e30):
        np.testing.assert_allclose(
            vocabulary.scores(embeddings * np.float32(factor)), scores, rtol=1e-5
        )


def test_large_weights_do_not_overflow() -> None:
    vocabulary = Vocabulary(weights=np.float32([[1e4, -1e4]]), names=("a", "b"))
    assert vocabulary.scores(np.float32([[1], [-1]])).tolist() == [[1, 0], [0, 1]]


def test_a_zero_embedding_scores_all_alike(vocabulary: Vocabulary) -> None:
    assert vocabulary.scores(np.zeros((1, 6), np.float32)).tolist() == [[0.25] * 4]
    # Of equals the earlier name comes first.
    ranking = vocabulary.top_k(np.zeros((1, 6), np.float32), 4)
    assert [name for name, _ in ranking[0]] == ["cat", "dog", "Bär", "cat"]


def test_no_regions(vocabulary: Vocabulary) -> None:
    assert vocabulary.scores(np.zeros((0, 6), np.float32)).shape == (0, 4)
    assert vocabulary.top_k(np.zeros((0, 6), np.float32), 2) == []


def test_top_k_stops_at_the_vocabulary(vocabulary: Vocabulary) -> None:
    ranking = vocabulary.top_k(np.ones((2, 6), np.float32), 99)
    assert [len(region) for region in ranking] == [4, 4]
    scores = [score for _, score in ranking[0]]
    assert scores == sorted(scores, reverse=True)
    assert type(scores[0]) is float


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_below_one_is_refused(vocabulary: Vocabulary, k: int) -> None:
    with pytest.raises(InputError, match=f"top_k is {k}"):
        vocabulary.top_k(np.ones((2, 6), np.float32), k)


@pytest.mark.parametrize("shape", [(2, 5), (6,), (1, 2, 6)])
def test_embeddings_of_another_size_are_refused(
    vocabulary: Vocabulary, shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"expected \[P, 6\]"):
        vocabulary.scores(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("weights", "names", "word"),
    [
        (np.ones((6, 3), np.float32), ("a", "b"), "2 concept names"),
        (np.ones((6, 3), np.float64), ("a", "b", "c"), "float64"),
        ([[1.0]], ("a",), "list"),
        (np.ones(3, np.float32), ("a", "b", "c"), r"\[3\]"),
        (np.ones((6, 0), np.float32), (), "at least one"),
        (np.full((6, 1), np.nan, np.float32), ("a",), "NaN"),
        (np.ones((6, 1), np.float32), (7,), "text"),
    ],
)
def test_what_is_no_vocabulary_is_refused(weights: Any, names: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Vocabulary(weights=weights, names=names)


def test_a_saved_vocabulary_comes_back(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "concepts.npz"
    vocabulary.save(path)
    vocabulary.save(path)  # over itself
    loaded = Vocabulary.load(path)
    np.testing.assert_array_equal(loaded.weights, vocabulary.weights)
    assert loaded.names == vocabulary.names
    assert [file.name for file in tmp_path.iterdir()] == ["concepts.npz"]


def test_official_pickles_are_read(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "concepts.pkl"
    for dtype in (np.float32, np.float16):
        content = [vocabulary.weights.astype(dtype), list(vocabulary.names)]
        path.write_bytes(pickle.dumps(content))
        loaded = Vocabulary.load(path)
        assert loaded.weights.dtype == np.float32
        np.testing.assert_array_equal(loaded.weights, content[0])
        assert loaded.names == vocabulary.names


@pytest.mark.parametrize(
    "content",
    [
        {"weights": 1},
        [np.ones((2, 2), np.float32)],
        [["a"], ["b"]],
        [np.ones((2, 2), np.float32), "ab"],
        [np.ones((2, 2), np.float32), ["a"]],
        [np.ones((2, 2), np.float32), [1, 2]],
        [np.ones((2, 2), np.int64), ["a", "b"]],
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "concepts.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"concepts\.pkl"):
        Vocabulary.load(path)


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "concepts.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "owned") + b"'\ntR.")
    with pytest.raises(TapError):
        Vocabulary.load(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": np.ones((2, 2), np.float32)},
        {"names": np.array(["a"])},
        {"weights": np.ones((2, 2), np.float32), "names": np.array(["a", "b"], object)},
        {"weights": np.ones((2, 2), np.float32), "names": np.array([1, 2])},
        {"weights": np.ones((2, 2), np.float32), "names": np.array("ab")},
        {"weights": np.ones((2, 2), np.int32), "names": np.array(["a", "b"])},
        {"weights": np.ones((2, 2), np.float32), "names": np.array(["a", "b", "c"])},
    ],
)
def test_archives_of_something_else_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "concepts.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"concepts\.npz") as caught:
        Vocabulary.load(path)
    assert "\n" not in str(caught.value)


def test_broken_archives_are_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "concepts.npz"
    vocabulary.save(path)
    content = path.read_bytes()
    middle = len(content) // 3
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    for broken in (b"", b"text", content[: len(content) // 2], changed):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"concepts\.npz"):
            Vocabulary.load(path)
    with path.open("wb") as file:
        np.save(file, vocabulary.weights)
    with pytest.raises(InputError, match=r"not an \.npz archive"):
        Vocabulary.load(path)


def npz_entry(shape: tuple[int, ...], dtype: str) -> bytes:
    """An array with a declared shape and no data."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


@pytest.mark.parametrize("shape", [(2**24, 2**24), (2**40, 2**40), (10**6, 10**30)])
@pytest.mark.parametrize("dtype", ["<f4", "<U9"])
def test_a_shape_beyond_all_memory_is_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    path = tmp_path / "concepts.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", npz_entry(shape, dtype))
        archive.writestr("names.npy", npz_entry(shape, dtype))
    with pytest.raises(InputError, match=r"concepts\.npz cannot be read") as caught:
        Vocabulary.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["npz", "pkl"])
def test_weights_beyond_float32_are_refused_without_a_warning(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"concepts.{suffix}"
    weights, names = np.array([[1e300, -1e39]]), ["a", "b"]
    if suffix == "npz":
        np.savez(path, weights=weights, names=np.array(names))
    else:
        path.write_bytes(pickle.dumps([weights, names]))
    with pytest.raises(InputError, match=r"concepts\.\w+: .* values beyond float32"):
        Vocabulary.load(path)


@pytest.mark.parametrize("suffix", ["npz", "pkl"])
def test_what_is_saved_is_loaded_again(vocabulary: Vocabulary, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"concepts.{suffix}"
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.names == vocabulary.names
    np.testing.assert_array_equal(loaded.weights, vocabulary.weights)
    if suffix == "pkl":  # as the published code reads such a file
        weights, names = pickle.loads(path.read_bytes())
        assert weights.dtype == np.float32 and list(names) == list(vocabulary.names)


def test_missing_and_other_files_are_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        Vocabulary.load(tmp_path / "missing.npz")
    (tmp_path / "concepts.txt").write_text("cat")
    with pytest.raises(InputError, match=r"neither .npz nor .pkl"):
        Vocabulary.load(tmp_path / "concepts.txt")
    with pytest.raises(InputError, match=r"expected '.npz' or '.pkl'"):
        vocabulary.save(tmp_path / "concepts.json")
    with pytest.raises(InputError, match=r"concepts\.npz"):
        vocabulary.save(tmp_path / "missing" / "concepts.npz")


def test_a_group_of_names_gets_one_name(vocabulary: Vocabulary) -> None:
    merged = vocabulary.merged({"pet": ["cat", "dog"]})
    assert merged.names == ("pet", "pet", "Bär", "pet")
    embeddings = np.random.default_rng(4).normal(size=(20, 6)).astype(np.float32)
    pets = vocabulary.scores(embeddings)[:, [0, 1, 3]].sum(axis=1)
    for threshold in (0.6, 0.8):
        found = merged.matches(["pet"], embeddings, threshold)
        assert found.tolist() == (pets >= threshold).tolist()
        assert 0 < found.sum() < 20
    # A new name may be one of its members, and groups may swap names.
    assert vocabulary.merged({"dog": ["cat", "dog"]}).names == ("dog", "dog", "Bär", "dog")
    assert vocabulary.merged({"dog": ["cat"], "cat": ["dog"]}).names == ("dog", "cat", "Bär", "dog")
    assert vocabulary.merged({}).names == vocabulary.names


def test_new_names_from_a_table(vocabulary: Vocabulary, tmp_path: Path) -> None:
    table = Vocabulary(weights=np.ones((6, 2), np.float32), names=("drone", "mast"))
    table.save(tmp_path / "more.npz")
    extended = vocabulary.extended(Vocabulary.load(tmp_path / "more.npz"))
    assert extended.names == ("cat", "dog", "Bär", "cat", "drone", "mast")
    np.testing.assert_array_equal(extended.weights[:, :4], vocabulary.weights)
    np.testing.assert_array_equal(extended.weights[:, 4:], table.weights)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"pet": "cat"}, "members of 'pet' are 'cat'; expected a list of names"),
        ({"pet": []}, r"members of 'pet' are \[\]; expected a list of names"),
        ({"pet": ["cow"]}, "'cow' is none of the 4 names of the vocabulary; it has nothing sim"),
        ({"pet": ["cat"], "mog": ["cat"]}, "'cat' is in 'pet' and in 'mog'; expected one group"),
        ({"Bär": ["cat"]}, "'Bär' is a name already; expected a new name, or its members"),
    ],
)
def test_wrong_groups(vocabulary: Vocabulary, groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vocabulary.merged(groups)


def test_wrong_tables(vocabulary: Vocabulary) -> None:
    with pytest.raises(InputError, match="both vocabularies have 'Bär'; expected new names"):
        vocabulary.extended(Vocabulary(weights=np.ones((6, 1), np.float32), names=("Bär",)))
    with pytest.raises(InputError, match="have 5 rows; expected 6, like those"):
        vocabulary.extended(Vocabulary(weights=np.ones((5, 1), np.float32), names=("new",)))


def test_matches(vocabulary: Vocabulary) -> None:
    embeddings = np.random.default_rng(3).normal(size=(50, 6)).astype(np.float32)
    scores = vocabulary.scores(embeddings)
    cats = scores[:, 0] + scores[:, 3]  # the name has two columns
    expected = (cats >= 0.4) | (scores[:, 1] >= 0.4)
    assert 0 < expected.sum() < 50
    found = vocabulary.matches(["cat", "dog"], embeddings, 0.4)
    assert found.tolist() == expected.tolist()
    assert not vocabulary.matches([], embeddings, 0.0).any()


def test_unknown_names_come_with_similar_ones(vocabulary: Vocabulary) -> None:
    vocabulary.check_names(["cat", "Bär"])
    with pytest.raises(InputError, match=r"'BAR' is none of the 4 names .* it has 'Bär'; to add"):
        vocabulary.check_names(["cat", "BAR"])
