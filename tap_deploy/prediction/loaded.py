"""The life cycle of a predictor: load a model, replace its vocabulary, warm up, close."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from typing import TypeVar

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import require_int
from tap_deploy.prediction.answers import GraphCalls
from tap_deploy.prediction.inputs import EncodedImage, blank_request
from tap_deploy.prediction.options import check_vocabulary
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_pipeline import HostPipeline
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.tokenizer import Tokenizer

DEFAULT_MEMORY_LIMIT_BYTES = 1 << 28  # larger calls are no faster per prompt

Loaded = TypeVar("Loaded", bound="LoadedModel")


class LoadedModel:
    """Graphs, vocabulary and tokenizer of a model; the base class of ``TapPredictor``."""

    def __init__(
        self,
        sessions: Mapping[str, Session] | Pipeline,
        config: TapConfig,
        *,
        vocabulary: Vocabulary | None = None,
        tokenizer: Tokenizer | None = None,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    ) -> None:
        """Build a predictor from parts; most users call ``from_bundle`` instead.

        Args:
            sessions: one session per graph name, or a whole pipeline; the predictor closes them.
            config: sizes of the model.
            vocabulary: concepts that regions are classified into.
            tokenizer: decodes caption ids to text.
            memory_limit_bytes: bound on the working memory of a graph call, bytes. Prompts that
                exceed it run in chunks. Engines are limited by their own profile instead.
        """
        require_int("memory_limit_bytes", memory_limit_bytes, 1)
        self.config = config
        self.tokenizer = tokenizer
        self._pipeline: Pipeline = (
            sessions if isinstance(sessions, Pipeline) else HostPipeline(sessions, config)
        )
        self._vocabulary = vocabulary
        self._calls = GraphCalls(self._pipeline, config, memory_limit_bytes)
        self._current: EncodedImage | None = None
        self.vocabulary = vocabulary

    @classmethod
    def from_bundle(
        cls: type[Loaded],
        path: str | os.PathLike[str],
        backend: str = "onnxruntime",
        precision: str = "fp32",
        threads: int | None = None,
        *,
        device: str | None = None,
        provider: str | None = None,
        device_options: DeviceOptions | None = None,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        check_hashes: bool = True,
        allow_failed: bool = False,
        require_verified: bool = False,
    ) -> Loaded:
        """Load a bundle; on the CPU, the text decoder at the first caption or ``warm_up``.

        Args:
            path: folder of the bundle, or ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION`` for
                one on the model hub.
            backend: backend that runs the graphs; see ``tap_deploy.sessions.run_on.BACKENDS``.
            precision: ``fp32``, or another one of ``tap_deploy.precisions.RUN_PRECISIONS``.
            threads: CPU threads per call; None for one per core available to this process.
            device: ``cpu``, ``cuda`` or ``cuda:N``; None for the first GPU with ``tensorrt`` and
                ``tensorrt_rtx``, and for the CPU with the others.
            provider: GPU execution provider of onnxruntime: ``cuda`` (default), ``tensorrt`` or
                ``nv_tensorrt_rtx``.
            device_options: GPU options: concurrent calls, CUDA graphs, and more.
            memory_limit_bytes: bound on the working memory of a graph call, bytes.
            check_hashes: verify the SHA-256 of every file against the manifest first.
            allow_failed: also load a precision that failed its accuracy check, and engines that
                failed their self-test.
            require_verified: refuse graphs and engines that never passed ``tap-export selftest`` or
                ``verify`` on this machine; by default, a warning says so once.

        Raises:
            BundleError: the bundle is missing, incomplete or modified, or lacks the precision or
                the engine, or these failed their check.
            InputError: invalid or conflicting arguments.
            SessionError: the backend is unknown, or a graph does not load.
            HubError: the hub does not answer, or does not have the bundle.
            MissingDependencyError: a package is not installed.
        """
        bundle = Bundle.open(path, check_hashes=check_hashes)
        vocabulary, tokenizer = bundle.vocabulary(), bundle.tokenizer()
        require_int("memory_limit_bytes", memory_limit_bytes, 1)
        run_on = RunOn(
            backend=backend,
            precision=precision,
            device=device,
            provider=provider,
            threads=threads,
            allow_failed=allow_failed,
            require_verified=require_verified,
        )
        pipeline = pipeline_from_bundle(bundle, run_on, device_options)
        return cls(
            pipeline,
            bundle.config,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            memory_limit_bytes=memory_limit_bytes,
        )

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Concepts that regions are classified into; assign another vocabulary to replace it."""
        return self._vocabulary

    @vocabulary.setter
    def vocabulary(self, vocabulary: Vocabulary | None) -> None:
        if vocabulary is not None:
            check_vocabulary(vocabulary, self.config)
        self._vocabulary = vocabulary

    def warm_up(self, num_regions: int = 1, *, draws: bool = False) -> None:
        """Make the first call as fast as later ones, in every context.

        Runs every graph once on a blank picture, because backends load kernels and allocate
        memory on first use. On a GPU, also records the caption steps as CUDA graphs.

        Args:
            num_regions: regions per call. Warm up once for each number of regions in use.
            draws: also prepare sampling, for calls with a temperature above 0.

        Raises:
            InputError: ``num_regions`` is not a positive integer.
            SessionError: the backend failed, or this thread is within a call of this predictor.
        """
        require_int("num_regions", num_regions, 1)
        request = blank_request(self.config.image_size, num_regions)
        with self._pipeline.all_lanes() as lanes:
            for lane in lanes:
                self._calls.warm_up(lane, request, draws=draws)

    def close(self) -> None:
        """Wait for running calls, then free the sessions. Closing twice has no effect.

        Raises:
            SessionError: this thread is within a call of this predictor.
        """
        self._pipeline.close()

    def __enter__(self: Loaded) -> Loaded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def _vocabulary_or(self, vocabulary: Vocabulary | None) -> Vocabulary | None:
        """Return the checked vocabulary of a call, or the predictor's if it has none."""
        if vocabulary is None:
            return self._vocabulary
        check_vocabulary(vocabulary, self.config)
        return vocabulary
