"""Baseline ``onnxruntime-plain``: the reference as torch.onnx exports it, run by onnxruntime.

Without the graphs of this project, their clean-up, and IO binding. Only the image encoder and the
prompt decoder: the caption loop of the reference is Python, which torch.onnx does not export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tap_deploy import graphs
from tap_deploy.bench.candidate import PLAIN, Candidate, Setup
from tap_deploy.bench.stages import Inputs, chunk_sizes, chunks
from tap_deploy.bench.tasks import DECODE, ENCODE, Task
from tap_deploy.bench.workloads import LVIS, Workload
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.image import model_image
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.masks import masks_from_logits, select_mask_token
from tap_deploy.precisions import FP32
from tap_deploy.reference.checkpoint import load_checkpoint
from tap_deploy.reference.model import TapModel
from tap_deploy.regions import Regions
from tap_deploy.sessions.ort.session import import_onnxruntime
from tap_deploy.storage.unfinished import temporary_folder


class PlainCandidate(Candidate):
    """Encoder and prompt decoder of the reference, exported by ``torch.onnx`` in this process."""

    def __init__(self, setup: Setup) -> None:
        """Export and load the graphs.

        Raises:
            InputError: the bundle under test does not run on the CPU.
            CheckpointError: the weights do not fit the bundle.
        """
        if not setup.run_on.on_cpu:
            raise InputError(f"{PLAIN} runs on the CPU only; omit it from --against")
        bundle = Bundle.open(setup.bundle, check_hashes=False)
        self.name, self.config, self.precision = PLAIN, bundle.config, FP32
        self.details = {"graphs": "torch.onnx, encoder and prompt decoder only"}
        self._vocabulary = bundle.vocabulary()
        self._decode_size, _ = chunk_sizes(self.config, None)
        assert setup.checkpoint is not None
        model, _ = load_checkpoint(setup.checkpoint, self.config)
        modules = (_Encoder(model), _Decoder(model))
        self._encoder, self._decoder = (
            session(module.eval(), spec, setup.run_on.threads or usable_cores())
            for module, spec in zip(modules, specs(self.config), strict=True)
        )

    @contextlib.contextmanager
    def stage_tasks(self, prompts: Sequence[int]) -> Iterator[list[Task]]:
        """Yield the stages ``encode`` and ``decode``."""
        inputs = Inputs.random(self.config, max(prompts))
        embeddings = self._encode(inputs.images)

        def decode(count: int) -> Task:
            return Task(
                kind=DECODE,
                prompts=count,
                tokens=0,
                call=lambda: self._decode(embeddings, *inputs.first(count)),
            )

        encode = Task(kind=ENCODE, prompts=1, tokens=0, call=lambda: self._encode(inputs.images))
        yield [encode, *map(decode, prompts)]

    def answers(self, workload: Workload) -> list[Regions]:
        """Run workload ``lvis`` once."""
        if workload.name != LVIS or workload.prompts is None:
            raise InputError(
                f"{PLAIN} has no captions; use --workload stage or lvis, or omit it from --against"
            )
        return [self._regions(picture, workload) for picture in workload.pictures]

    def close(self) -> None:
        """Drop the sessions."""
        del self._encoder, self._decoder

    def _encode(self, images: np.ndarray) -> np.ndarray:
        [embeddings] = self._encoder.run(None, {graphs.IMAGES: images})
        return np.asarray(embeddings)

    def _decode(
        self, embeddings: np.ndarray, coords: np.ndarray, labels: np.ndarray
    ) -> list[np.ndarray]:
        """Return masks, IoU, tokens and embeddings of the mask token that answers each prompt."""
        parts = []
        for chunk in chunks(len(labels), self._decode_size):
            feeds = (embeddings, coords[chunk], labels[chunk])
            names = (graphs.IMAGE_EMBEDDINGS, graphs.POINT_COORDS, graphs.POINT_LABELS)
            masks, ious, *tokens = self._decoder.run(None, dict(zip(names, feeds, strict=True)))
            index = select_mask_token(ious, labels[chunk])
            rows = np.arange(len(index))
            parts.append([array[rows, index] for array in (masks, ious, *tokens)] + [index])
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def _regions(self, picture: np.ndarray, workload: Workload) -> Regions:
        prompts = workload.prompts
        assert prompts is not None
        pixels, frame = model_image(picture, self.config.image_size)
        coords, labels = prompts.model_coords(frame.scale), prompts.labels
        decoded = self._decode(self._encode(pixels), coords, labels.astype(np.int32))
        logits, ious, tokens, embeddings, index = decoded
        named = self._vocabulary
        return Regions(
            masks=masks_from_logits(logits, frame),
            iou_predictions=ious,
            mask_index=index,
            concepts=None if named is None else named.top_k(embeddings, 1),
            captions=None,
            caption_ids=None,
            semantic_tokens=tokens,
            semantic_embeddings=embeddings,
            low_res_masks=logits,
            prompts=prompts,
            image_height=frame.height,
            image_width=frame.width,
        )


class _Encoder(nn.Module):
    def __init__(self, model: TapModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(images)


class _Decoder(nn.Module):
    def __init__(self, model: TapModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, embeddings: torch.Tensor, coords: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs = self.model.decode_prompts(embeddings, coords, labels)
        return (
            outputs.low_res_masks,
            outputs.iou_predictions,
            outputs.semantic_tokens,
            outputs.semantic_embeddings,
        )


def specs(config: TapConfig) -> tuple[GraphSpec, GraphSpec]:
    """Return names and axes of the plain graphs; the decoder returns all mask tokens."""
    known = graphs.graph_specs(config)
    encoder, decoder = known[graphs.IMAGE_ENCODER], known[graphs.PROMPT_DECODER]
    size, masks = config.image_size, config.num_mask_tokens
    low_res, channels = config.low_res_mask_size, config.image_embed_dim
    return (
        GraphSpec(
            encoder.name,
            inputs=(TensorSpec(graphs.IMAGES, "uint8", (1, size, size, 3)),),
            outputs=(decoder.inputs[0],),
        ),
        GraphSpec(
            decoder.name,
            inputs=decoder.inputs[:3],
            outputs=(
                TensorSpec(graphs.LOW_RES_MASKS, "float32", ("P", masks, low_res, low_res)),
                TensorSpec(graphs.IOU_PREDICTIONS, "float32", ("P", masks)),
                TensorSpec(graphs.SEMANTIC_TOKENS, "float32", ("P", masks, channels)),
                TensorSpec(
                    graphs.SEMANTIC_EMBEDDINGS, "float32", ("P", masks, config.sem_embed_dim)
                ),
            ),
        ),
    )


def session(module: nn.Module, spec: GraphSpec, threads: int) -> Any:
    """Export a module with ``torch.onnx`` and load it into onnxruntime on the CPU."""
    import onnx_ir as ir

    from tap_deploy.export.exporter import onnx_from_module

    onnxruntime = import_onnxruntime()
    with temporary_folder() as folder:
        path = folder / "plain.onnx"
        ir.save(onnx_from_module(module, spec), path, external_data="plain.onnx.bin")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
