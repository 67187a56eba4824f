"""Reads and writes checkpoints: official ``.pkl``, torch ``.pth`` and ``.safetensors`` files."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tap_deploy.config import TapConfig
from tap_deploy.errors import CheckpointError, InputError
from tap_deploy.published_files import KNOWN_MD5_PREFIXES
from tap_deploy.reference.image_size import at_image_size
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.state import model_from_state_dict
from tap_deploy.reference.weight_files import READERS, WRITERS, detect_format
from tap_deploy.reference.weight_names import find_weights
from tap_deploy.storage.files import atomic_file
from tap_deploy.storage.regular_files import open_regular
from tap_deploy.storage.unpickle import printable

PathLike = str | os.PathLike[str]

HASH_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        state_dict: CPU tensors by name.
        sha256: SHA-256 of the file, hex digits.
        md5: MD5 of the file, hex digits.
        known_as: official file with the same MD5 prefix, such as ``tap_vit_l_v1_1``; None
            without one.
        format: ``pickle``, ``torch`` or ``safetensors``.
        removed: prefixes that were removed from the names in the file, such as
            ``model.module.``.
    """

    state_dict: dict[str, torch.Tensor] = dataclasses.field(repr=False)
    sha256: str
    md5: str
    known_as: str | None
    format: str
    removed: tuple[str, ...]


def read_checkpoint(path: PathLike) -> Checkpoint:
    """Read a checkpoint; the format is detected from the content, not from the suffix.

    No code from the file is executed. Tensors keep their dtype and are not copied. Keys and
    prefixes that training programs add to the names are removed, see ``find_weights``.

    Raises:
        UnsafeCheckpointError: the file asks for more than arrays, tensors and containers.
        CheckpointError: the file is missing, corrupt or of unknown format, or it does not contain
            arrays by name, or contains several models.
        MissingDependencyError: the file is a safetensors file, and safetensors is not installed.
    """
    path = Path(path)
    kind = detect_format(path)
    values, removed = find_weights(READERS[kind](path), printable(path))
    state = _tensors(values, printable(path))
    sha256, md5 = _digests(path)
    return Checkpoint(
        state_dict=state,
        sha256=sha256,
        md5=md5,
        known_as=KNOWN_MD5_PREFIXES.get(md5[:6]),
        format=kind,
        removed=removed,
    )


def load_checkpoint(
    path: PathLike, config: TapConfig, *, image_size: int | None = None
) -> tuple[TapModel, Checkpoint]:
    """Read a checkpoint into a float32 model on the CPU, ready for inference.

    Args:
        path: the file.
        config: sizes of the weights.
        image_size: size to run them at, see ``at_image_size``; None for that of ``config``.

    Returns:
        The model, and the checkpoint, whose ``state_dict`` is that of the model.

    Raises:
        CheckpointError: see ``read_checkpoint``; or the entries do not fit ``config``: some are
            missing, unexpected, of wrong shape or dtype, or not finite, or ``pixel_mean`` or
            ``pixel_rsig`` differ from ``Preprocessing``.
        InputError: the sizes in ``config`` exceed the limits of ``meta_model``, or ``image_size``
            does not fit them.
    """
    checkpoint = read_checkpoint(path)
    source = printable(path)
    if checkpoint.removed:
        source += f" (names read without {', '.join(checkpoint.removed)})"
    model = model_from_state_dict(checkpoint.state_dict, config, source=source)
    model = model if image_size is None else at_image_size(model, image_size)
    return model, dataclasses.replace(checkpoint, state_dict=dict(model.state_dict()))


def save_checkpoint(
    model_or_state_dict: torch.nn.Module | Mapping[str, torch.Tensor | np.ndarray[Any, Any]],
    path: PathLike,
) -> None:
    """Write weights in the format of the suffix; an existing file is replaced atomically.

    ``.pkl`` is the official format, a pickled dict of NumPy arrays; ``.pth`` and ``.pt`` are
    torch files; ``.safetensors`` is recommended for sharing.

    Raises:
        InputError: the suffix is not supported, or the file cannot be written.
        CheckpointError: the library of the format failed, for example on an unsupported dtype.
        MissingDependencyError: the suffix is ``.safetensors``, and safetensors is not installed.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise InputError(
            f"cannot save a checkpoint as {printable(path.name)}; expected a name that ends in "
            f"{', '.join(WRITERS)}"
        )
    values = model_or_state_dict
    payload = values.state_dict() if isinstance(values, torch.nn.Module) else values
    state = _tensors(payload, printable(path))
    try:
        with atomic_file(path) as partial:
            mode = partial.stat().st_mode
            WRITERS[path.suffix](state, partial)
            partial.chmod(mode)  # safetensors makes the file readable by its owner only
    except (TypeError, RuntimeError) as exc:
        raise CheckpointError(f"cannot write {printable(path)}: {printable(exc)}") from exc


def _tensors(values: Mapping[Any, Any], source: str) -> dict[str, torch.Tensor]:
    return {_name(key, source): _tensor(key, value, source) for key, value in values.items()}


def _name(key: Any, source: str) -> str:
    if type(key) is not str:
        raise CheckpointError(
            f"{source} contains an entry with a key of type {type(key).__name__}; expected names; "
            "check that it is a checkpoint of TAP"
        )
    return key


def _tensor(name: str, value: Any, source: str) -> torch.Tensor:
    """Return an entry as a dense CPU tensor, sharing the memory of ``value`` if possible."""
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.require(value, requirements="W"))
        except (TypeError, ValueError):
            found = f"an array of dtype {value.dtype}"
    elif isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not value.is_quantized and not value.is_meta:
            return value.detach().cpu()
        found = f"a tensor of layout {value.layout}"
    else:
        found = f"a {type(value).__name__}"
    raise CheckpointError(
        f"{source}: entry {printable(name)} is {found}; expected an array of numbers"
    )


def _digests(path: Path) -> tuple[str, str]:
    """Return SHA-256 and MD5 of a file, read once."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    try:
        with open_regular(path) as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                sha256.update(chunk)
                md5.update(chunk)
    except OSError as exc:
        raise CheckpointError(f"cannot read {printable(path)}: {printable(exc)}") from exc
    return sha256.hexdigest(), md5.hexdigest()
