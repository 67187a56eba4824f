"""Uploads of a folder to a repository on the hub."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

from tap_deploy.errors import HubError
from tap_deploy.hub.calls import SENDER, Subject, hub_calls
from tap_deploy.hub_address import HubAddress


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Where and how to publish.

    Attributes:
        repository: ``OWNER/NAME``; made if there is none.
        private: only its owners may read it.
        branch: branch, made if there is none; None for the default branch.
        message: message of the commit.
    """

    repository: str
    private: bool = False
    branch: str | None = None
    message: str


def push_files(
    folder: pathlib.Path, names: Collection[str], options: PushOptions
) -> tuple[HubAddress, str]:
    """Upload files in one commit; files that the repository has already are not sent again.

    Args:
        folder: where the files are.
        names: their paths in it, and in the repository.
        options: the target.

    Returns:
        The address with the commit, and the URL of the commit.

    Raises:
        HubError: the upload failed, or a private one would have been public, or the repository
            ignores some of the files.
        MissingDependencyError: huggingface_hub is not installed.
    """
    repository = options.repository
    subject = Subject(repository=repository, revision=options.branch, writes=True)
    with hub_calls(subject) as hub:
        api = hub.HfApi(**SENDER)
        _prepare(api, options)
        operations = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name))
            for name in names
        ]
        commit = api.create_commit(
            repository, operations, commit_message=options.message, revision=options.branch
        )
        stored = set(api.list_repo_files(repository, revision=commit.oid))
    if missing := sorted({*names} - stored):
        raise HubError(
            f"{repository} did not take {', '.join(missing[:3])}: its .gitignore excludes "
            f"{'it' if len(missing) == 1 else 'them'}; remove that line there, and push again"
        )
    return HubAddress(repository=repository, revision=commit.oid), str(commit.commit_url)


def _prepare(api: Any, options: PushOptions) -> None:
    """Make the repository and the branch, unless they exist."""
    repository = options.repository
    api.create_repo(repository, private=True if options.private else None, exist_ok=True)
    if options.private and not api.repo_info(repository).private:
        raise HubError(
            f"{repository} exists and is public, expected a private one; nothing was sent; make it "
            "private on the hub, or choose another name"
        )
    if options.branch is not None:
        api.create_branch(repository, branch=options.branch, exist_ok=True)
