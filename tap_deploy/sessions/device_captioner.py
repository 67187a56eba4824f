"""The decode loop on a GPU: tokens and cache never leave it, steps are replayed as CUDA graphs.

Every position has addresses of its own, which never change:

- ``ids`` holds one row of token ids per position. The step at ``position`` reads row
  ``position - 1`` and writes row ``position``, so that a token reaches the next step without
  the host. Row 0 is BOS for good.
- ``cache`` holds one slot per position. A step reads all of them (those from ``position`` on are
  masked) and writes its own.
- ``positions`` holds the numbers 0, 1, 2, … in memory that the GPU reads.

So a step at a position is always the same work at the same place, for a number of rows: it is
run once, recorded, and replayed from then on. The number of rows is rounded up to a power of
two, which bounds what is recorded; rows too many decode noise that nobody reads.
"""

from __future__ import annotations

import contextlib
import logging

import numpy as np

from tap_deploy import graphs
from tap_deploy.captioner import blank_after_eos, finished_rows, sample
from tap_deploy.config import BOS_ID, TapConfig
from tap_deploy.errors import SessionError
from tap_deploy.sessions.buffers import Buffers
from tap_deploy.sessions.device_graph import DeviceExecutor, DeviceGraph, Recording
from tap_deploy.sessions.device_memory import ALIGNMENT_BYTES, aligned
from tap_deploy.sessions.options import DeviceOptions

logger = logging.getLogger(__name__)
ID_BYTES = 4  # int32


