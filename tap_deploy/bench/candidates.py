"""Candidates: what a workload is timed on. ``BundleCandidate`` runs a bundle on a backend."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tap_deploy.bench.stages import stages, steps_of
from tap_deploy.bench.tasks import Task
from tap_deploy.bench.workloads import EVERYTHING, STREAM, Workload
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.predictor import TapPredictor
from tap_deploy.regions import Regions
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import BACKENDS, RunOn

TORCH, TORCH_BF16, TORCH_COMPILE = "torch", "torch-bf16", "torch-compile"
TORCH_NAMES = (TORCH, TORCH_BF16, TORCH_COMPILE)
PLAIN = "onnxruntime-plain"
OPENVINO = "openvino"
BASELINES = (*TORCH_NAMES, PLAIN, OPENVINO)


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


class BundleCandidate(Candidate):
    """A bundle on a backend, through ``TapPredictor``."""

    def __init__(self, setup: Setup, bundle: Bundle | None = None) -> None:
        """Load the bundle.

        Args:
            setup: bundle, backend and options.
            bundle: the opened bundle; None to open it, with a check of all hashes.

        Raises:
            TapError: the bundle cannot be loaded on this backend.
        """
        opened = Bundle.open(setup.bundle) if bundle is None else bundle
        self.name = f"{setup.run_on.backend} {setup.run_on.precision}"
        self.precision = setup.run_on.precision
        self.details = {"variant": setup.run_on.variant}
        self.config, self._tokens = opened.config, setup.tokens
        vocabulary, tokenizer = opened.vocabulary(), opened.tokenizer()
        self.pipeline = pipeline_from_bundle(opened, setup.run_on, setup.options)
        self.predictor = TapPredictor(
            self.pipeline, self.config, vocabulary=vocabulary, tokenizer=tokenizer
        )

    @contextlib.contextmanager
    def stage_tasks(self, prompts: Sequence[int]) -> Iterator[list[Task]]:
        """Yield the stages, while holding a lane."""
        with stages(self.config, self.pipeline, prompts, self._tokens) as tasks:
            yield tasks

    def answers(self, workload: Workload) -> list[Regions]:
        """Run a workload once."""
        if workload.name == EVERYTHING:
            return [everything(self.predictor, picture) for picture in workload.pictures]
        options: dict[str, Any] = {
            "prompts": workload.prompts,
            "captions": workload.captions,
            "max_new_tokens": self._tokens,
        }
        if workload.name == STREAM:
            return list(self.predictor.predict_many(workload.pictures, **options))
        return [self.predictor.predict(picture, **options) for picture in workload.pictures]

    def close(self) -> None:
        """Close the pipeline."""
        self.predictor.close()


def everything(predictor: Any, picture: Any) -> Regions:
    """Return the regions of a grid of points over a picture, without duplicates."""
    if not hasattr(predictor, "everything"):
        raise InputError("workload 'everything' needs TapPredictor.everything; update tap-deploy")
    regions: Regions = predictor.everything(picture)
    return regions


def candidate_from_name(name: str, setup: Setup) -> Candidate:
    """Load a baseline, or the bundle on another backend.

    Args:
        name: one of ``BASELINES``, or a backend.
        setup: what it is compared with.

    Raises:
        InputError: unknown name, or there is no checkpoint.
        TapError: it cannot be loaded.
    """
    if name in (*BACKENDS, OPENVINO):
        run_on = dataclasses.replace(setup.run_on, backend=name, provider=None)
        return BundleCandidate(dataclasses.replace(setup, run_on=run_on))
    if name not in BASELINES:
        raise InputError(
            f"unknown candidate {name!r}; expected one of {', '.join((*BASELINES, *BACKENDS))}, "
            "or a JSON file of an earlier run"
        )
    if setup.checkpoint is None:
        raise InputError(f"{name} needs the weights of the bundle; pass --checkpoint FILE")
    if name == PLAIN:
        from tap_deploy.bench.plain_onnx import PlainCandidate

        return PlainCandidate(setup)
    from tap_deploy.bench.pytorch import TorchCandidate

    return TorchCandidate(name, setup)


def _text(path: pathlib.Path | None) -> str | None:
    return None if path is None else str(path)


def _path(text: str | None) -> pathlib.Path | None:
    return None if text is None else pathlib.Path(text)
