"""A lane on a GPU: one stream with buffers for the largest call."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.graphs import GraphSpec
from tap_deploy.masks import mask_rows, request_answers, request_candidates
from tap_deploy.sessions.caption_writer import OnIds
from tap_deploy.sessions.contract import resolve_shape
from tap_deploy.sessions.gpu.buffers import Buffers, StagedTensor
from tap_deploy.sessions.gpu.captioner import DeviceCaptioner
from tap_deploy.sessions.gpu.embeddings import DeviceEmbeddings, EmbeddingStore
from tap_deploy.sessions.gpu.graph import DeviceExecutor, DeviceGraph, size_bytes
from tap_deploy.sessions.gpu.memory import DeviceMemory
from tap_deploy.sessions.gpu.stopwatch import Stopwatch
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import FOREIGN, Candidates, DecodedPrompts, Embeddings, Lane


class DeviceLane(Lane):
    """The graphs in one stream, so that each reads the previous one's outputs without a sync.

    Pictures, coordinates, labels and semantic tokens are copied to the GPU; the outputs of the
    prompt decoder (one mask token per prompt) and caption ids are copied to the host. Image
    embeddings and the KV cache stay on the GPU.
    """

    on_gpu = True

    def __init__(
        self,
        memory: DeviceMemory,
        device_graphs: Mapping[str, DeviceGraph],
        config: TapConfig,
        store: EmbeddingStore,
    ) -> None:
        """Store the arguments; a lane can be closed even if ``allocate`` fails halfway."""
        self._memory, self._config, self._store = memory, config, store
        self._encoder_graph = device_graphs[graphs.IMAGE_ENCODER]
        self._decoder_graph = device_graphs[graphs.PROMPT_DECODER]
        self._buffers = Buffers(memory)
        self._captioner: DeviceCaptioner | None = None
        self._executors: list[DeviceExecutor] = []
        self._landing = np.empty(0, np.uint8)  # pinned memory for ``download``

    def allocate(self, device_graphs: Mapping[str, DeviceGraph], options: DeviceOptions) -> None:
        """Allocate everything; CUDA must be activated."""
        buffers = self._buffers
        self._stream = buffers.stream()
        # All executors share one scratch buffer: runs in the same stream do not overlap.
        scratch = buffers.device(max(graph.scratch_bytes for graph in device_graphs.values()))
        self._encoder = self._encoder_graph.executor(self._stream, scratch)
        self._decoder = self._decoder_graph.executor(self._stream, scratch)
        self._executors = [self._encoder, self._decoder]
        self._inputs = self._staged(self._encoder_graph, self._encoder_graph.spec.inputs, options)
        prompt_inputs = self._decoder_graph.spec.inputs[1:]
        self._inputs |= self._staged(self._decoder_graph, prompt_inputs, options)
        outputs = self._decoder_graph.spec.outputs
        self._outputs = self._staged(self._decoder_graph, outputs, options)
        for name, tensor in self._outputs.items():
            self._decoder.bind(name, tensor.address)
        self._encoder.bind(graphs.IMAGES, self._inputs[graphs.IMAGES].address)
        for spec in prompt_inputs:
            self._decoder.bind(spec.name, self._inputs[spec.name].address)
        batch = self._encoder_graph.limits["B"]
        self._encoded = buffers.device(batch * self._store.size_bytes) if batch > 1 else 0
        self._request_answers()
        rows = mask_rows(self._decoder_graph.limits["Q"])
        self._inputs[graphs.MASK_ROWS].upload(rows, self._stream)
        self._captioner = DeviceCaptioner(
            device_graphs[graphs.TEXT_DECODER],
            self._config,
            options,
            buffers,
            self._stream,
            scratch,
        )
        self._dtype = self._encoder_graph.spec.outputs[0].dtype
        self.synchronize()

    def _staged(
        self, graph: DeviceGraph, specs: tuple[graphs.TensorSpec, ...], options: DeviceOptions
    ) -> dict[str, StagedTensor]:
        limits = dict(graph.limits) | {"M": 1}
        for axis in limits.keys() & {"P", "Q"}:  # all masks of one prompt: decode_candidates
            limits[axis] = max(limits[axis], self._config.num_mask_tokens)
        return {
            spec.name: self._buffers.staged(
                size_bytes(spec, limits, np.dtype(spec.dtype).itemsize),
                zero_copy=options.zero_copy,
            )
            for spec in specs
        }

    def encode_batch(self, images: np.ndarray) -> list[Embeddings]:
        """Run the image encoder; each result owns its device memory."""
        _check(self._encoder_graph.spec, 0, images)
        sizes = {"B": len(images)}
        self._encoder_graph.check_sizes(sizes)
        embeddings = [self._store.take() for _ in images]
        target = embeddings[0].address if len(images) == 1 else self._encoded
        self._inputs[graphs.IMAGES].upload(images, self._stream)
        self._encoder.set_sizes(sizes)
        self._encoder.bind(graphs.IMAGE_EMBEDDINGS, target)
        self._encoder.enqueue()
        if len(images) > 1:
            for i, own in enumerate(embeddings):
                self._memory.copy_on_device(
                    own.address,
                    target + i * self._store.size_bytes,
                    self._store.size_bytes,
                    self._stream,
                )
        return list(embeddings)

    def decode_prompts(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray, *, masks: bool = True
    ) -> DecodedPrompts:
        """Run the prompt decoder; synchronises with the GPU once, to fetch the outputs."""
        rows = len(labels) if masks else 1
        sizes = self._enqueue_decoder(embeddings, coords, labels, rows=rows, masks=1)
        names = {spec.name for spec in self._decoder_graph.spec.outputs}
        if not masks:
            names.remove(graphs.LOW_RES_MASKS)
        return DecodedPrompts.from_outputs(self._fetch(names, sizes))

    def decode_candidates(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray
    ) -> Candidates:
        """Run the prompt decoder for all mask tokens, in the buffers of ``decode_prompts``."""
        masks, room = self._config.num_mask_tokens, self._decoder_graph.limits["P"]
        if len(labels) * masks > max(room, masks):
            raise InputError(f"{len(labels)} prompts of {masks} masks; expected at most {room}")
        request = request_candidates(len(labels), masks)
        self._inputs[graphs.MASK_REQUEST].upload(request, self._stream)
        try:
            rows = len(labels)
            sizes = self._enqueue_decoder(embeddings, coords, labels, rows=rows, masks=masks)
            fetched = self._fetch([graphs.LOW_RES_MASKS, graphs.IOU_PREDICTIONS], sizes)
        finally:
            self._request_answers()
        return Candidates.from_outputs(fetched)

    def _request_answers(self) -> None:
        answers = request_answers(self._decoder_graph.limits["P"])
        self._inputs[graphs.MASK_REQUEST].upload(answers, self._stream)

    def _enqueue_decoder(
        self,
        embeddings: Embeddings,
        coords: np.ndarray,
        labels: np.ndarray,
        *,
        rows: int,
        masks: int,
    ) -> Mapping[str, int]:
        if not isinstance(embeddings, DeviceEmbeddings) or embeddings.store is not self._store:
            raise InputError(FOREIGN)
        _check(self._decoder_graph.spec, 1, coords)
        _check(self._decoder_graph.spec, 2, labels)
        count, points = labels.shape
        sizes = {"P": count, "N": points, "M": masks, "Q": rows}
        self._decoder_graph.check_sizes(sizes)
        self._inputs[graphs.POINT_COORDS].upload(coords, self._stream)
        self._inputs[graphs.POINT_LABELS].upload(labels, self._stream)
        self._decoder.set_sizes(sizes)
        self._decoder.bind(graphs.IMAGE_EMBEDDINGS, embeddings.address)
        self._decoder.enqueue()
        return sizes

    def _fetch(self, names: Collection[str], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Synchronise and copy outputs of the prompt decoder, which the next call overwrites."""
        specs = [spec for spec in self._decoder_graph.spec.outputs if spec.name in names]
        fetched = {
            spec.name: self._outputs[spec.name].download(
                resolve_shape(spec, sizes), spec.dtype, self._stream
            )
            for spec in specs
        }
        self.synchronize()
        return {name: array.copy() for name, array in fetched.items()}

    def caption(
        self,
        semantic_tokens: np.ndarray,
        *,
        max_new_tokens: int | None,
        temperature: float,
        rng: np.random.Generator,
        on_ids: OnIds | None = None,
    ) -> np.ndarray:
        """Write captions with ``DeviceCaptioner``."""
        assert self._captioner is not None
        return self._captioner.generate(
            semantic_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            rng=rng,
            on_ids=on_ids,
        )

    def record_captions(self, rows: int, *, draws: bool) -> None:
        """Run and record every position."""
        assert self._captioner is not None
        self._captioner.record(rows, draws=draws)

    def download(self, address: int, array_shape: tuple[int, ...]) -> np.ndarray:
        """Copy floats of the embeddings' dtype from an address, and return them as float32."""
        count = int(np.prod(array_shape)) * np.dtype(self._dtype).itemsize
        if count > len(self._landing):
            self._landing = self._buffers.pinned(count)
        staged = self._landing[:count]
        self._memory.copy_to_host(staged, address, self._stream)
        self.synchronize()
        return staged.view(self._dtype).reshape(array_shape).astype(np.float32)

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._memory.synchronize(self._stream)

    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch for calls in the stream of this lane."""
        return Stopwatch(self._memory, self._stream)

    @property
    def steps_replayed(self) -> int:
        """Number of caption steps replayed as CUDA graphs."""
        return 0 if self._captioner is None else self._captioner.steps_replayed

    def stop(self) -> None:
        """Wait for the stream and close captioner and executors, before the graphs are closed."""
        with contextlib.suppress(Exception):
            self.synchronize()
        if self._captioner is not None:
            self._captioner.close()
        for executor in self._executors:
            executor.close()

    def close(self) -> None:
        """Free buffers and stream; the graphs must be closed."""
        self._buffers.close()


def _check(spec: GraphSpec, index: int, array: np.ndarray) -> None:
    """Validate an input against the spec before it is copied as bytes."""
    expected = spec.inputs[index]
    fits = array.dtype == np.dtype(expected.dtype) and array.ndim == len(expected.shape)
    if not fits or any(
        axis != size if isinstance(axis, int) else size < 1
        for axis, size in zip(expected.shape, array.shape, strict=True)
    ):
        raise InputError(f"input is {array.dtype} {list(array.shape)}; expected {expected}")
