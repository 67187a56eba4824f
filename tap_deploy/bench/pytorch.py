"""PyTorch baselines: the reference model on the same inputs, device and threads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tap_deploy.bench.candidate import TORCH, TORCH_BF16, TORCH_COMPILE, Candidate, Setup
from tap_deploy.bench.stages import Inputs, chunk_sizes, chunks, steps_of
from tap_deploy.bench.tasks import CAPTION, DECODE, ENCODE, END_TO_END, Task
from tap_deploy.bench.workloads import EVERYTHING, Workload
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError, SessionError, first_line
from tap_deploy.image import Frame
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.masks import masks_from_logits, select_mask_token
from tap_deploy.precisions import FP32
from tap_deploy.reference.checkpoint import load_checkpoint
from tap_deploy.reference.predictor import ReferencePredictor
from tap_deploy.regions import Regions
from tap_deploy.sessions.run_on import RunOn

BF16 = "bf16"
PROMPTS_PER_CALL_ON_GPU = 64
ARITHMETIC = {
    TORCH: "eager, float32; TF32 off",
    TORCH_BF16: "eager, {bf16}; prompt encoder float32",
    TORCH_COMPILE: "float32; image encoder by torch.compile, the rest eager",
}


class TorchCandidate(Candidate):
    """The reference model in PyTorch, in one of ``TORCH_NAMES``."""

    def __init__(self, name: str, setup: Setup) -> None:
        """Load the weights.

        Raises:
            InputError: the bundle runs on a GPU that PyTorch does not see.
            CheckpointError: the weights do not fit the bundle.
        """
        bundle = Bundle.open(setup.bundle, check_hashes=False)
        self.name, self.config, self._tokens = name, bundle.config, setup.tokens
        self.device = _device(name, setup.run_on)
        self.precision = BF16 if name == TORCH_BF16 else FP32
        if self.device == "cpu":
            torch.set_num_threads(setup.run_on.threads or usable_cores())
        # cuDNN's convolutions use TF32 by default.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        assert setup.checkpoint is not None
        model, _ = load_checkpoint(setup.checkpoint, self.config)
        self._autocast = name == TORCH_BF16 and self.device == "cpu"
        self.model: Any = prepared(
            model.to(self.device).eval(),
            dtype=torch.bfloat16 if name == TORCH_BF16 and not self._autocast else None,
            compiled=name == TORCH_COMPILE,
        )
        if self._autocast:
            outside = torch.autocast("cpu", enabled=False)
            self.model.prompt_encoder.fourier_features = outside(
                self.model.prompt_encoder.fourier_features
            )
        way = "CPU autocast to bfloat16" if self._autocast else "weights in bfloat16"
        self.details = {
            "torch": torch.__version__,
            "device": self.device,
            "arithmetic": ARITHMETIC[name].format(bf16=way),
        }
        self._sizes = chunk_sizes(
            self.config, None if self.device == "cpu" else PROMPTS_PER_CALL_ON_GPU
        )
        self._predictor = ReferencePredictor(
            self.model, bundle.vocabulary(), bundle.tokenizer(), prompts_per_call=self._sizes[0]
        )

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=self._autocast),
        ):
            try:
                yield
            except (RuntimeError, NotImplementedError) as exc:
                raise SessionError(f"{self.name} failed: {first_line(exc)}") from exc

    def _scoped(self, task: Task) -> Task:
        """Return a task that enters the scope itself: other candidates must not run in it."""

        def call() -> object:
            with self._scope():
                return task.call()

        return dataclasses.replace(task, call=call)

    @contextlib.contextmanager
    def stage_tasks(self, prompts: Sequence[int]) -> Iterator[list[Task]]:
        """Yield the stages on the same inputs as a bundle."""
        inputs = Inputs.random(self.config, max(prompts))
        kinds = (ENCODE, DECODE, CAPTION, END_TO_END)
        with self._scope():
            stages = TorchStages(
                self.model, self.config, inputs, chunk_sizes=self._sizes, tokens=self._tokens
            )
            tasks = stages.tasks(kinds, prompts)
        yield [self._scoped(task) for task in tasks]

    def answers(self, workload: Workload) -> list[Regions]:
        """Run a workload once with ``ReferencePredictor``."""
        if workload.name == EVERYTHING or workload.prompts is None:
            raise InputError(f"{self.name} has no workload 'everything'; omit it from --against")
        with self._scope():
            return [
                self._predictor.predict(
                    picture,
                    prompts=workload.prompts,
                    top_k=1,
                    captions=workload.captions,
                    max_new_tokens=self._tokens,
                )
                for picture in workload.pictures
            ]

    def close(self) -> None:
        """Drop the model."""
        del self.model, self._predictor


def prepared(model: Any, *, dtype: torch.dtype | None, compiled: bool) -> Any:
    """Convert a model to a half precision, and compile its encoder."""
    if dtype is not None:
        model = model.to(dtype)
        model.prompt_encoder.float()  # pixels up to 1024 need 11 bits
    if compiled:
        model.image_encoder = torch.compile(model.image_encoder)
    return model


class TorchStages:
    """The stages of ``stages.stages`` in PyTorch, from host memory to host memory.

    Args:
        model: the model, on its device.
        config: configuration of the model.
        inputs: inputs with as many prompts as the largest stage.
        chunk_sizes: prompts per call of the prompt decoder and of the text decoder.
        tokens: maximum number of caption tokens; None for the model's limit.
        stop_at_eos: end captions at EOS; False for synthetic weights, which never agree on it.
    """

    def __init__(
        self,
        model: Any,
        config: TapConfig,
        inputs: Inputs,
        *,
        chunk_sizes: tuple[int, int],
        tokens: int | None = None,
        stop_at_eos: bool = True,
    ) -> None:
        self.model, self.config, self.inputs = model, config, inputs
        self.device = model.pixel_mean.device
        self._decode_size, self._caption_size = chunk_sizes
        self._limit: dict[str, Any] = {"max_new_tokens": tokens, "stop_at_eos": stop_at_eos}
        self.frame = Frame.for_image(config.image_size, config.image_size, config.image_size)
        with torch.inference_mode():
            self.embeddings = self._encoded()
            self.masks, self.tokens = self._decoded(self.embeddings, len(inputs.labels))

    def tasks(self, kinds: Sequence[str], prompts: Sequence[int]) -> list[Task]:
        """Return the tasks to time, in order."""
        calls: dict[str, Callable[[int], object]] = {
            ENCODE: lambda count: self.encode(),
            DECODE: self.decode,
            CAPTION: self.caption,
            END_TO_END: self.end_to_end,
        }
        return [
            self._task(kind, count, calls[kind])
            for kind in kinds
            for count in ((1,) if kind == ENCODE else prompts)
        ]

    def _task(self, kind: str, count: int, call: Callable[[int], object]) -> Task:
        tokens = steps_of(self.caption(count), self.config) if kind in (CAPTION, END_TO_END) else 0
        if self.device.type != "cuda":
            return Task(kind=kind, prompts=count, tokens=tokens, call=lambda: call(count))
        watch = _Stopwatch()
        return Task(
            kind=kind,
            prompts=count,
            tokens=tokens,
            call=lambda: watch.time(lambda: call(count)),
            gpu_ms=watch.elapsed_ms,
        )

    @torch.inference_mode()
    def encode(self) -> None:
        """Encode the picture; the embeddings stay on the device."""
        self._encoded()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def decode(self, prompts: int) -> object:
        """Decode prompts to the chosen masks on the host."""
        return self._decoded(self.embeddings, prompts)

    @torch.inference_mode()
    def caption(self, prompts: int) -> np.ndarray:
        """Generate captions from semantic tokens to ids on the host."""
        return self._captioned(self.tokens[:prompts])

    @torch.inference_mode()
    def end_to_end(self, prompts: int) -> object:
        """Run all stages: a picture to full-size masks and ids."""
        logits, tokens = self._decoded(self._encoded(), prompts)
        return masks_from_logits(logits, self.frame), self._captioned(tokens)

    def _captioned(self, tokens: Any) -> np.ndarray:
        parts = tokens.split(self._caption_size)
        ids = [self.model.generate(part, **self._limit).cpu().numpy() for part in parts]
        return np.concatenate(ids)

    def _encoded(self) -> Any:
        return self.model.encode_image(torch.from_numpy(self.inputs.images).to(self.device))

    def _decoded(self, embeddings: Any, prompts: int) -> tuple[np.ndarray, Any]:
        """Return the chosen mask logits, float32 ``[P, S, S]`` on the host, and their tokens."""
        masks, tokens = [], []
        coords, labels = self.inputs.first(prompts)
        for chunk in chunks(prompts, self._decode_size):
            arrays = (coords[chunk], labels[chunk])
            outputs = self.model.decode_prompts(
                embeddings, *(torch.from_numpy(array).to(self.device) for array in arrays)
            )
            iou = outputs.iou_predictions.float().cpu().numpy()
            index = torch.from_numpy(select_mask_token(iou, labels[chunk])).to(self.device)
            rows = torch.arange(len(index), device=self.device)
            masks.append(outputs.low_res_masks[rows, index].float().cpu().numpy())
            tokens.append(outputs.semantic_tokens[rows, index])
        return np.concatenate(masks), torch.cat(tokens)


class _Stopwatch:
    """Time on the GPU between the first and the last work of a call in the current stream."""

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], object]) -> object:
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        return result

    def elapsed_ms(self) -> float:
        return float(self._start.elapsed_time(self._end))


def _device(name: str, run_on: RunOn) -> str:
    if run_on.on_cpu:
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError(
            f"{name} needs a GPU like the bundle, but torch {torch.__version__} sees none; "
            "install a build of torch for CUDA, or omit it from --against"
        )
    return f"cuda:{run_on.resolved_device.index}"
