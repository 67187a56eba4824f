"""Comparisons as they are made: what is held against what, within which bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tap_deploy.verify.comparison import Check, compare, compare_choices
from tap_deploy.verify.tolerances import CAPTION_IDS, Tolerances


class CheckRecorder:
    """Makes comparisons and keeps them, in order, in ``checks``."""

    def __init__(self, tolerances: Tolerances, on_check: Callable[[Check], None] | None) -> None:
        """Begin with none.

        Args:
            tolerances: by output.
            on_check: called with every comparison as it is made.
        """
        self.tolerances = tolerances
        self.checks: list[Check] = []
        self._on_check = on_check

    def add(
        self, graph: str, tensor: str, sample: str, actual: np.ndarray, expected: np.ndarray
    ) -> None:
        """Compare two arrays of any shape."""
        self.record(compare(graph, tensor, sample, actual, expected, self.tolerances[tensor]))

    def add_choice(
        self,
        graph: str,
        tensor: str,
        sample: str,
        actual: np.ndarray,
        expected: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Compare choices ``[...]`` that were made from measured scores ``[..., candidates]``."""
        bound = self.tolerances[tensor]
        if bound.max == 0:
            self.record(compare(graph, tensor, sample, actual, expected, bound))
            return
        differs = actual != expected
        margins = choice_margins(scores, actual, expected)
        where = np.argwhere(differs)
        note = ""
        if len(where):
            at = tuple(int(i) for i in where[0])
            note = (
                f"{len(where)} of {differs.size} differ, first at {list(at)}: {actual[at]}, "
                f"expected {expected[at]}, margin {margins[at]:.1e}"
            )
        scale = float(np.abs(scores).max(initial=0.0))
        self.record(
            compare_choices(
                graph, tensor, sample, actual.shape, margins[differs], scale, bound, note
            )
        )

    def add_captions(
        self,
        graph: str,
        sample: str,
        actual: np.ndarray,
        expected: np.ndarray,
        logits: np.ndarray,
        choices: np.ndarray | None = None,
    ) -> None:
        """Judge each caption at the token where it leaves the expected one; after it, anything.

        Up to there both have the same prefix, so the logits on the expected caption are those
        that the choice was made from.

        Args:
            graph: where it was written.
            sample: name of the sample.
            actual: ids int64 ``[P, T]``, BOS first, padded after EOS.
            expected: ids, as ``actual``.
            logits: float32 ``[P, T - 1, V]``, measured on the expected caption.
            choices: the best ids by these logits, ``[P, T]``, to be judged in place of those of
                ``actual``.
        """
        differs = actual[:, 1:] != expected[:, 1:]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), -1)
        at_first = np.arange(differs.shape[1]) == first[:, None]
        chosen = actual if choices is None else choices
        # Elsewhere nothing is compared: padding need not be an id that logits know.
        choice, wanted = (np.where(at_first, ids[:, 1:], 0) for ids in (chosen, expected))
        self.add_choice(graph, CAPTION_IDS, sample, choice, wanted, logits)

    def is_narrow(
        self, tensor: str, scores: np.ndarray, actual: np.ndarray, expected: np.ndarray
    ) -> np.ndarray:
        """Which choices ``[...]`` may be ``actual`` as well as ``expected``, bool ``[...]``."""
        bound = self.tolerances[tensor]
        most = bound.max * (float(np.abs(scores).max()) if bound.relative else 1.0)
        narrow: np.ndarray = choice_margins(scores, actual, expected) <= most
        return narrow

    def record(self, check: Check) -> None:
        """Keep a comparison."""
        self.checks.append(check)
        if self._on_check is not None:
            self._on_check(check)


def choice_margins(scores: np.ndarray, actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return how far apart the actual and the expected choice score, float64 ``[...]``.

    The distance, not the lead: a choice that is not even the best by its own scores is an error.
    It is infinite for what is no candidate at all.
    """
    count = scores.shape[-1]
    picked = [
        np.take_along_axis(scores, np.clip(choice, 0, count - 1)[..., None], axis=-1)[..., 0]
        for choice in (actual, expected)
    ]
    margins: np.ndarray = np.abs(picked[0].astype(np.float64) - picked[1])
    margins[(actual < 0) | (actual >= count)] = np.inf
    return margins
