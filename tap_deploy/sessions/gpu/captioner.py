"""The decode loop on a GPU: ids and cache stay in device memory, steps replay as CUDA graphs.

Every position has its own fixed addresses:

- ``ids`` has one row of token ids per position. The step at ``position`` reads row
  ``position - 1`` and writes row ``position``, so a token reaches the next step without the host.
  Row 0 is always BOS.
- ``cache`` has all slots of keys and values. A step reads all of them and masks those from
  ``position`` on; afterwards a strided copy stores its own keys and values in their slot.
- ``positions`` has the constants 0, 1, 2, … in device memory.
- ``noise`` has the sampling noise of all positions, uploaded before the first step.

For a given number of rows, the step at a position therefore always does the same work at the same
addresses: it runs once, is recorded, and is replayed from then on. The number of rows is rounded up
to a power of two to bound the number of recordings; the surplus rows are ignored.
"""

from __future__ import annotations

import contextlib
import logging

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, TEXT_HEAD_DIM, TapConfig
from tap_deploy.errors import SessionError
from tap_deploy.sessions.caption_writer import CaptionWriter, OnIds, finished_rows
from tap_deploy.sessions.gpu.buffers import Buffers
from tap_deploy.sessions.gpu.graph import DeviceExecutor, DeviceGraph, Recording
from tap_deploy.sessions.gpu.memory import ALIGNMENT_BYTES, aligned
from tap_deploy.sessions.options import DeviceOptions

logger = logging.getLogger(__name__)
ID_BYTES = 4  # int32
NOISE_BYTES = 4  # float32


