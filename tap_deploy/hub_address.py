"""The address of a bundle on the model hub: ``hf://OWNER/NAME@REVISION``."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from tap_deploy.errors import InputError

# ``pathlib`` makes one slash of two.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubAddress:
    """Where a bundle lies on the hub.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: branch, tag or commit; None for the default branch.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> HubAddress:
        """Read an address.

        Raises:
            InputError: it is none.
        """
        found = _ADDRESS.fullmatch(os.fspath(text))
        if found is None:
            raise InputError(
                f"{os.fspath(text)!r} is not the address of a bundle; expected "
                "hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
            )
        return cls(repository=found["repository"], revision=found["revision"])

    @classmethod
    def of_snapshot(cls, path: pathlib.Path) -> HubAddress | None:
        """Return the address of a folder in the cache of the hub; None for any other folder."""
        folder = pathlib.Path(os.path.realpath(path))
        cached = folder.parent.parent.name
        if folder.parent.name != "snapshots" or not cached.startswith("models--"):
            return None
        repository = cached.removeprefix("models--").replace("--", "/", 1)
        return cls(repository=repository, revision=folder.name)

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repository}{at}"


def is_hub_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant as an address on the hub."""
    return os.fspath(path).startswith("hf:/")
