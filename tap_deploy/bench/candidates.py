"""The candidates by name; ``BundleCandidate`` runs a bundle on a backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tap_deploy.bench.candidate import NEED_WEIGHTS, PLAIN, Candidate, Setup
from tap_deploy.bench.stages import stages
from tap_deploy.bench.tasks import Task
from tap_deploy.bench.workloads import EVERYTHING, STREAM, Workload
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import InputError
from tap_deploy.precisions import INT8, RUN_PRECISIONS
from tap_deploy.predictor import TapPredictor
from tap_deploy.regions import Regions
from tap_deploy.sessions.cpu_choice import cpu_backends
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.run_on import BACKENDS, FASTEST_ON_CPU, ONNXRUNTIME, RunOn


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
        self.details = (
            {"variant": setup.run_on.variant}
            | backends(opened, setup.run_on)
            | int8_products(opened, setup.run_on)
        )
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
            return [self.predictor.everything(picture) for picture in workload.pictures]
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


def backends(bundle: Bundle, run_on: RunOn) -> dict[str, str]:
    """Return which backend runs each graph, for ``cpu``; empty for others, which run all."""
    return cpu_backends(bundle.config, run_on) if run_on.backend == FASTEST_ON_CPU else {}


def int8_products(bundle: Bundle, run_on: RunOn) -> dict[str, str]:
    """Return how many products really run in int8 on onnxruntime's CPU; empty elsewhere.

    Engines have their layers in the conditions.
    """
    if (run_on.backend, run_on.precision, run_on.on_cpu) != (ONNXRUNTIME, INT8, True):
        return {}
    try:
        from tap_deploy.engines.verdict.kernels import kernels_in_onnxruntime
    except ImportError:
        return {"kernels": "unknown, as onnx is not installed"}
    variant = bundle.variant(run_on.variant)
    return {graph: kernels_in_onnxruntime(variant.path(graph)).summary for graph in variant.specs}


def require_candidate(name: str, setup: Setup) -> None:
    """Check the name of a candidate, before a long run.

    Raises:
        InputError: unknown name, the bundle under test itself, or there is no checkpoint.
        SessionError: the backend is not part of this version.
    """
    known = (*NEED_WEIGHTS, *BACKENDS, *RUN_PRECISIONS)
    if name not in known:
        raise InputError(
            f"unknown candidate {name!r}; expected one of {', '.join(known)}, or a JSON file of an "
            "earlier run"
        )
    if name in NEED_WEIGHTS:
        if setup.checkpoint is None:
            raise InputError(f"{name} needs the weights of the bundle; pass --checkpoint FILE")
    elif _run_on(name, setup) == setup.run_on:
        raise InputError(f"candidate {name!r} is the bundle under test; omit it from --against")


def candidate_from_name(name: str, setup: Setup) -> Candidate:
    """Load a baseline, or the bundle on another backend or in another precision.

    Args:
        name: one of ``NEED_WEIGHTS``, a backend, or a precision; see ``require_candidate``.
        setup: what it is compared with.

    Raises:
        TapError: it cannot be loaded.
    """
    require_candidate(name, setup)
    if name not in NEED_WEIGHTS:
        return BundleCandidate(dataclasses.replace(setup, run_on=_run_on(name, setup)))
    if name == PLAIN:
        from tap_deploy.bench.plain_onnx import PlainCandidate

        return PlainCandidate(setup)
    from tap_deploy.bench.pytorch import TorchCandidate

    return TorchCandidate(name, setup)


def _run_on(name: str, setup: Setup) -> RunOn:
    """Return where the bundle runs as a candidate: on another backend, or in another precision."""
    if name in RUN_PRECISIONS:
        return dataclasses.replace(setup.run_on, precision=name)
    return dataclasses.replace(setup.run_on, backend=name, provider=None)