class DeviceCaptioner(CaptionWriter):
    """Writes captions of up to ``limits["P"]`` regions per batch, in one lane.

    Attributes:
        steps_replayed: number of steps replayed as CUDA graphs.
    """

    def __init__(
        self,
        graph: DeviceGraph,
        config: TapConfig,
        options: DeviceOptions,
        buffers: Buffers,
        stream: int,
        scratch_address: int,
    ) -> None:
        super().__init__(config)
        self._graph, self._options = graph, options
        self._memory, self._buffers = buffers.memory, buffers
        self._stream, self._scratch = stream, scratch_address
        self._most = graph.limits["P"]
        self._slots, self._candidates = config.text_seq_len, graphs.draw_candidates(config)
        self._check_graph()
        self._float = graph.spec.inputs[0].dtype
        self._itemsize = np.dtype(self._float).itemsize
        self._check_alignment()
        self._executors: dict[tuple[int, int], DeviceExecutor] = {}
        self._recorded: dict[tuple[int, int, int], Recording] = {}
        self._refused: set[tuple[int, int, int]] = set()  # steps that could not be recorded so far
        self._told = False
        self.steps_replayed = 0
        self._allocate()

    def _check_graph(self) -> None:
        wanted = {"T": (self._slots, "cache slots"), "K": (self._candidates, "candidates")}
        for axis, (size, what) in wanted.items():
            if self._graph.limits[axis] < size:
                raise SessionError(
                    f"graph {self._graph.spec.name}: the engine takes {self._graph.limits[axis]} "
                    f"{what}; expected {size}; build it again with: tap-export build"
                )

    def _check_alignment(self) -> None:
        """Check that keys and values of every layer are aligned as TensorRT requires.

        With heads of 64 channels, they always are in fp16 and fp32.
        """
        size = self._past_bytes(1)
        if size % ALIGNMENT_BYTES:
            raise SessionError(
                f"graph {self._graph.spec.name}: {self._float} keys of {size} bytes a layer; "
                f"expected a multiple of {ALIGNMENT_BYTES}, the alignment of a GPU's tensors; use "
                "another precision"
            )

    def _allocate(self) -> None:
        config, buffers, most = self.config, self._buffers, self._most
        self._row_bytes = aligned(ID_BYTES * most)  # ids of one position
        self._ids = buffers.staged((self._slots + 1) * self._row_bytes)  # last row: prefill's
        self._positions = buffers.staged(self._slots * ALIGNMENT_BYTES)
        self._noise_bytes = aligned(NOISE_BYTES * most * self._candidates)  # noise of one position
        self._noise = buffers.staged(self._slots * self._noise_bytes)
        self._no_noise = buffers.device(NOISE_BYTES * most)
        self._tokens = buffers.staged(most * config.image_embed_dim * self._itemsize)
        past_inputs = len(graphs.past_names(config))
        self._cache = buffers.device(past_inputs * self._past_bytes(most))
        self._slot = buffers.device(past_inputs * self._past_bytes(most) // self._slots)
        self._logits = buffers.device(most * config.vocab_size * self._itemsize)
        self._write_constants()
        # onnxruntime loads its session with the first executor; do that here, not in a call.
        self._executor(self._batch(1), 1)
        self._record = self._options.cuda_graphs and self._graph.can_record

    def _past_bytes(self, rows: int) -> int:
        """Return the size of the keys (or values) of one layer for ``rows`` regions, bytes."""
        return rows * self.config.text_heads * self._slots * self._head_bytes()

    def _head_bytes(self) -> int:
        return TEXT_HEAD_DIM * self._itemsize

    def _write_constants(self) -> None:
        rows, width = self._slots + 1, self._row_bytes // ID_BYTES
        ids = np.zeros((rows, width), np.int32)
        ids[0] = BOS_ID
        self._ids.upload(ids, self._stream)
        numbers = np.zeros((self._slots, ALIGNMENT_BYTES // ID_BYTES), np.int32)
        numbers[:, 0] = np.arange(self._slots)
        self._positions.upload(numbers, self._stream)
        tokens = np.zeros((self._most, self.config.image_embed_dim), self._float)
        self._tokens.upload(tokens, self._stream)
        self._memory.clear(self._no_noise, NOISE_BYTES * self._most, self._stream)

    def _write(
        self,
        ids: np.ndarray,
        semantic_tokens: np.ndarray,
        noise: np.ndarray | None,
        on_ids: OnIds,
    ) -> None:
        rows, last = len(ids), ids.shape[1] - 1
        self._graph.check_sizes({"P": rows})
        batch = self._batch(rows)
        self._tokens.upload(semantic_tokens.astype(self._float, copy=False), self._stream)
        self._clear_cache(batch)
        candidates = self._send_noise(noise)
        self._step(batch, candidates, 0)
        seen = 0
        for position in range(1, last + 1):
            self._step(batch, candidates, position)
            if position % self._options.eos_interval_steps == 0 or position == last:
                ids[:, seen + 1 : position + 1] = self._fetch_ids(seen + 1, position, rows)
                seen = position
                on_ids(ids[:, : position + 1])
                if finished_rows(ids).all():
                    break

    def record(self, rows: int, *, draws: bool) -> None:
        """Run and record every position for a batch of ``rows`` regions."""
        batch, candidates = self._batch(rows), self._candidates if draws else 1
        self._clear_cache(batch)
        for position in range(self.config.max_new_tokens + 1):
            self._step(batch, candidates, position)

    def _clear_cache(self, batch: int) -> None:
        """Zero the cache: masking only works on finite values, which memory need not contain."""
        cache_bytes = len(graphs.past_names(self.config)) * self._past_bytes(batch)
        self._memory.clear(self._cache, cache_bytes, self._stream)

    def _send_noise(self, noise: np.ndarray | None) -> int:
        """Upload the noise of all positions; return the number of candidates K."""
        if noise is None:
            return 1
        steps, rows, candidates = (int(size) for size in noise.shape)
        width = self._noise_bytes // NOISE_BYTES
        staged = np.zeros((steps + 1, width), np.float32)  # position 0 draws no token
        staged[1:, : rows * candidates] = noise.reshape(steps, -1)
        self._noise.upload(staged, self._stream)
        return candidates

    def _batch(self, rows: int) -> int:
        """Return the batch size for a number of rows: the next power of two within the limits."""
        rounded = max(1 << (rows - 1).bit_length(), self._graph.minima["P"])
        return min(rounded, self._most)

    def _step(self, batch: int, candidates: int, position: int) -> None:
        """Replay the step of a position if it is recorded; otherwise run and record it."""
        key = (batch, candidates, position)
        if key in self._recorded:
            self._recorded[key].launch()
            self.steps_replayed += 1
            return
        executor = self._bound(batch, candidates, position)
        executor.enqueue()
        self._fill_slot(batch, position)
        if self._record:
            self._try_to_record(executor, key)

    def _fill_slot(self, batch: int, position: int) -> None:
        """Copy the new keys and values to their slot of the cache."""
        head_bytes = self._head_bytes()
        self._memory.copy_rows_on_device(
            self._cache + position * head_bytes,
            self._slots * head_bytes,
            self._slot,
            head_bytes,
            head_bytes,
            len(graphs.past_names(self.config)) * batch * self.config.text_heads,
            self._stream,
        )

    def _try_to_record(self, executor: DeviceExecutor, key: tuple[int, int, int]) -> None:
        """Record the step that just ran."""
        if not executor.can_record():
            # On the first run, TensorRT-RTX may still be compiling for these shapes.
            self._note_refusal(key)
            return
        batch, _, position = key
        try:
            self._recorded[key] = executor.record(
                self._memory, self._stream, lambda: self._fill_slot(batch, position)
            )
        except SessionError as exc:
            self._record = False
            logger.warning("CUDA graphs are off, captions take longer: %s", str(exc))

    def _note_refusal(self, key: tuple[int, int, int]) -> None:
        """Warn once when a step cannot be recorded twice; recording is retried on every run."""
        if key in self._refused and not self._told:
            self._told = True
            logger.warning(
                "captions take longer: graph %s cannot be recorded as a CUDA graph with %d rows, "
                "even after a run; if it is an engine, build it again with: tap-export build",
                self._graph.spec.name,
                key[0],
            )
        self._refused.add(key)

    def _executor(self, batch: int, candidates: int) -> DeviceExecutor:
        """Return the executor of a shape; changing its shapes would invalidate its recordings."""
        if (batch, candidates) not in self._executors:
            executor = self._graph.executor(self._stream, self._scratch)
            self._executors[batch, candidates] = executor
        return self._executors[batch, candidates]

    def _bound(self, batch: int, candidates: int, position: int) -> DeviceExecutor:
        executor = self._executor(batch, candidates)
        executor.set_sizes({"P": batch, "T": self._slots, "K": candidates})
        written = position if position else self._slots
        drawn = self._noise.address + position * self._noise_bytes
        past = {
            name: self._cache + i * self._past_bytes(batch)
            for i, name in enumerate(graphs.past_names(self.config))
        }
        addresses = past | {
            graphs.SEMANTIC_TOKENS: self._tokens.address,
            graphs.INPUT_IDS: self._ids_row(max(0, position - 1)),
            graphs.POSITION: self._positions.address + position * ALIGNMENT_BYTES,
            graphs.GUMBEL_NOISE: self._no_noise if candidates == 1 else drawn,
            graphs.NEXT_IDS: self._ids_row(written),
            graphs.LOGITS: self._logits,
            graphs.PRESENT_KEY_VALUES: self._slot,
        }
        for name, address in addresses.items():
            executor.bind(name, address)
        return executor

    def _ids_row(self, position: int) -> int:
        return self._ids.address + position * self._row_bytes

    def _fetch_ids(self, first: int, last: int, rows: int) -> np.ndarray:
        """Synchronise with the GPU and return ids of a range, int32 ``[rows, positions]``."""
        width = self._row_bytes // ID_BYTES
        whole = self._ids.view((self._slots + 1, width), "int32")
        fetched = whole[first : last + 1]
        self._memory.copy_to_host(fetched, self._ids_row(first), self._stream)
        self._memory.synchronize(self._stream)
        return fetched[:, :rows].T

    def close(self) -> None:
        """Free recordings and executors; the lane frees the buffers."""
        while self._recorded:
            with contextlib.suppress(SessionError):
                self._recorded.popitem()[1].close()
        while self._executors:
            self._executors.popitem()[1].close()
