"""The decode loop on host arrays, with an early stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tap_deploy.config import TapConfig
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.caption_writer import CaptionWriter, OnIds, finished_rows

if TYPE_CHECKING:  # avoids a circular import
    from tap_deploy.sessions.contract import Session


class Captioner(CaptionWriter):
    """Writes captions with the text decoder on host arrays.

    Drops finished rows once they are at least half of the batch, which bounds the number of cache
    copies to log2 of the batch size.
    """

    def __init__(self, session: Session, config: TapConfig) -> None:
        super().__init__(config)
        self.session = session

    def _write(
        self,
        ids: np.ndarray,
        semantic_tokens: np.ndarray,
        noise: np.ndarray | None,
        on_ids: OnIds,
    ) -> None:
        rows = np.arange(len(ids))  # row of ``ids`` for each remaining row of the batch
        steps = CaptionSteps(self.session, self.config, semantic_tokens)
        for position in range(1, ids.shape[1]):
            chances = None if noise is None else noise[position - 1, rows]
            ids[rows, position] = steps.step(ids[rows, position - 1], chances)
            on_ids(ids[:, : position + 1])
            finished = finished_rows(ids[rows])
            if finished.all():
                break
            if 2 * finished.sum() >= len(rows):
                steps.keep(~finished)
                rows = rows[~finished]
