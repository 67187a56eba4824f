"""Golden samples: inputs of every graph with the outputs of the PyTorch reference.

Every bundle contains them, so that results can be verified on a device without torch. They hold
prompts of several numbers and lengths with every ``PointLabel``, and tokens from the whole
vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tap_deploy.config import MASK_UPSCALE, NUM_POINT_LABELS, TapConfig
from tap_deploy.errors import BundleError
from tap_deploy.storage.archives import arrays_from_npz
from tap_deploy.storage.files import atomic_file

Layout = Mapping[str, tuple[str, tuple[str | int, ...]]]

# Columns of ``logit_digest``.
DIGEST_SIZE = 16
# Most samples in a file; it bounds what a reader takes from an untrusted one.
MOST_SAMPLES = 16

# dtype and axes of every array; axes with the same name have the same size. The axes of a sample
# that start with P or N are its own.
_PICTURES: Layout = {
    "images": ("uint8", ("B", "S", "S", 3)),
    "image_embeddings": ("float32", ("B", "C", "grid", "grid")),
}
_PROMPTS: Layout = {
    "point_coords": ("float32", ("P", "N", 2)),
    "point_labels": ("int32", ("P", "N")),
    "low_res_masks": ("float32", ("P", "M", "L", "L")),
    "iou_predictions": ("float32", ("P", "M")),
    "semantic_tokens": ("float32", ("P", "M", "C")),
    "semantic_embeddings": ("float32", ("P", "M", "E")),
    "mask_index": ("int64", ("P",)),
    "caption_ids": ("int64", ("P", "T")),
}
_TEXT: Layout = {
    "semantic_tokens": ("float32", ("R", "C")),
    "input_ids": ("int64", ("R", "steps")),
    "next_ids": ("int64", ("R", "steps")),
    "logit_digests": ("float32", ("R", "steps", DIGEST_SIZE)),
}
# Fields of ``Golden`` with these arrays.
_TEXTS = ("captions", "vocabulary")


def logit_digest(logits: np.ndarray) -> np.ndarray:
    """Return 16 projections of logits on fixed signs, float32 ``[..., 16]``.

    Every logit contributes to each, so a wrong or swapped row of the output layer changes them, in
    a fraction of the space. Their magnitude is that of the logits, if these have no common offset.

    Args:
        logits: float ``[..., V]``.
    """
    digest: np.ndarray = (logits.astype(np.float64) @ _signs(logits.shape[-1])).astype(np.float32)
    return digest


@functools.lru_cache(maxsize=4)
def _signs(size: int) -> np.ndarray:
    """Return random signs with rows of unit variance, float64 ``[size, DIGEST_SIZE]``."""
    # The raw output of a bit generator is the same in every release of NumPy.
    words = np.random.PCG64(size).random_raw(-(-size * DIGEST_SIZE // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: size * DIGEST_SIZE]
    signs: np.ndarray = (bits.reshape(size, DIGEST_SIZE) * 2.0 - 1) / np.sqrt(size)
    return signs


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
        picture: name of the picture; empty for made ones.
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
    picture: str = ""

    @property
    def name(self) -> str:
        """Picture and sizes of the sample, to identify it in a report."""
        prompts, points = self.point_labels.shape
        return f"{self.picture} B={len(self.images)} P={prompts} N={points}".lstrip()

    @property
    def chosen_tokens(self) -> np.ndarray:
        """Semantic tokens of the selected masks, input of the captions, float32 ``[P, C]``."""
        chosen: np.ndarray = self.semantic_tokens[np.arange(len(self.mask_index)), self.mask_index]
        return chosen

    def first_prompts(self, count: int) -> GoldenSample:
        """Return the sample with its first prompts only; prompts do not affect each other."""
        return dataclasses.replace(self, **{name: getattr(self, name)[:count] for name in _PROMPTS})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GoldenText:
    """Steps of the text decoder on given tokens, and what the reference makes of them.

    Attributes:
        semantic_tokens: float32 ``[R, C]``.
        input_ids: tokens at the positions 1, 2, …, int64 ``[R, text_seq_len - 2]``.
        next_ids: likeliest token after each of them, int64 ``[R, text_seq_len - 2]``.
        logit_digests: ``logit_digest`` after each of them, float32 ``[R, text_seq_len - 2, 16]``.
    """

    semantic_tokens: np.ndarray
    input_ids: np.ndarray
    next_ids: np.ndarray
    logit_digests: np.ndarray

    @classmethod
    def concatenate(cls, texts: Sequence[GoldenText]) -> GoldenText:
        """Return the rows of all texts."""
        return cls(**{name: np.concatenate([getattr(t, name) for t in texts]) for name in _TEXT})

    def rows(self, wanted: slice | np.ndarray) -> GoldenText:
        """Return the rows of a slice or of indices; rows do not affect each other."""
        return GoldenText(**{name: getattr(self, name)[wanted] for name in _TEXT})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """Samples with the same pictures, and steps of the text decoder.

    Attributes:
        samples: prompts on the first picture, in several sizes.
        captions: the greedy captions of all prompts in turn.
        vocabulary: tokens from the whole vocabulary, each at most once; None for the pictures of a
            user, which do not need them again.
    """

    samples: tuple[GoldenSample, ...]
    captions: GoldenText
    vocabulary: GoldenText | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to a compressed ``.npz`` file; the pictures once."""
        arrays: dict[str, Any] = {"num_samples": np.array(len(self.samples))}
        arrays |= {name: getattr(self.samples[0], name) for name in _PICTURES}
        for index, sample in enumerate(self.samples):
            arrays |= {f"{index}/{name}": getattr(sample, name) for name in _PROMPTS}
        for kind in _TEXTS:
            arrays |= {f"{kind}/{name}": getattr(getattr(self, kind), name) for name in _TEXT}
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: TapConfig) -> Golden:
        """Read a file that ``save`` wrote.

        Args:
            path: the file.
            config: sizes of the model, which the samples must have.

        Raises:
            BundleError: the file cannot be read, or its arrays have the wrong dtype or shape.
        """
        try:
            return cls._read(path, config)
        except ValueError as exc:
            raise BundleError(
                f"golden samples in {path} cannot be read: {exc}; export the bundle again"
            ) from exc

    @classmethod
    def _read(cls, path: str | os.PathLike[str], config: TapConfig) -> Golden:
        number = arrays_from_npz(path, ("num_samples",))["num_samples"]
        if number.shape != () or not 1 <= number <= MOST_SAMPLES:
            raise ValueError(f"num_samples is {number}; expected 1 to {MOST_SAMPLES}")
        prefixes = [f"{index}/" for index in range(int(number))]
        names = [*_PICTURES]
        names += [f"{kind}/{name}" for kind in _TEXTS for name in _TEXT]
        names += [prefix + name for prefix in prefixes for name in _PROMPTS]
        arrays = arrays_from_npz(path, names)
        sizes = _sizes(config)
        _check_layout(arrays, "", _PICTURES, sizes)
        for prefix in prefixes:
            _check_layout(arrays, prefix, _PROMPTS, dict(sizes))
            _check_values(arrays, prefix, ("point_labels", "mask_index", "caption_ids"), sizes)
        for kind in _TEXTS:
            _check_layout(arrays, f"{kind}/", _TEXT, dict(sizes))
            _check_values(arrays, f"{kind}/", ("input_ids", "next_ids"), sizes)
        pictures: dict[str, Any] = {name: arrays[name] for name in _PICTURES}
        return cls(
            samples=tuple(
                GoldenSample(**pictures | {name: arrays[prefix + name] for name in _PROMPTS})
                for prefix in prefixes
            ),
            **{
                kind: GoldenText(**{name: arrays[f"{kind}/{name}"] for name in _TEXT})
                for kind in _TEXTS
            },
        )


