"""Progress reports of a run: a line of text, and a file of JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from tap_deploy.errors import InputError
from tap_deploy.storage.files import atomic_file
from tap_deploy.training.objective.objective import Losses
from tap_deploy.training.scores.evaluation import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Means:
    """Means of some steps: of each loss, and of the seconds."""

    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds_per_step: float = 0.0


class Progress:
    """Collects losses and writes reports.

    Args:
        path: file of JSON lines; reports are appended. Each contains ``step``, ``steps``,
            ``seconds_per_step``, ``losses`` (means since the last report) and ``held_out``.
        total_steps: length of the run, steps.
    """

    def __init__(self, path: str | os.PathLike[str], total_steps: int) -> None:
        self._path, self._total_steps = Path(path), total_steps
        self._restart()

    def add(self, losses: Losses) -> None:
        """Add the losses of one step."""
        for name, value in losses.terms().items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._last = time.monotonic()

    def means(self) -> Means:
        """Return the means of the steps since the last report."""
        count = max(1, self._count)
        return Means(
            losses={name: float(total) / count for name, total in self._sums.items()},
            seconds_per_step=(self._last - self._since) / count,
        )

    def report(self, step: int, means: Means, held_out: Scores) -> str:
        """Append a report to the file, reset the means, and return a line of text.

        Args:
            step: steps done.
            means: result of ``means``, perhaps in an earlier process.
            held_out: scores on validation scenes.
        """
        record = {
            "step": step,
            "steps": self._total_steps,
            "seconds_per_step": round(means.seconds_per_step, 4),
            "losses": {name: round(value, 5) for name, value in means.losses.items()},
            "held_out": held_out.to_dict(),
        }
        self._append(record)
        self._restart()
        return _line(step, self._total_steps, means, held_out)

    def _append(self, record: dict[str, Any]) -> None:
        before = self._path.read_text("utf-8") if self._path.exists() else ""
        with atomic_file(self._path) as partial:
            partial.write_text(f"{before}{json.dumps(record)}\n", "utf-8")

    def _restart(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}  # tensors: float() would sync the GPU
        self._count = 0
        self._since = self._last = time.monotonic()


def training_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state of a run from its file of JSON lines.

    Returns:
        ``step`` and ``steps`` of the last report, and ``hours`` of training up to it.

    Raises:
        InputError: the file does not exist or contains no report.
    """
    try:
        reports = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        last, seconds, step = reports[-1], 0.0, 0
        for report in reports:
            # A killed run repeats the steps after its last report.
            seconds += report["seconds_per_step"] * max(0, report["step"] - step)
            step = max(step, report["step"])
        return {"step": last["step"], "steps": last["steps"], "hours": round(seconds / 3600, 3)}
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise InputError(f"{path} contains no report of a run ({exc!r}); train first") from exc


def _line(step: int, steps: int, means: Means, scores: Scores) -> str:
    terms = " ".join(f"{name} {value:.3f}" for name, value in means.losses.items())
    box, point = scores.box, scores.point
    held_out = (
        f"held-out: IoU box {box.mask_iou:.3f} point {point.mask_iou:.3f}, concept "
        f"{box.concept_top1:.3f} top-5 {box.concept_top5:.3f}, caption named "
        f"{box.caption_named:.3f} exact {box.caption_exact:.3f}"
    )
    return f"{step}/{steps} | {terms} | {held_out} | {means.seconds_per_step:.2f} s/step"
