"""Steps: the PyTorch baseline with the same weights, from pictures to masks and ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.gpu.context import Context, Notes, Skipped, StepFailed
from benchmarks.gpu.latency import PROMPTS, is_wanted, timed
from tap_deploy.bench.pytorch import TorchStages, prepared
from tap_deploy.bench.stages import Inputs
from tap_deploy.bench.tasks import CAPTION, DECODE, ENCODE, END_TO_END
from tap_deploy.config import VARIANTS, TapConfig
from tap_deploy.reference.synthetic import synthetic_model

FP32, TF32, FP16, COMPILED = "fp32", "tf32", "fp16", "compiled"


def run(context: Context, notes: Notes, mode: str) -> None:
    """Time the stages of ``latency`` in one mode."""
    if not torch.cuda.is_available():
        raise Skipped(f"torch {torch.__version__} sees no GPU; install one that was built for CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == TF32
    config = VARIANTS[context.model]
    stages = torch_stages(config, Inputs.random(config, max(PROMPTS)), mode, device="cuda")
    notes.put("conditions", {"torch": torch.__version__, "cuda": torch.version.cuda, "mode": mode})
    # Only the encoder is compiled; stages without it are the same as in fp16.
    kinds = (ENCODE, END_TO_END) if mode == COMPILED else (ENCODE, DECODE, CAPTION, END_TO_END)
    for task in filter(is_wanted, stages.tasks(kinds, PROMPTS)):
        notes.add("stages", timed(task, context.seconds))
    notes.put("peak_bytes", torch.cuda.max_memory_allocated())


def torch_stages(config: TapConfig, inputs: Inputs, mode: str, device: str) -> TorchStages:
    """Return the stages of a synthetic model; captions ignore EOS.

    Args:
        config: configuration of the model.
        inputs: inputs with as many prompts as the largest stage.
        mode: ``fp32``, ``tf32``, ``fp16`` or ``compiled`` (fp16 with ``torch.compile``).
        device: torch device.

    Raises:
        StepFailed: the masks are not finite.
    """
    model: Any = synthetic_model(config, 0).to(device)
    model = prepared(
        model,
        dtype=torch.float16 if mode in (FP16, COMPILED) else None,
        compiled=mode == COMPILED,
    )
    most = len(inputs.labels)
    stages = TorchStages(model, config, inputs, chunk_sizes=(most, most), stop_at_eos=False)
    if not np.isfinite(stages.masks).all():
        raise StepFailed(f"PyTorch's masks are not finite in mode {mode}")
    return stages