def _sizes(config: TapConfig) -> dict[str | int, int]:
    """Return the sizes of the axes that the config fixes."""
    return {
        "S": config.image_size,
        "C": config.image_embed_dim,
        "grid": config.grid_size,
        "L": MASK_UPSCALE * config.grid_size,
        "M": config.num_mask_tokens,
        "E": config.sem_embed_dim,
        "T": config.text_seq_len - 1,
        "steps": config.max_new_tokens,
        "V": config.vocab_size,
    }


def _check_layout(
    arrays: Mapping[str, np.ndarray], prefix: str, layout: Layout, sizes: dict[str | int, int]
) -> None:
    """Check dtypes and shapes, and add the sizes of unknown axes to ``sizes``.

    Raises:
        ValueError: an array does not match.
    """
    for name, (dtype, axes) in layout.items():
        array = arrays[prefix + name]
        fits = array.dtype == np.dtype(dtype) and array.ndim == len(axes) and array.size > 0
        if not fits or not all(
            size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
            for axis, size in zip(axes, array.shape, strict=True)
        ):
            known = {axis: sizes[axis] for axis in axes if axis in sizes}
            raise ValueError(
                f"{prefix}{name} is {array.dtype} {list(array.shape)}; expected {dtype} "
                f"[{', '.join(map(str, axes))}], not empty, with {known or 'any sizes'}"
            )


def _check_values(
    arrays: Mapping[str, np.ndarray],
    prefix: str,
    names: Sequence[str],
    sizes: Mapping[str | int, int],
) -> None:
    """Check the range of codes and indices.

    Raises:
        ValueError: a value is out of range.
    """
    counts = {"point_labels": NUM_POINT_LABELS, "mask_index": sizes["M"]}
    for name in names:
        array, count = arrays[prefix + name], counts.get(name, sizes["V"])
        if array.min() < 0 or array.max() >= count:
            raise ValueError(
                f"{prefix}{name} holds {array.min()} to {array.max()}; expected 0 to {count - 1}"
            )
