"""The vocabulary of concepts that regions are classified into."""

from __future__ import annotations

import dataclasses
import difflib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import InputError, require_share
from tap_deploy.storage.archives import arrays_from_npz
from tap_deploy.storage.files import atomic_file

_LAYOUT = "weights float [E, K] and K names of text"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """K concepts, each with a column of weights and a name.

    A column is the L2-normalised text embedding of the concept times the logit scale. Duplicate
    names are allowed: their columns may differ, and each column is scored separately.

    Attributes:
        weights: classifier weights, float32 [E, K]; E is the size of a semantic embedding.
        names: K names, one per column.

    Raises:
        InputError: wrong shape or dtype, no concepts, NaN or infinity, or not K names.
    """

    weights: npt.NDArray[np.float32]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, np.ndarray) or self.weights.dtype != np.float32:
            kind = getattr(self.weights, "dtype", type(self.weights).__name__)
            raise InputError(f"concept weights are {kind}; expected an array float32 [E, K]")
        if self.weights.ndim != 2 or 0 in self.weights.shape:
            raise InputError(
                f"concept weights have shape {list(self.weights.shape)}; expected [E, K] with "
                "at least one concept"
            )
        if len(self.names) != self.weights.shape[1]:
            raise InputError(
                f"{len(self.names)} concept names for weights {list(self.weights.shape)}; "
                f"expected {self.weights.shape[1]} names, one per column"
            )
        if not all(isinstance(name, str) for name in self.names):
            raise InputError("concept names are not all text; expected a tuple of str")
        if not np.isfinite(self.weights).all():
            raise InputError(
                "concept weights contain NaN, infinity or values beyond float32; expected finite "
                "numbers"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Load a vocabulary from ``.npz`` as written by ``save``, or from an official ``.pkl``.

        Pickles go through a restricted unpickler that only rebuilds arrays and plain containers.
        Weights of any float dtype are converted to float32.

        Raises:
            InputError: the file is missing, unreadable, of another type, or not a vocabulary.
            CheckpointError: the pickle is corrupt or unsafe.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"concepts {path} is not a file; check the path")
        if path.suffix == ".npz":
            weights, names = _arrays_from_npz(path)
        elif path.suffix == ".pkl":
            weights, names = _arrays_from_pickle(path)
        else:
            raise InputError(f"concepts {path} is neither .npz nor .pkl; expected one of them")
        array = np.asarray(weights)
        if array.dtype.kind != "f":
            raise InputError(f"concepts {path}: weights are {array.dtype}; expected {_LAYOUT}")
        with np.errstate(over="ignore"):  # overflow becomes infinity; the constructor rejects it
            weights = array.astype(np.float32, copy=False)
        try:
            return cls(weights=weights, names=tuple(names))
        except InputError as exc:
            raise InputError(f"concepts {path}: {exc}") from exc

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.npz`` with arrays ``weights`` and ``names``, or ``.pkl``.

        The pickle has the format of the published concept weights: a list of the weights, float32
        [E, K], and the list of names.

        Raises:
            InputError: unknown suffix, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".npz", ".pkl"):
            raise InputError(
                f"concepts {path}: suffix is {path.suffix!r}; expected '.npz' or '.pkl'"
            )
        with atomic_file(path) as partial, partial.open("wb") as file:
            if path.suffix == ".pkl":
                pickle.dump([self.weights, list(self.names)], file, protocol=4)
            else:
                np.savez(file, weights=self.weights, names=np.array(self.names))

    def extended(self, other: Vocabulary) -> Vocabulary:
        """Return a vocabulary with the names of another one after its own.

        Raises:
            InputError: the other was made for another model, or both have a name in common.
        """
        common = sorted({*self.names} & {*other.names})
        if common:
            raise InputError(
                f"both vocabularies have {common[0]!r}; expected new names; rename or remove it"
            )
        sizes = len(self.weights), len(other.weights)
        if sizes[0] != sizes[1]:
            raise InputError(
                f"concept weights have {sizes[1]} rows; expected {sizes[0]}, like those that they "
                "are added to; embed the names with the text encoder of this model"
            )
        weights = np.concatenate([self.weights, other.weights], axis=1)
        return Vocabulary(weights=weights, names=(*self.names, *other.names))

    def merged(self, groups: Mapping[str, Sequence[str]]) -> Vocabulary:
        """Return a vocabulary in which the members of each group share the name of the group.

        Columns stay as they are, so ``matches`` adds up the probabilities of the members, and
        ``top_k`` may list the name several times. A single column with the average of the members
        would fit each of them badly: see ``docs/pictures.md``.

        Args:
            groups: new name -> its members, names of this vocabulary.

        Raises:
            InputError: a group is empty, a member is unknown or in two groups, or a new name is
                already taken.
        """
        renamed: dict[str, str] = {}
        for group, members in groups.items():
            if isinstance(members, str) or not members:
                raise InputError(f"members of {group!r} are {members!r}; expected a list of names")
            self.check_names(members)
            for member in members:
                if renamed.setdefault(member, group) != group:
                    raise InputError(
                        f"{member!r} is in {renamed[member]!r} and in {group!r}; expected one group"
                    )
        taken = sorted({*groups} & ({*self.names} - {*renamed}))
        if taken:
            raise InputError(f"{taken[0]!r} is a name already; expected a new name, or its members")
        return dataclasses.replace(self, names=tuple(renamed.get(n, n) for n in self.names))

    def check_names(self, names: Sequence[str]) -> None:
        """Raise InputError unless every name is one of this vocabulary, exactly as spelled."""
        known = {*self.names}
        for name in names:
            if name not in known:
                by_lower = {other.lower(): other for other in self.names}
                close = difflib.get_close_matches(str(name).lower(), by_lower, 3)
                similar = ", ".join(repr(by_lower[other]) for other in close) or "nothing similar"
                raise InputError(
                    f"{name!r} is none of the {len(self)} names of the vocabulary; it has {similar}"
                    "; to add names, see Vocabulary.extended and Vocabulary.merged"
                )

    def matches(
        self,
        names: Sequence[str],
        embeddings: npt.NDArray[np.floating[Any]],
        threshold: float,
    ) -> npt.NDArray[np.bool_]:
        """Return for which embeddings one of the names is likely, bool [P].

        Args:
            names: names of this vocabulary. If it has a name several times, the probabilities of
                its columns are added up.
            embeddings: see ``scores``.
            threshold: smallest probability, 0 to 1.

        Raises:
            InputError: a name is unknown, the threshold is out of range, or E differs from the
                first axis of the weights.
        """
        self.check_names(names)
        require_share("threshold", threshold)
        scores, all_names = self.scores(embeddings), np.array(self.names)
        likely = np.zeros(len(scores), np.bool_)
        for name in names:
            likely |= scores[:, all_names == name].sum(axis=1) >= threshold
        return likely

    def scores(self, embeddings: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Return the probability of every concept, float32 [P, K]; each row sums to 1.

        Args:
            embeddings: semantic embeddings, float [P, E]. They are normalised first; a zero
                vector gives every concept the same probability.

        Raises:
            InputError: E differs from the first axis of the weights.
        """
        size, expected = list(embeddings.shape), self.weights.shape[0]
        if embeddings.ndim != 2 or embeddings.shape[1] != expected:
            raise InputError(
                f"semantic embeddings have shape {size}; expected [P, {expected}]: this vocabulary "
                "was made for another model"
            )
        wide = embeddings.astype(np.float64)  # squaring float32 can overflow
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        unit = (wide / np.where(length > 0, length, 1)).astype(np.float32)
        logits = unit @ self.weights  # [P, K]
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: npt.NDArray[np.float32] = exponents / exponents.sum(axis=1, keepdims=True)
        return probabilities

    def top_k(
        self, embeddings: npt.NDArray[np.floating[Any]], k: int
    ) -> list[list[tuple[str, float]]]:
        """Return the k most likely (name, probability) pairs of each region, best first.

        k is capped at the size of the vocabulary. Ties are broken by column order.

        Raises:
            InputError: k is less than 1, or E differs from the first axis of the weights.
        """
        if k < 1:
            raise InputError(f"top_k is {k}; expected at least 1")
        scores = self.scores(embeddings)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [(self.names[column], float(row[column])) for column in columns]
            for row, columns in zip(scores, order, strict=True)
        ]


def _arrays_from_npz(path: Path) -> tuple[Any, Any]:
    hint = f"expected {_LAYOUT}, as Vocabulary.save writes them"
    try:
        arrays = arrays_from_npz(path, ("weights", "names"))
    except ValueError as exc:
        raise InputError(f"concepts {path} cannot be read: {exc}; {hint}") from exc
    weights, names = arrays["weights"], arrays["names"]
    if names.ndim != 1 or names.dtype.kind != "U":
        raise InputError(f"concepts {path}: names are {names.dtype} {list(names.shape)}; {hint}")
    if weights.ndim != 2 or weights.shape[1] != len(names):  # before a list of many names is made
        raise InputError(
            f"concepts {path}: {len(names)} names for weights {list(weights.shape)}; {hint}"
        )
    return weights, names.tolist()


def _arrays_from_pickle(path: Path) -> tuple[Any, Any]:
    from tap_deploy.storage.unpickle import load_pickle  # only needed for the official files

    content: Any = load_pickle(path)
    if isinstance(content, (list, tuple)) and len(content) == 2:
        weights, names = content
        if isinstance(weights, np.ndarray) and isinstance(names, (list, tuple)):
            return weights, names
    raise InputError(
        f"concepts {path} contains a {type(content).__name__} that is not a vocabulary; expected a "
        f"list of {_LAYOUT}"
    )