class DeviceCaptioner:
    """Writes captions for up to ``limits["P"]`` regions at once; belongs to one lane."""

    def __init__(
        self,
        graph: DeviceGraph,
        config: TapConfig,
        options: DeviceOptions,
        buffers: Buffers,
        stream: int,
        scratch_address: int,
    ) -> None:
        self._graph, self._config, self._options = graph, config, options
        self._memory, self._buffers = buffers.memory, buffers
        self._stream, self._scratch = stream, scratch_address
        self._most = graph.limits["P"]
        self._check_graph()
        self._float = graph.spec.inputs[0].dtype
        self._itemsize = np.dtype(self._float).itemsize
        self._check_slots()
        self._executors: dict[int, DeviceExecutor] = {}
        self._recorded: dict[tuple[int, int], Recording] = {}
        self._record = options.cuda_graphs and graph.can_record
        self._refused: set[tuple[int, int]] = set()  # steps that ran and could not be recorded
        self._told = False
        self.steps_replayed = self.steps_enqueued = self.looks = 0
        self._allocate()

    def _check_graph(self) -> None:
        slots, name = self._config.text_seq_len, self._graph.spec.name
        if self._graph.limits["T"] < slots:
            raise SessionError(
                f"graph {name}: the engine takes {self._graph.limits['T']} cache slots; "
                f"expected {slots}; build it again with: tap-export build"
            )

    def _check_slots(self) -> None:
        """Hold the addresses of slots against what TensorRT takes; a slot is rows of this size.

        Heads of 64 channels make it fit in fp16 and fp32, whatever the model.
        """
        size = self._bytes_per_row()
        if size % ALIGNMENT_BYTES:
            raise SessionError(
                f"graph {self._graph.spec.name}: {self._float} cache slots of {size} bytes each; "
                f"expected a multiple of {ALIGNMENT_BYTES}, the alignment of a GPU's tensors; use "
                "another precision"
            )

    def _allocate(self) -> None:
        config, buffers, most = self._config, self._buffers, self._most
        self._row_bytes = aligned(ID_BYTES * most)  # of one position's ids
        rows = config.text_seq_len + 1  # the last one takes what the prefill says
        self._ids = buffers.staged(rows * self._row_bytes)
        self._positions = buffers.staged(config.text_seq_len * ALIGNMENT_BYTES)
        self._tokens = buffers.device(most * config.image_embed_dim * self._itemsize)
        self._cache_bytes = most * self._bytes_per_row() * config.text_seq_len
        self._cache = buffers.device(self._cache_bytes)
        self._logits = buffers.staged(most * config.vocab_size * self._itemsize)
        self._write_constants()

    def _bytes_per_row(self) -> int:
        """Bytes of one slot for one region."""
        _, *slot = graphs.kv_cache_shape(self._config, 1)
        return int(np.prod(slot)) * self._itemsize

    def _write_constants(self) -> None:
        rows, width = self._config.text_seq_len + 1, self._row_bytes // ID_BYTES
        ids = np.zeros((rows, width), np.int32)
        ids[0] = BOS_ID
        self._ids.upload(ids, self._stream)
        slots, width = self._config.text_seq_len, ALIGNMENT_BYTES // ID_BYTES
        numbers = np.zeros((slots, width), np.int32)
        numbers[:, 0] = np.arange(slots)
        self._positions.upload(numbers, self._stream)
        token_bytes = self._most * self._config.image_embed_dim * self._itemsize
        self._memory.clear(self._tokens, token_bytes, self._stream)

    def generate(
        self,
        tokens_address: int,
        rows: int,
        *,
        max_new_tokens: int | None,
        temperature: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Write one caption per region.

        Args:
            tokens_address: where the semantic tokens ``[rows, C]`` lie.
            rows: how many.
            max_new_tokens: as in ``Captioner.generate``.
            temperature: as there; above 0, each step brings the logits to the host, which draws.
            rng: random state for the draws.

        Returns:
            ids int64 ``[rows, text_seq_len - 1]``: BOS, the caption with its EOS, padding.

        Raises:
            SessionError: the backend failed.
        """
        config, stream = self._config, self._stream
        limit = config.max_new_tokens
        count = limit if max_new_tokens is None else min(max_new_tokens, limit)
        ids = np.full((rows, limit + 1), config.pad_id, np.int64)
        ids[:, 0] = BOS_ID
        if rows == 0 or count == 0:
            return ids
        batch = self._batch(rows)
        token_bytes = rows * config.image_embed_dim * self._itemsize
        self._memory.copy_on_device(self._tokens, tokens_address, token_bytes, stream)
        # Masked slots count for nothing only while they are finite; what an earlier caption
        # left there, or the driver, need not be.
        cache_bytes = batch * self._bytes_per_row() * config.text_seq_len
        self._memory.clear(self._cache, cache_bytes, stream)
        self._step(batch, 0)
        seen = 0
        for position in range(1, count + 1):
            self._step(batch, position)
            if temperature:
                self._draw(rows, position, temperature, rng)
            if position % self._options.eos_interval_steps == 0 or position == count:
                ids[:, seen + 1 : position + 1] = self._look(seen + 1, position, rows)
                seen = position
                if finished_rows(ids).all():
                    break
        return blank_after_eos(ids, config.pad_id)

    def _batch(self, rows: int) -> int:
        """Rows that are run: a power of two, or all that the graph takes."""
        rounded = max(1 << (rows - 1).bit_length(), self._graph.minima["P"])
        return min(rounded, self._most)

    def _step(self, batch: int, position: int) -> None:
        """Run one position: replayed if it was recorded, else run and recorded."""
        recorded = self._recorded.get((batch, position))
        if recorded is not None:
            recorded.launch()
            self.steps_replayed += 1
            return
        executor = self._bound(batch, position)
        executor.enqueue()
        self.steps_enqueued += 1
        if self._record:
            self._try_to_record(executor, batch, position)

    def _try_to_record(self, executor: DeviceExecutor, batch: int, position: int) -> None:
        """Record the step that was just run; it is not run again by that."""
        if not executor.can_record():
            # The first time, TensorRT-RTX may still compile for these shapes.
            self._note_refusal(batch, position)
            return
        try:
            recording = executor.record(self._memory, self._stream, lambda: None)
        except SessionError as exc:
            self._record = False
            logger.warning("CUDA graphs are off, captions take longer: %s", str(exc))
            return
        self._recorded[batch, position] = recording

    def _note_refusal(self, batch: int, position: int) -> None:
        """Say once that steps stay unrecorded; they are tried again all the same."""
        if (batch, position) in self._refused and not self._told:
            self._told = True
            logger.warning(
                "captions take longer: graph %s cannot be recorded as a CUDA graph with %d rows, "
                "even after a run; if it is an engine, build it again with: tap-export build",
                self._graph.spec.name,
                batch,
            )
        self._refused.add((batch, position))

    def _bound(self, batch: int, position: int) -> DeviceExecutor:
        executor = self._executors.get(batch)
        if executor is None:
            # One per number of rows: a recorded graph is void once its context's shapes change.
            executor = self._graph.executor(self._stream, self._scratch)
            self._executors[batch] = executor
        executor.set_sizes({"P": batch, "T": self._config.text_seq_len})
        slot_bytes = batch * self._bytes_per_row()
        written = position if position else self._config.text_seq_len
        for name, address in (
            (graphs.SEMANTIC_TOKENS, self._tokens),
            (graphs.INPUT_IDS, self._ids_row(max(0, position - 1))),
            (graphs.POSITION, self._positions.address + position * ALIGNMENT_BYTES),
            (graphs.PAST_KEY_VALUES, self._cache),
            (graphs.NEXT_IDS, self._ids_row(written)),
            (graphs.LOGITS, self._logits.address),
            (graphs.PRESENT_KEY_VALUES, self._cache + position * slot_bytes),
        ):
            executor.bind(name, address)
        return executor

    def _ids_row(self, position: int) -> int:
        return self._ids.address + position * self._row_bytes

    def _look(self, first: int, last: int, rows: int) -> np.ndarray:
        """Bring the ids of some positions to the host, int32 ``[rows, positions]``; waits."""
        self.looks += 1
        width = self._row_bytes // ID_BYTES
        whole = self._ids.view((self._config.text_seq_len + 1, width), "int32")
        fetched = whole[first : last + 1]
        self._memory.copy_to_host(fetched, self._ids_row(first), self._stream)
        self._memory.synchronize(self._stream)
        return fetched[:, :rows].T

    def _draw(self, rows: int, position: int, temperature: float, rng: np.random.Generator) -> None:
        """Replace the best tokens of a position by drawn ones; the host does it."""
        shape = (rows, self._config.vocab_size)
        logits = self._logits.download(shape, self._float, self._stream)
        self._memory.synchronize(self._stream)
        width = self._row_bytes // ID_BYTES
        whole = self._ids.view((self._config.text_seq_len + 1, width), "int32")
        whole[position, :rows] = sample(logits, temperature, rng)
        self._memory.copy_to_device(self._ids_row(position), whole[position], self._stream)

    def close(self) -> None:
        """Give recorded graphs and executors back; buffers have another owner."""
        while self._recorded:
            with contextlib.suppress(SessionError):
                self._recorded.popitem()[1].close()
        while self._executors:
            self._executors.popitem()[1].close()
