"""CIDEr-D, the measure that captions of regions are commonly compared by.

Vedantam, Zitnick and Parikh, *CIDEr: Consensus-based Image Description Evaluation*, CVPR 2015.
Candidate and reference are vectors of their n-grams, n from 1 to 4, each count times the
logarithm of how rare the n-gram is among all references (TF-IDF). The score of an n is the
cosine of both, with two guards against gaming: a count of the candidate is worth no more than
that of the reference, and a difference in length d costs a factor exp(-d^2 / (2 * 6^2)). The
score of a caption is 10 times the mean over n; as in the public COCO caption evaluation, counts
are not divided by the length of the caption.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence

from tap_deploy.errors import InputError

MAX_N = 4
LENGTH_SIGMA = 6.0
SCALE = 10.0

NGram = tuple[str, ...]
Counts = collections.Counter[NGram]

# As the Penn Treebank tokenizer, for letters, digits, hyphens and apostrophes; punctuation is
# dropped afterwards in any case.
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*?(?=n't\b)|n't\b|'[^\W_]+|[^\W_]+(?:-[^\W_]+)*")


def words(caption: str) -> list[str]:
    """Split a caption as PTB does, in lower case and without punctuation.

    Hyphenated words stay whole; "n't" and what follows an apostrophe are words of their own.
    """
    return _WORD.findall(caption.lower())


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each caption; identical ones usually give 10.

    Rarity is counted over the references given, so scores depend on the whole collection. Papers
    report the mean times 100.

    Args:
        candidates: one caption a region.
        references: true captions of each region, one or more.

    Raises:
        InputError: another number of references than candidates, or a region without one.
    """
    if len(candidates) != len(references) or not all(references):
        raise InputError(
            f"{len(candidates)} captions and {len(references)} lists of references; expected one "
            "list for each, and none empty"
        )
    counted = [[_ngrams(text) for text in texts] for texts in references]
    frequency = _document_frequency(counted)
    log_regions = math.log(len(candidates)) if candidates else 0.0
    rarity = {ngram: log_regions - math.log(count) for ngram, count in frequency.items()}
    return [
        SCALE * _mean(_similarity(_ngrams(caption), truth, rarity, log_regions) for truth in truths)
        for caption, truths in zip(candidates, counted, strict=True)
    ]


def _ngrams(caption: str) -> Counts:
    split = words(caption)
    return collections.Counter(
        tuple(split[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(split) - n + 1)
    )


def _document_frequency(references: Sequence[Sequence[Counts]]) -> Counts:
    """Count in how many regions an n-gram occurs, in any of the references."""
    frequency: Counts = collections.Counter()
    for region in references:
        frequency.update(set().union(*region))
    return frequency


def _similarity(
    candidate: Counts, truth: Counts, rarity: dict[NGram, float], unseen: float
) -> float:
    """Return the mean over n of the clipped cosines, with the penalty for the length."""
    gap = _length(candidate) - _length(truth)
    penalty = math.exp(-(gap**2) / (2 * LENGTH_SIGMA**2))
    cosines = []
    for n in range(1, MAX_N + 1):
        found = _weighted(candidate, n, rarity, unseen)
        true = _weighted(truth, n, rarity, unseen)
        norms = math.hypot(*found.values()) * math.hypot(*true.values())
        dot = sum(min(found[ngram], true[ngram]) * true[ngram] for ngram in found.keys() & true)
        cosines.append(dot / norms if norms else 0.0)
    return penalty * _mean(cosines)


def _weighted(
    counts: Counts, n: int, rarity: dict[NGram, float], unseen: float
) -> dict[NGram, float]:
    return {
        ngram: count * rarity.get(ngram, unseen)
        for ngram, count in counts.items()
        if len(ngram) == n
    }


def _length(counts: Counts) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
