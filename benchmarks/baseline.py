"""PyTorch eager baseline: the reference model on the same inputs and machine."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.stages import CAPTION, DECODE, ENCODE, Inputs, Stage
from tap_deploy.config import TapConfig
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.masks import select_mask_token
from tap_deploy.reference.checkpoint import load_checkpoint


class TorchBaseline:
    """The stages on the reference model, on the GPU if ``on_gpu`` and PyTorch sees one.

    Args:
        checkpoint: the weights.
        config: configuration of the model.
        on_gpu: whether the measured backend runs on a GPU.
        threads: CPU threads of the measured backend; None for one per usable core.
    """

    def __init__(
        self, checkpoint: pathlib.Path, config: TapConfig, *, on_gpu: bool, threads: int | None
    ) -> None:
        torch.set_num_threads(threads or usable_cores())
        self.device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
        model, _ = load_checkpoint(checkpoint, config)
        self.model: Any = model.to(self.device).eval()
        self.config = config

    def with_baseline(self, stage: Stage, inputs: Inputs) -> Callable[[], object]:
        """Return the call in PyTorch that corresponds to a stage."""
        images = torch.from_numpy(inputs.images).to(self.device)
        coords, labels = (torch.from_numpy(a).to(self.device) for a in inputs.first(stage.prompts))
        with torch.inference_mode():
            embeddings = self.model.encode_image(images)
            tokens = self._tokens(embeddings, coords, labels)
        calls = {
            ENCODE: lambda: self.model.encode_image(images),
            DECODE: lambda: self.model.decode_prompts(embeddings, coords, labels),
            CAPTION: lambda: self.model.generate(tokens),
        }
        # Full-size masks are left out here, in favour of the baseline.
        whole = lambda: self.model.generate(  # noqa: E731
            self._tokens(self.model.encode_image(images), coords, labels)
        )
        call = calls.get(stage.kind, whole)
        return lambda: self._finished(call)

    def _tokens(self, embeddings: Any, coords: Any, labels: Any) -> Any:
        outputs = self.model.decode_prompts(embeddings, coords, labels)
        iou = outputs.iou_predictions.float().cpu().numpy()
        index = torch.from_numpy(select_mask_token(iou, labels.cpu().numpy())).to(self.device)
        return outputs.semantic_tokens[torch.arange(len(index), device=self.device), index]

    def _finished(self, call: Callable[[], object]) -> object:
        with torch.inference_mode():
            result = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result
