"""The published model: weights and concepts from the hub, the tokenizer from this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import pathlib

from tap_deploy.errors import CheckpointError, InputError
from tap_deploy.hub.downloads import fetch_file
from tap_deploy.hub_address import HubAddress
from tap_deploy.published_files import (
    CONCEPTS,
    REPOSITORY,
    PublishedCheckpoint,
    concepts_path,
)
from tap_deploy.storage.files import CHUNK_BYTES
from tap_deploy.storage.regular_files import open_regular

_TOKENIZER = "modeling/text_tokenizer.model"
WHERE_THE_TOKENIZER_IS = (
    "the tokenizer of the captions comes with the authors' code: pip install --no-deps "
    f"git+https://github.com/baaivision/tokenize-anything, or take tokenize_anything/{_TOKENIZER} "
    "from there and pass it with --tokenizer"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchedModel:
    """Files of a published model.

    Attributes:
        name: such as ``tap_vit_b_v1_1``.
        checkpoint: its weights.
        md5: MD5 of the weights, hexadecimal.
        concepts: concept weights; None if they were not asked for.
        commit: commit of the repository.
    """

    name: str
    checkpoint: pathlib.Path
    md5: str
    concepts: pathlib.Path | None
    commit: str


def fetch_published(
    published: PublishedCheckpoint, *, concepts: str | None, revision: str | None = None
) -> FetchedModel:
    """Download what is not in the cache yet, and check the MD5 of the weights.

    Args:
        published: the checkpoint.
        concepts: one of ``CONCEPTS``; None for none.
        revision: branch, tag or commit of the repository; None for the default branch.

    Raises:
        CheckpointError: the MD5 is not the published one; the file is removed from the cache.
        HubError: see ``fetch_file``.
        InputError: unknown concepts.
        MissingDependencyError: huggingface_hub is not installed.
    """
    if concepts is not None and concepts not in CONCEPTS:
        raise InputError(f"unknown concepts {concepts!r}; expected one of {', '.join(CONCEPTS)}")
    checkpoint = fetch_file(REPOSITORY, published.paths, revision=revision, large=True)
    md5 = _checked_md5(checkpoint, published)
    address = HubAddress.of_snapshot(checkpoint.parents[1])
    commit = "" if address is None else str(address.revision)
    vocabulary = None
    if concepts is not None:  # from the same commit
        vocabulary = fetch_file(REPOSITORY, (concepts_path(concepts),), revision=commit or revision)
    return FetchedModel(
        name=published.name, checkpoint=checkpoint, md5=md5, concepts=vocabulary, commit=commit
    )


def installed_tokenizer() -> pathlib.Path | None:
    """Return the tokenizer in an installed ``tokenize_anything``, which is not imported."""
    spec = importlib.util.find_spec("tokenize_anything")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        path = pathlib.Path(folder, _TOKENIZER)
        if path.is_file():
            return path
    return None


def require_tokenizer() -> pathlib.Path:
    """Return the tokenizer in an installed ``tokenize_anything``.

    Raises:
        InputError: it is not installed; the message says where the tokenizer is.
    """
    found = installed_tokenizer()
    if found is None:
        raise InputError(f"no tokenizer: {WHERE_THE_TOKENIZER_IS}")
    return found


def _checked_md5(path: pathlib.Path, published: PublishedCheckpoint) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open_regular(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    md5 = digest.hexdigest()
    if md5.startswith(published.md5_prefix):
        return md5
    for damaged in {path.resolve(), path}:
        with contextlib.suppress(OSError):
            damaged.unlink()
    raise CheckpointError(
        f"{published.name} from {REPOSITORY} has MD5 {md5}, expected {published.md5_prefix}…: it "
        "is damaged, or not the published file; it was removed from the cache; fetch it again"
    )
