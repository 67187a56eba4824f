"""The candidates by name; ``BundleCandidate`` runs a bundle on a backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tap_deploy.bench.candidate import BASELINES, OPENVINO, PLAIN, Candidate, Setup
from tap_deploy.bench.stages import stages
from tap_deploy.bench.tasks import Task
from tap_deploy.bench.workloads import EVERYTHING, STREAM, Workload
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import InputError
from tap_deploy.predictor import TapPredictor
from tap_deploy.regions import Regions
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.run_on import BACKENDS


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
