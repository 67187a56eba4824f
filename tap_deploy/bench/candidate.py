"""``Candidate``: what a workload is timed on. ``Setup``: what the candidates of a run share."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from tap_deploy.bench.stages import steps_of
from tap_deploy.bench.tasks import Task
from tap_deploy.bench.workloads import Workload
from tap_deploy.config import TapConfig
from tap_deploy.regions import Regions
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import RunOn

TORCH, TORCH_BF16, TORCH_COMPILE = "torch", "torch-bf16", "torch-compile"
TORCH_NAMES = (TORCH, TORCH_BF16, TORCH_COMPILE)
PLAIN = "onnxruntime-plain"
NEED_WEIGHTS = (*TORCH_NAMES, PLAIN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all candidates of a run share.

    Attributes:
        bundle: path of the bundle.
        run_on: backend, precision, device and threads of the bundle under test.
        options: GPU options.
        checkpoint: weights for PyTorch; None without baselines that need them.
        tokens: maximum number of caption tokens; None for the model's limit.
    """

    bundle: pathlib.Path
    run_on: RunOn
    options: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    checkpoint: pathlib.Path | None = None
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the setup as JSON types, for another process."""
        values = dataclasses.asdict(self)
        values["options"]["cache_folder"] = _text(self.options.cache_folder)
        return values | {"bundle": str(self.bundle), "checkpoint": _text(self.checkpoint)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Setup:
        """Return the setup of ``to_dict``."""
        options = dict(values["options"])
        return cls(
            bundle=pathlib.Path(values["bundle"]),
            run_on=RunOn(**values["run_on"]),
            options=DeviceOptions(**options | {"cache_folder": _path(options["cache_folder"])}),
            checkpoint=_path(values["checkpoint"]),
            tokens=values["tokens"],
        )


class Candidate(abc.ABC):
    """A loaded model that can be timed on the workloads.

    Attributes:
        name: name in the report.
        config: sizes of the model.
        precision: precision of the arithmetic, for the roofline: ``fp32``, ``fp16``, ``bf16`` or
            ``int8``.
        details: what runs, as JSON types.
    """

    name: str
    config: TapConfig
    precision: str
    details: dict[str, Any]

    @abc.abstractmethod
    def stage_tasks(self, prompts: Sequence[int]) -> contextlib.AbstractContextManager[list[Task]]:
        """Yield the tasks of workload ``stage``; see ``stages.stages``.

        Raises:
            InputError: the candidate does not have the stages.
        """

    @abc.abstractmethod
    def answers(self, workload: Workload) -> list[Regions]:
        """Run a workload once.

        Raises:
            InputError: the candidate cannot run it.
            TapError: the backend failed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free everything."""

    def task(self, workload: Workload) -> Task:
        """Return a workload as a task; runs it once to count the caption tokens."""
        found = self.answers(workload)
        return Task(
            kind=workload.name,
            prompts=workload.regions,
            tokens=max(
                0 if regions.caption_ids is None else steps_of(regions.caption_ids, self.config)
                for regions in found
            ),
            call=lambda: self.answers(workload),
            pictures=len(workload.pictures),
        )


def _text(path: pathlib.Path | None) -> str | None:
    return None if path is None else str(path)


def _path(text: str | None) -> pathlib.Path | None:
    return None if text is None else pathlib.Path(text)
