"""The decode loop of the text decoder: the best token or a draw, and an early stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tap_deploy.config import TapConfig
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.caption_writer import CaptionWriter, finished_rows

if TYPE_CHECKING:  # the package of sessions imports this module
    from tap_deploy.sessions.contract import Session


class Captioner(CaptionWriter):
    """Writes captions with the step graph on host arrays.

    Once half of the rows have finished, these are dropped; that copies the cache, but at most once
    per halving.
    """

    def __init__(self, session: Session, config: TapConfig) -> None:
        super().__init__(config)
        self.session = session

    def _write(
        self, ids: np.ndarray, semantic_tokens: np.ndarray, noise: np.ndarray | None
    ) -> None:
        rows = np.arange(len(ids))  # the caption of each row of the batch
        steps = CaptionSteps(self.session, self.config, semantic_tokens)
        for position in range(1, ids.shape[1]):
            chances = None if noise is None else noise[position - 1, rows]
            ids[rows, position] = steps.step(ids[rows, position - 1], chances)
            finished = finished_rows(ids[rows])
            if finished.all():
                break
            if 2 * finished.sum() >= len(rows):
                steps.keep(~finished)
                rows = rows[~finished]
