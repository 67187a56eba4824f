"""Downloads of large files that go on in the next process where a stopped one ended.

huggingface_hub goes on with a download within a process only: each has a temporary file of its
own, which the next one neither knows nor finds. Here the file is named after its content, in the
folder of huggingface_hub's cache where ``hf_hub_download`` looks for contents that it has already.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from tap_deploy.hub.calls import SENDER


def complete_content(hub: Any, repository: str, path: str, *, revision: str | None) -> None:
    """Download what the cache lacks of a file, so that ``hf_hub_download`` finds its content.

    What a stopped download has stays as ``blobs/ETAG.incomplete``. The ETag is a digest of the
    content, so what is added belongs to it.

    Args:
        hub: the module huggingface_hub.
        repository: ``OWNER/NAME``.
        path: path of the file in the repository.
        revision: branch, tag or commit; None for the default branch.

    Raises:
        Exception: what huggingface_hub raises.
    """
    wanted = hub.hf_hub_download(repository, path, revision=revision, dry_run=True, **SENDER)
    if not wanted.will_download or wanted.file_size is None:
        return
    url = hub.hf_hub_url(repository, path, revision=wanted.commit_hash)
    etag = hub.get_hf_file_metadata(url, **SENDER).etag
    below = len(pathlib.PurePosixPath(path).parts)  # snapshots/COMMIT/PATH
    blob = pathlib.Path(wanted.local_path).parents[below + 1] / "blobs" / etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{etag}.incomplete")
    with _locked(partial) as file:
        if blob.exists():  # another process was quicker
            return
        if file.seek(0, os.SEEK_END) > wanted.file_size:
            file.truncate(0)
        hub.file_download.http_get(
            url,
            file,
            resume_size=file.seek(0, os.SEEK_END),
            headers=hub.utils.build_hf_headers(**SENDER) | {"Accept-Encoding": "identity"},
            expected_size=wanted.file_size,
            displayed_filename=path,
        )
        file.flush()
        os.replace(partial, blob)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Open a file to add to it, after any other process that does; without locks, at once."""
    with path.open("ab") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
