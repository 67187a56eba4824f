"""Golden samples: inputs of every graph and what the PyTorch reference answers to them.

A sample travels in every bundle, so that a device without torch can check itself.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from tap_deploy.errors import BundleError
from tap_deploy.files import atomic_file


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GoldenSample:
    """One or more pictures, and prompts on the first of them.

    images: uint8 ``[B, S, S, 3]`` BGR, model frame.
    image_embeddings: float32 ``[B, C, grid, grid]``.
    point_coords: float32 ``[P, N, 2]`` XY, pixels of the model frame.
    point_labels: int32 ``[P, N]``.
    low_res_masks: float32 ``[P, M, 4 grid, 4 grid]``, logits.
    iou_predictions: float32 ``[P, M]``.
    semantic_tokens: float32 ``[P, M, C]``.
    semantic_embeddings: float32 ``[P, M, E]``.
    mask_index: int64 ``[P]``, the chosen mask token.
    caption_ids: int64 ``[P, text_seq_len - 1]``, greedy, not stopped at EOS.
    logits: float32 ``[P, steps, V]`` of the text decoder, or its largest ones ``[P, steps, 1]``
        where a whole vocabulary would be too much to carry.
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
        """Sizes of the sample, to tell it from others in a report."""
        return f"B={len(self.images)} P={self.point_coords.shape[0]} N={self.point_coords.shape[1]}"

    @property
    def chosen_tokens(self) -> np.ndarray:
        """Semantic tokens that the captions are made from, float32 ``[P, C]``."""
        chosen: np.ndarray = self.semantic_tokens[np.arange(len(self.mask_index)), self.mask_index]
        return chosen

    def compact(self) -> GoldenSample:
        """Return the sample with the largest logit of each step only."""
        return dataclasses.replace(self, logits=self.logits.max(axis=-1, keepdims=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to a compressed ``.npz`` file."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GoldenSample:
        """Read a file that ``save`` wrote.

        Raises:
            BundleError: the file is not such a file.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in names})
        except (OSError, ValueError, KeyError) as exc:
            raise BundleError(f"golden samples in {path} cannot be read: {exc}") from exc
