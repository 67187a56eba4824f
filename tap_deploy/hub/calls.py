"""Calls of huggingface_hub: its errors, log lines and progress bars, in the manner of this project.

Its own variables are honoured: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE`` and
more. It repeats failed requests, and goes on with a download whose connection broke; across
processes, see ``tap_deploy.hub.resumption``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from tap_deploy import __version__
from tap_deploy.errors import HubError, TapError, first_line
from tap_deploy.optional_modules import require_module

logger = logging.getLogger(__name__)
# What huggingface_hub logs when it repeats a request.
_REPEATED = ("thrown while requesting", "Retrying in", "Error while downloading")
HINT = "check the name and the revision"
# How this project introduces itself to the hub.
SENDER = {"library_name": "tap_deploy", "library_version": __version__}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is asked of the hub, for messages.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: branch, tag or commit; None for the default branch.
        file: path in the repository; None for all of it.
        hint: what to do if the file is not there.
        writes: whether the calls write to the repository.
    """

    repository: str
    revision: str | None = None
    file: str | None = None
    hint: str = HINT
    writes: bool = False

    def __str__(self) -> str:
        at = f"{self.repository}{'' if self.revision is None else f'@{self.revision}'}"
        return at if self.file is None else f"{self.file} of {at}"


@contextlib.contextmanager
def hub_calls(subject: Subject) -> Iterator[Any]:
    """Yield the module huggingface_hub for the calls in the block.

    Its warnings are logged by this project instead, unless ``HF_HUB_VERBOSITY`` is set, and its
    progress bars appear only on a terminal.

    Args:
        subject: what the calls are about.

    Raises:
        HubError: a call failed.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = require_module("huggingface_hub", "the model hub", "hub")
    try:
        with _forwarded_log(), _quiet_unless_seen(hub):
            yield hub
    except TapError:
        raise
    except Exception as exc:  # those of several HTTP libraries and of hf_xet, by version
        raise HubError(_reason(exc, hub, subject)) from exc


class _Forward(logging.Handler):
    """Logs the warnings of huggingface_hub as those of this project, each as one line."""

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if any(words in text for words in _REPEATED):
            logger.info("the connection to the model hub failed; trying again")
        elif record.levelno >= logging.WARNING:
            logger.warning("model hub: %s", text)


@contextlib.contextmanager
def _forwarded_log() -> Iterator[None]:
    if os.environ.get("HF_HUB_VERBOSITY") or os.environ.get("HF_DEBUG"):
        yield
        return
    theirs = logging.getLogger("huggingface_hub")
    handlers = theirs.handlers
    theirs.handlers = [_Forward()]
    try:
        yield
    finally:
        theirs.handlers = handlers


def _quiet_unless_seen(hub: Any) -> contextlib.AbstractContextManager[Any]:
    """Hide progress bars if nobody sees them; the variable of the user decides first."""
    seen = sys.stderr is not None and sys.stderr.isatty()
    if seen or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        return contextlib.nullcontext()
    quiet: contextlib.AbstractContextManager[Any] = hub.utils.disable_progress_bars()
    return quiet


def _reason(error: Exception, hub: Any, subject: Subject) -> str:
    """Return why a call failed, and what to do, as one line."""
    kinds, constants = hub.errors, hub.constants
    causes = list(_causes(error))

    def is_a(*names: str) -> bool:
        found = tuple(getattr(kinds, name) for name in names)
        return any(isinstance(cause, found) for cause in causes)

    responses = [cause for cause in causes if isinstance(cause, kinds.HfHubHTTPError)]
    if is_a("HFValidationError"):
        return f"{subject.repository!r} is not a repository: {first_line(error)}"
    if is_a("OfflineModeIsEnabled"):
        return (
            f"{subject} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
            "unset it to reach the model hub"
        )
    if is_a("GatedRepoError"):
        return (
            f"{subject.repository} is gated: accept its terms on {constants.ENDPOINT}/"
            f"{subject.repository}, and set HF_TOKEN to your token"
        )
    if is_a("RevisionNotFoundError"):
        return (
            f"{subject.repository} has no revision {subject.revision!r}; expected a branch, a tag "
            "or a commit"
        )
    if is_a("RemoteEntryNotFoundError"):
        at = "" if subject.revision is None else f" at revision {subject.revision}"
        return f"{subject.repository} has no {subject.file or 'such file'}{at}; {subject.hint}"
    if responses:
        return _refusal(responses[0], is_a("RepositoryNotFoundError"), constants.ENDPOINT, subject)
    root = causes[-1]
    if is_a("LocalEntryNotFoundError"):
        return (
            f"{constants.ENDPOINT} does not answer ({first_line(root)}), and {subject} is not in "
            f"the cache {constants.HF_HUB_CACHE}; check the network, and HF_ENDPOINT if you set it"
        )
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return (
            f"cannot store {subject} in the cache {constants.HF_HUB_CACHE}: {error.strerror}; "
            "set HF_HOME to a folder with more room that can be written"
        )
    return (
        f"the exchange with {constants.ENDPOINT} about {subject} broke off ({first_line(root)}); "
        "run the command again"
    )


def _refusal(error: Any, unknown: bool, endpoint: str, subject: Subject) -> str:
    """Return what the hub said, by the status of its answer."""
    status, text = error.response.status_code, getattr(error, "server_message", None)
    said = f" ({first_line(ValueError(text))})" if text else ""
    if subject.writes and status in (401, 403, 404):
        return (
            f"{endpoint} does not let you write to {subject.repository} (status {status}); set "
            "HF_TOKEN to a token that may write there, or run: hf auth login"
        )
    if unknown or status == 401:
        return (
            f"{endpoint} shows no repository {subject.repository}{said}: it does not exist, or you "
            "need a token that may use it; check the name, and set HF_TOKEN or run: hf auth login"
        )
    if status == 403:
        return (
            f"{endpoint} does not let you read {subject.repository} (status 403); set HF_TOKEN to "
            "a token that may use it"
        )
    return f"{endpoint} failed with status {status} on {subject}{said}; try again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
