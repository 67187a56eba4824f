"""CIDEr-D, the standard metric of region captions.

Vedantam, Zitnick and Parikh, *CIDEr: Consensus-based Image Description Evaluation*, CVPR 2015.
Candidate and reference are TF-IDF vectors of their n-grams, n from 1 to 4: each count times the
logarithm of the n-gram's rarity among all references. The score of an n is their cosine, with two
guards against gaming: counts of the candidate are clipped to those of the reference, and a
difference in length d costs a factor exp(-d^2 / (2 * 6^2)). The score of a caption is 10 times the
mean over n. As in the public COCO caption evaluation, counts are not divided by the length of the
caption.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence

from tap_deploy.errors import InputError
from tap_deploy.evaluation.words import words

MAX_N = 4
LENGTH_SIGMA = 6.0
SCALE = 10.0

NGram = tuple[str, ...]
Counts = collections.Counter[NGram]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each caption; identical captions usually give 10.

    Rarity is computed over the given references, so scores depend on the whole collection. Papers
    report the mean times 100.

    Args:
        candidates: one caption per region.
        references: one or more true captions per region.

    Raises:
        InputError: candidates and references differ in number, or a region has no reference.
    """
    if len(candidates) != len(references) or not all(references):
        raise InputError(
            f"{len(candidates)} captions and {len(references)} lists of references; expected one "
            "non-empty list per caption"
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
    """Return the number of regions whose references contain each n-gram."""
    frequency: Counts = collections.Counter()
    for region in references:
        frequency.update(set().union(*region))
    return frequency


def _similarity(
    candidate: Counts, truth: Counts, rarity: dict[NGram, float], unseen: float
) -> float:
    """Return the mean over n of the clipped cosines, times the length penalty."""
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
