"""Moves of several files into and out of a folder: all of them, or none."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from tap_deploy.storage.files import new_folder
from tap_deploy.storage.sync import sync_folder


class Moves:
    """Files that were moved; see ``moves_into``."""

    def __init__(
        self, root: pathlib.Path, aside: pathlib.Path, folders: contextlib.ExitStack
    ) -> None:
        self._root, self._aside, self._folders = root, aside, folders
        self._done: list[tuple[pathlib.Path, pathlib.Path]] = []

    def take_out(self, name: str) -> None:
        """Move a file out of the folder; nothing happens if there is none."""
        target = self._aside / name
        if os.path.lexists(self._root / name):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._move(self._root / name, target)

    def put_in(self, source: pathlib.Path, name: str) -> None:
        """Move a file to a name in the folder, instead of the one that has it."""
        self.take_out(name)
        self._folders.enter_context(new_folder((self._root / name).parent))
        self._move(source, self._root / name)

    def replace(self, source: pathlib.Path, name: str, undone: pathlib.Path) -> None:
        """Move a file to a name in the folder that is never without a file.

        Args:
            source: the file.
            name: the name, which another file has.
            undone: the file that takes its place if the moves are undone.
        """
        self._done.append((self._root / name, undone))
        os.replace(source, self._root / name)
        sync_folder((self._root / name).parent)

    def sync(self) -> None:
        """Wait until the names of all files are on the disk."""
        for folder in {path.parent for move in self._done for path in move}:
            sync_folder(folder)

    def undo(self) -> None:
        """Move every file back, the last one first."""
        while self._done:
            before, now = self._done[-1]
            with contextlib.suppress(FileNotFoundError):  # it was not moved yet
                os.replace(now, before)
            self._done.pop()
        sync_folder(self._root)

    def _move(self, source: pathlib.Path, target: pathlib.Path) -> None:
        # Noted first: a signal may end this function as soon as the file has moved.
        self._done.append((source, target))
        os.rename(source, target)


@contextlib.contextmanager
def moves_into(root: pathlib.Path, aside: pathlib.Path) -> Iterator[Moves]:
    """Yield moves, which are undone if the block raises; also folders that were made go.

    Args:
        root: the folder.
        aside: a folder on the same file system, for what is taken out; the caller removes it.

    Raises:
        OSError, InputError: a file cannot be moved.
    """
    with contextlib.ExitStack() as folders:
        moves = Moves(root, aside, folders)
        try:
            yield moves
        except BaseException:
            moves.undo()
            raise
