"""Recording of the comparisons of one verification."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tap_deploy.verify.comparison import END_TO_END, Comparison, compare, compare_choices
from tap_deploy.verify.tolerances import CAPTION_IDS, Tolerances


class ComparisonRecorder:
    """Makes comparisons and keeps them in order.

    Attributes:
        tolerances: output name -> tolerance.
        chained: output name -> tolerance of comparisons end to end.
        checks: all comparisons so far.
    """

    def __init__(
        self,
        tolerances: Tolerances,
        on_check: Callable[[Comparison], None] | None,
        chained: Tolerances | None = None,
    ) -> None:
        """Start without comparisons.

        Args:
            tolerances: output name -> tolerance.
            on_check: called with every comparison.
            chained: tolerances of comparisons end to end; None for the same.
        """
        self.tolerances = tolerances
        self.chained = tolerances if chained is None else chained
        self.checks: list[Comparison] = []
        self._on_check = on_check

    def add(
        self, graph: str, tensor: str, sample: str, actual: np.ndarray, expected: np.ndarray
    ) -> None:
        """Compare two arrays of any shape."""
        bound = (self.chained if graph == END_TO_END else self.tolerances)[tensor]
        self.record(compare(graph, tensor, sample, actual, expected, bound))

    def add_choice(
        self,
        graph: str,
        tensor: str,
        sample: str,
        actual: np.ndarray,
        expected: np.ndarray,
        margins: np.ndarray,
        scale: float,
    ) -> None:
        """Compare choices by the margins between their scores.

        Args:
            graph: name of the graph.
            tensor: name of the output.
            sample: name of the sample.
            actual: choices, int ``[...]``.
            expected: choices, int ``[...]``.
            margins: distance between the scores of both, see ``choice_margins``, float ``[...]``.
            scale: largest magnitude of the scores.
        """
        bound = (self.chained if graph == END_TO_END else self.tolerances)[tensor]
        differs = actual != expected
        where = np.argwhere(differs)
        note = ""
        if len(where):
            at = tuple(int(i) for i in where[0])
            note = (
                f"{len(where)} of {differs.size} differ, first at {list(at)}: {actual[at]}, "
                f"expected {expected[at]}, margin {margins[at]:.1e}"
            )
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
    ) -> None:
        """Compare each caption at the first token that differs; later tokens are ignored.

        Both captions have the same prefix up to that token, so the logits measured on the expected
        caption are those behind the choice.

        Args:
            graph: name of the graph.
            sample: name of the sample.
            actual: caption ids, int64 ``[P, T]``: BOS first, padding after EOS.
            expected: caption ids, as ``actual``.
            logits: logits measured on the expected caption, float32 ``[P, T - 1, V]``.
        """
        at_first = at_first_difference(actual, expected)
        # Elsewhere compare 0 with 0, because the padding id may lie outside the logits.
        choice, wanted = (np.where(at_first, ids[:, 1:], 0) for ids in (actual, expected))
        margins = choice_margins(logits, choice, wanted)
        scale = float(np.abs(logits).max(initial=0.0))
        self.add_choice(graph, CAPTION_IDS, sample, choice, wanted, margins, scale)

    def record(self, check: Comparison) -> None:
        """Store a comparison."""
        self.checks.append(check)
        if self._on_check is not None:
            self._on_check(check)


def at_first_difference(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return where captions ``[P, T]`` differ first, bool ``[P, T - 1]``: BOS is left out."""
    differs = actual[:, 1:] != expected[:, 1:]
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), -1)
    found: np.ndarray = np.arange(differs.shape[1]) == first[:, None]
    return found


def choice_margins(scores: np.ndarray, actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the distance between the scores of actual and expected choice, float64 ``[...]``.

    The absolute distance, so that a choice that scores lower than the expected one also counts as
    an error. Infinite for an actual choice that is not a candidate.
    """
    count = scores.shape[-1]
    picked = [
        np.take_along_axis(scores, np.clip(choice, 0, count - 1)[..., None], axis=-1)[..., 0]
        for choice in (actual, expected)
    ]
    margins: np.ndarray = np.abs(picked[0].astype(np.float64) - picked[1])
    margins[(actual < 0) | (actual >= count)] = np.inf
    return margins
