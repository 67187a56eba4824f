"""Downloads of single files and of snapshots into the cache of huggingface_hub."""

from __future__ import annotations

import contextlib
import glob
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from tap_deploy.hub.calls import HINT, SENDER, Subject, hub_calls
from tap_deploy.hub.resumption import complete_content
from tap_deploy.hub_address import HubAddress


def fetch_file(
    repository: str,
    paths: Iterable[str],
    *,
    revision: str | None = None,
    hint: str = HINT,
    large: bool = False,
) -> pathlib.Path:
    """Return a file of a repository; what is in the cache is not downloaded again.

    Args:
        repository: ``OWNER/NAME``.
        paths: paths of the file in the repository, by preference: it may have been renamed.
        revision: branch, tag or commit; None for the default branch.
        hint: what to do if there is none.
        large: go on with a download that was stopped; costs two short requests.

    Returns:
        Its path in the cache.

    Raises:
        HubError: the repository, the revision or the file does not exist, or may not be read; or
            the hub does not answer.
        MissingDependencyError: huggingface_hub is not installed.
    """
    first, *others = paths
    subject = Subject(repository=repository, revision=revision, file=first, hint=hint)
    with hub_calls(subject) as hub:
        try:
            return _downloaded(hub, repository, first, revision, large=large)
        except hub.errors.EntryNotFoundError as missing:
            # Without an answer of the hub, only the cache can have one of the others.
            unreachable = isinstance(missing, hub.errors.LocalEntryNotFoundError)
            for path in others:
                with contextlib.suppress(hub.errors.EntryNotFoundError):
                    return _downloaded(
                        hub, repository, path, revision, large=large, cached_only=unreachable
                    )
            raise


def _downloaded(
    hub: Any,
    repository: str,
    path: str,
    revision: str | None,
    *,
    large: bool,
    cached_only: bool = False,
) -> pathlib.Path:
    if large and not cached_only:
        complete_content(hub, repository, path, revision=revision)
    found = hub.hf_hub_download(
        repository, path, revision=revision, local_files_only=cached_only, **SENDER
    )
    return pathlib.Path(found)


def fetch_snapshot(
    address: HubAddress, index: str, listed: Callable[[pathlib.Path], Iterable[str]]
) -> pathlib.Path:
    """Return the folder of a commit with an index and the files that it lists.

    Args:
        address: where they are.
        index: name of a small file; without it, nothing else is downloaded.
        listed: returns the paths that the index lists; may raise a TapError.

    Returns:
        A folder in the cache, of links to files. Do not write to it.

    Raises:
        HubError: see ``fetch_file``.
        MissingDependencyError: huggingface_hub is not installed.
    """
    repository, revision = address.repository, address.revision
    hint = "it is not a bundle; publish one with: tap-export push"
    found = fetch_file(repository, (index,), revision=revision, hint=hint)
    names = list(listed(found))
    with hub_calls(Subject(repository=repository, revision=revision)) as hub:
        snapshot = hub.snapshot_download(
            repository,
            revision=found.parent.name,  # the commit: a branch may move meanwhile
            allow_patterns=[glob.escape(name) for name in names],
            **SENDER,
        )
    return pathlib.Path(snapshot)
