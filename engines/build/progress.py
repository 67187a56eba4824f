"""Progress of a build, from the builder's progress monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Called with the finished share, 0 to 1, and the name of the phase.
OnProgress = Callable[[float, str], None]


def progress_monitor(trt: Any, on_progress: OnProgress) -> Any:
    """Return a progress monitor; ``error`` is the exception that cancelled the build, or None.

    The builder calls the monitor from C++, where a Python exception would abort the process.
    Exceptions of ``on_progress``, such as KeyboardInterrupt or BrokenPipeError, are therefore
    stored in ``error``, and the build is cancelled at its next step.
    """

    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Converts nested phases to one overall share."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._share = 0.0
            self._phases: dict[str, tuple[int, int]] = {}  # name -> (steps done, steps), nested

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (0, max(1, num_steps))
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name] = (step + 1, self._phases[phase_name][1])
                self._report(phase_name)
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _report(self, phase_name: str) -> None:
            # Never report a lower share, even if a phase ends early and another starts.
            self._share = max(self._share, _share(list(self._phases.values())))
            try:
                on_progress(self._share, phase_name)
            except BaseException as exc:
                self.error = exc

    return ProgressMonitor()


def _share(phases: list[tuple[int, int]]) -> float:
    """Return the finished share of the outermost phase, including its nested phases."""
    share, width = 0.0, 1.0
    for done, steps in phases:
        width /= steps
        share += min(done, steps) * width
    return min(share, 1.0)
