"""Golden samples: inputs of every graph with the outputs of the PyTorch reference.

Every bundle contains one, so that results can be verified on a device without torch.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from tap_deploy.config import MASK_UPSCALE
from tap_deploy.errors import BundleError
from tap_deploy.storage.archives import arrays_from_npz
from tap_deploy.storage.files import atomic_file

# dtype and axes of every field; axes with the same name have the same size.
_LAYOUT: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "images": ("uint8", ("B", "S", "S", 3)),
    "image_embeddings": ("float32", ("B", "C", "grid", "grid")),
    "point_coords": ("float32", ("P", "N", 2)),
    "point_labels": ("int32", ("P", "N")),
    "low_res_masks": ("float32", ("P", "M", "L", "L")),
    "iou_predictions": ("float32", ("P", "M")),
    "semantic_tokens": ("float32", ("P", "M", "C")),
    "semantic_embeddings": ("float32", ("P", "M", "E")),
    "mask_index": ("int64", ("P",)),
    "caption_ids": ("int64", ("P", "T")),
    "logits": ("float32", ("P", "steps", "V")),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GoldenSample:
    """One or more pictures, and prompts on the first picture.

    Attributes:
        images: pictures in the model frame, uint8 BGR ``[B, S, S, 3]``.
        image_embeddings: float32 ``[B, C, grid, grid]``.
        point_coords: XY in pixels of the model frame, float32 ``[P, N, 2]``.
        point_labels: codes of ``PointLabel``, int32 ``[P, N]``.
        low_res_masks: logits, float32 ``[P, M, 4 grid, 4 grid]``.
        iou_predictions: float32 ``[P, M]``.
        semantic_tokens: float32 ``[P, M, C]``.
        semantic_embeddings: float32 ``[P, M, E]``.
        mask_index: selected mask token, int64 ``[P]``.
        caption_ids: greedy caption, not stopped at EOS, int64 ``[P, text_seq_len - 1]``.
        logits: logits of the text decoder, float32 ``[P, steps, V]``; or only the largest of each
            step, ``[P, steps, 1]``, to save space.
    """

    images: np.ndarray
    image_embeddings: np.ndarray
    point_coords: np.ndarray
    point_labels: np.ndarray
    low_res_masks: np.ndarray
    iou_predictions: np.ndarray
    semantic_tokens: np.ndarray
    semantic_embeddings: np.ndarray
    mask_index: np.ndarray
    caption_ids: np.ndarray
    logits: np.ndarray

    @property
    def name(self) -> str:
        """Sizes of the sample, to identify it in a report."""
        return f"B={len(self.images)} P={self.point_coords.shape[0]} N={self.point_coords.shape[1]}"

    @property
    def chosen_tokens(self) -> np.ndarray:
        """Semantic tokens of the selected masks, input of the captions, float32 ``[P, C]``."""
        chosen: np.ndarray = self.semantic_tokens[np.arange(len(self.mask_index)), self.mask_index]
        return chosen

    def compact(self) -> GoldenSample:
        """Return the sample with the largest logit of each step only."""
        return dataclasses.replace(self, logits=self.logits.max(axis=-1, keepdims=True))

    def first_prompts(self, count: int) -> GoldenSample:
        """Return the sample with its first prompts only; prompts do not affect each other."""
        return dataclasses.replace(
            self,
            **{
                name: getattr(self, name)[:count]
                for name, (_, axes) in _LAYOUT.items()
                if axes[0] == "P"
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to a compressed ``.npz`` file."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GoldenSample:
        """Read a file that ``save`` wrote.

        Raises:
            BundleError: the file cannot be read, or its arrays have the wrong dtype or shape.
        """
        try:
            arrays = arrays_from_npz(path, tuple(_LAYOUT))
            _check_layout(arrays)
        except ValueError as exc:
            raise BundleError(
                f"golden samples in {path} cannot be read: {exc}; export the bundle again"
            ) from exc
        return cls(**arrays)


def _check_layout(arrays: dict[str, np.ndarray]) -> None:
    """Check dtypes and shapes against ``_LAYOUT``.

    Raises:
        ValueError: an array does not match.
    """
    sizes: dict[str | int, int] = {}
    for name, (dtype, axes) in _LAYOUT.items():
        array = arrays[name]
        fits = array.dtype == np.dtype(dtype) and array.ndim == len(axes) and array.size > 0
        if not fits or not all(
            size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
            for axis, size in zip(axes, array.shape, strict=True)
        ):
            known = {axis: sizes[axis] for axis in axes if axis in sizes}
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}; expected {dtype} "
                f"[{', '.join(map(str, axes))}], not empty, with {known or 'any sizes'}"
            )
    side = MASK_UPSCALE * sizes["grid"]
    if sizes["L"] != side:
        raise ValueError(f"low_res_masks have side {sizes['L']}; expected {side}")
    if sizes["steps"] != sizes["T"] - 1:
        raise ValueError(f"logits have {sizes['steps']} steps; expected {sizes['T'] - 1}")
    index = arrays["mask_index"]
    if index.min() < 0 or index.max() >= sizes["M"]:
        raise ValueError(f"mask_index holds {index.tolist()}; expected 0 to {sizes['M'] - 1}")
