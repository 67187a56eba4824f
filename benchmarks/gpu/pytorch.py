"""Steps: the PyTorch baseline with the same weights, from pictures to masks and ids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.engines import as_json
from benchmarks.gpu.context import Context, Notes, Skipped, StepFailed
from benchmarks.gpu.latency import PROMPTS, is_wanted
from benchmarks.stages import CAPTION, DECODE, ENCODE, END_TO_END, Inputs, Stage, steps_of
from tap_deploy.config import VARIANTS, TapConfig
from tap_deploy.image import Frame
from tap_deploy.masks import masks_from_logits, select_mask_token
from tap_deploy.reference.synthetic import synthetic_model
from tap_deploy.timing import measure

FP32, TF32, FP16, COMPILED = "fp32", "tf32", "fp16", "compiled"


def run(context: Context, notes: Notes, mode: str) -> None:
    """Time the stages of ``latency`` in one mode."""
    if not torch.cuda.is_available():
        raise Skipped(f"torch {torch.__version__} sees no GPU; install one that was built for CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == TF32
    config = VARIANTS[context.model]
    eager = Eager(config, Inputs.random(config, max(PROMPTS)), mode, device="cuda")
    notes.put("conditions", {"torch": torch.__version__, "cuda": torch.version.cuda, "mode": mode})
    # Only the encoder is compiled; stages without it are the same as in fp16.
    kinds = (ENCODE, END_TO_END) if mode == COMPILED else (ENCODE, DECODE, CAPTION, END_TO_END)
    for stage in filter(is_wanted, eager.stages(kinds, PROMPTS)):
        results = measure({mode: stage.call}, min_seconds=context.seconds)
        notes.add("stages", as_json(stage, results, mode))
        print(f"{stage.name}: {results[mode].median_ms:.3f} ms", flush=True)
    notes.put("peak_bytes", torch.cuda.max_memory_allocated())


class Eager:
    """The stages of ``benchmarks.stages`` in PyTorch, from host memory to host memory."""

    def __init__(self, config: TapConfig, inputs: Inputs, mode: str, device: str) -> None:
        """Make the model.

        Args:
            config: configuration of the model.
            inputs: inputs with as many prompts as the largest stage.
            mode: ``fp32``, ``tf32``, ``fp16`` or ``compiled`` (fp16 with ``torch.compile``).
            device: torch device.

        Raises:
            StepFailed: the masks are not finite.
        """
        self.config, self.inputs, self.device = config, inputs, device
        self.model: Any = synthetic_model(config, 0).to(device)
        self.half = mode in (FP16, COMPILED)
        if self.half:
            self.model = self.model.half()
            self.model.prompt_encoder.float()  # pixels up to 1024 need more than fp16's 11 bits
        if mode == COMPILED:
            self.model.image_encoder = torch.compile(self.model.image_encoder)
        self.frame = Frame.for_image(config.image_size, config.image_size, config.image_size)
        with torch.inference_mode():
            self.embeddings = self._encoded()
            masks, self.tokens = self._decoded(len(inputs.labels), self.embeddings)
        if not np.isfinite(masks).all():
            raise StepFailed(f"PyTorch's masks are not finite in mode {mode}")

    def stages(self, kinds: tuple[str, ...], prompts: tuple[int, ...]) -> list[Stage]:
        """Return the stages to time, in order."""
        calls: dict[str, Callable[[int], object]] = {
            ENCODE: lambda count: self.encode(),
            DECODE: self.decode,
            CAPTION: self.caption,
            END_TO_END: self.end_to_end,
        }
        return [
            self._stage(kind, count, calls[kind])
            for kind in kinds
            for count in ((1,) if kind == ENCODE else prompts)
        ]

    def _stage(self, kind: str, count: int, call: Callable[[int], object]) -> Stage:
        tokens = steps_of(self.caption(count), self.config) if kind in (CAPTION, END_TO_END) else 0
        return Stage(kind=kind, prompts=count, tokens=tokens, call=lambda: call(count))

    @torch.inference_mode()
    def encode(self) -> None:
        """Encode the picture; the embeddings stay on the device."""
        self._encoded()
        with contextlib.suppress(AssertionError):  # raised by torch without CUDA
            torch.cuda.synchronize()

    @torch.inference_mode()
    def decode(self, prompts: int) -> object:
        """Decode prompts to the chosen masks on the host."""
        return self._decoded(prompts, self.embeddings)

    @torch.inference_mode()
    def caption(self, prompts: int) -> np.ndarray:
        """Generate captions from semantic tokens to ids on the host, up to the maximum length."""
        ids = self.model.generate(self.tokens[:prompts], stop_at_eos=False)
        return np.asarray(ids.cpu().numpy())

    @torch.inference_mode()
    def end_to_end(self, prompts: int) -> object:
        """Run all stages: a picture to full-size masks and ids."""
        logits, tokens = self._decoded(prompts, self._encoded())
        ids = self.model.generate(tokens, stop_at_eos=False).cpu().numpy()
        return masks_from_logits(logits, self.frame), ids

    def _encoded(self) -> Any:
        return self.model.encode_image(torch.from_numpy(self.inputs.images).to(self.device))

    def _decoded(self, prompts: int, embeddings: Any) -> tuple[np.ndarray, Any]:
        """Return the chosen mask logits, float32 ``[P, S, S]`` on the host, and their tokens."""
        coords, labels = self.inputs.first(prompts)
        tensors = (torch.from_numpy(array).to(self.device) for array in (coords, labels))
        sparse = self.model.prompt_encoder(*tensors).to(embeddings.dtype)
        position = self.model.prompt_encoder.image_position_encoding().to(embeddings.dtype)
        outputs = self.model.image_decoder(embeddings, sparse, position)
        iou = outputs.iou_predictions.float().cpu().numpy()
        index = torch.from_numpy(select_mask_token(iou, labels)).to(self.device)
        rows = torch.arange(prompts, device=self.device)
        masks = outputs.low_res_masks[rows, index].float().cpu().numpy()
        return masks, outputs.semantic_tokens[rows, index]
