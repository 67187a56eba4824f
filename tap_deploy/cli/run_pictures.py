"""Several pictures in one run: which they are, their boxes, and where the answers go."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
from PIL import Image

from tap_deploy.console.progress import clear_line, share_bar
from tap_deploy.errors import InputError, TapError
from tap_deploy.pictures.folders import find_pictures
from tap_deploy.pictures.source import ImageSource, PictureFile
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.storage.files import atomic_file, check_file_output, translated_writes

STDIN = "-"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A picture of a run.

    Attributes:
        name: what results are called after: the path below the folder that was searched, the
            file's name, or ``stdin``.
        argument: what the command line calls it.
        image: how it is read.
        named: whether the command line names the picture itself, not only a folder.
    """

    name: str
    argument: str
    image: PictureFile
    named: bool


def find_sources(
    arguments: Sequence[str],
    read: Callable[[str | bytes], PictureFile],
    without: pathlib.Path | None,
) -> list[Source]:
    """Return the pictures that the command line asks for, in its order.

    Args:
        arguments: paths of pictures and folders, and ``-`` for a picture on stdin.
        read: adds to a path or to the bytes of a picture how it is read.
        without: a folder for results, which is not searched.

    Raises:
        InputError: a folder holds no picture.
    """
    sources: list[Source] = []
    for argument in arguments:
        if argument == STDIN:
            if any(source.argument == STDIN for source in sources):
                raise InputError("- is named twice; stdin holds one picture")
            if sys.stdin is None:
                raise InputError("- is a picture on stdin, which is closed; pass a file")
            image = read(sys.stdin.buffer.read())
            sources.append(Source(name="stdin", argument=argument, image=image, named=True))
        elif os.path.isdir(argument):
            sources += _in_folder(pathlib.Path(argument), read, without)
        else:
            name = os.path.basename(argument)
            sources.append(Source(name=name, argument=argument, image=read(argument), named=True))
    return sources


def _in_folder(
    folder: pathlib.Path,
    read: Callable[[str | bytes], PictureFile],
    without: pathlib.Path | None,
) -> Iterator[Source]:
    own = None if without is None else without.resolve()
    for path in find_pictures(folder):
        if own is not None and path.resolve().is_relative_to(own):
            continue
        name = path.relative_to(folder).as_posix()
        yield Source(name=name, argument=str(path), image=read(str(path)), named=False)


class BoxFile:
    """Boxes XYXY from a JSON file: a list for every picture, or an object with one for each.

    Names in an object are those of ``Source``: ``name``, ``argument``, or the file's name where
    only one picture has it.
    """

    def __init__(self, path: pathlib.Path, sources: Sequence[Source]) -> None:
        """Read the boxes of these pictures.

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        self.path = path
        try:
            values = json.loads(path.read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as exc:
            raise InputError(f"boxes {path} cannot be read: {exc}") from exc
        named = values if isinstance(values, dict) else {None: values}  # None: every picture
        self._boxes = {name: self._prompts(name, boxes) for name, boxes in named.items()}
        self._files = collections.Counter(_file_name(source) for source in sources)
        self._used: set[str | None] = set()

    def _prompts(self, name: str | None, boxes: Any) -> Prompts:
        where = "" if name is None else f" of {name!r}"
        if not isinstance(boxes, list):
            raise InputError(
                f"boxes {self.path}{where}: expected a list [[x0, y0, x1, y1], …], or an object "
                'of such lists by picture, {"photo.jpg": [[…], …], …}'
            )
        try:
            return Prompts.from_boxes(boxes)
        except InputError as exc:
            raise InputError(f"boxes {self.path}{where}: {exc}") from exc

    def of(self, source: Source) -> Prompts | None:
        """Return the boxes of a picture; None if the file has none for it."""
        names: list[str | None] = [None, source.argument, source.name]
        if self._files[_file_name(source)] == 1:
            names.append(_file_name(source))
        for name in names:
            if name in self._boxes:
                self._used.add(name)
                return self._boxes[name]
        return None

    @property
    def unused(self) -> list[str]:
        """Names of pictures that ``of`` was not asked for."""
        return [str(name) for name in self._boxes if name not in self._used]


def _file_name(source: Source) -> str:
    return pathlib.PurePath(source.name).name


class Output:
    """Where the answers go: lines on stdout, or files in a folder.

    In the folder, ``<name>.json`` holds the answers to a picture, and ``<name>.png`` its overlay.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        *,
        as_json: bool,
        describe: Callable[[Regions], str],
        draw: Callable[[ImageSource, Regions], Image.Image] | None,
    ) -> None:
        """Take what turns answers into text and pictures; ``draw`` is None for no overlays."""
        self.folder, self._as_json = folder, as_json
        self._describe, self._draw = describe, draw

    def check(self, sources: Sequence[Source], *, force: bool) -> None:
        """Check before the work that every file can be written.

        Raises:
            InputError: one exists and ``force`` is off, two would have one name, or the folder
                cannot be made.
        """
        if self.folder is None:
            return
        seen: dict[str, Source] = {}
        for source in sources:
            other = seen.setdefault(source.name, source)
            if other.argument == source.argument and other is not source:
                raise InputError(f"picture {source.argument} is named twice; name it once")
            if other is not source:
                raise InputError(
                    f"pictures {other.argument} and {source.argument} have one name, and so would "
                    f"their results in {self.folder}; pass a folder that holds both"
                )
        with translated_writes(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            for path in self._paths(source):
                if path.parent.is_dir():
                    check_file_output(path, force=force)

    def put(self, source: Source, regions: Regions) -> None:
        """Hand on the answers to a picture."""
        values = {"file": source.argument, **regions.to_dict()}
        if self.folder is None:
            text = f"{source.argument}\n{self._describe(regions)}"
            clear_line()
            click.echo(_json(values) if self._as_json else text)
            return
        paths = self._paths(source)
        with translated_writes(paths[0].parent):
            paths[0].parent.mkdir(parents=True, exist_ok=True)
        if self._draw is not None:
            with atomic_file(paths[1]) as partial:
                self._draw(source.image, regions).save(partial, "PNG")
        with atomic_file(paths[0]) as partial:
            partial.write_text(_json(values) + "\n", "utf-8")

    def _paths(self, source: Source) -> list[pathlib.Path]:
        assert self.folder is not None
        suffixes = (".json",) if self._draw is None else (".json", ".png")
        return [self.folder / f"{source.name}{suffix}" for suffix in suffixes]


def run_pictures(
    predictor: TapPredictor,
    items: Sequence[tuple[Source, Prompts]],
    options: Mapping[str, Any],
    output: Output,
    *,
    strict: bool,
) -> tuple[int, list[tuple[Source, str]]]:
    """Answer the prompts on every picture; those that cannot be used are named and skipped.

    Args:
        predictor: answers.
        items: pictures and their prompts.
        options: of ``TapPredictor.predict_many``.
        output: takes the answers.
        strict: stop at the first picture that cannot be used.

    Returns:
        The number of regions, and the skipped pictures with what is wrong with each.

    Raises:
        TapError: a picture cannot be used and ``strict`` is on, or the backend failed.
    """
    skipped: dict[int, str] = {}
    num_regions = 0
    with share_bar("run") as show:

        def skip(index: int, error: TapError) -> None:
            source = items[index][0]
            text = _about(source, error)
            if strict:
                raise type(error)(text) from error
            skipped[index] = str(error)
            logger.warning("skipped: %s", text)

        pairs = ((source.image, prompts) for source, prompts in items)
        answers = predictor.predict_many(pairs, on_error=skip, **options)
        # Asked for after each answer, when what was skipped before it is known.
        answered = (index for index in range(len(items)) if index not in skipped)
        for regions in answers:
            index = next(answered)
            output.put(items[index][0], regions)
            num_regions += len(regions)
            show((index + 1) / len(items), items[index][0].name)
    return num_regions, [(items[index][0], text) for index, text in skipped.items()]


def _about(source: Source, error: TapError) -> str:
    """Return what an error says, with the name of the picture if it does not say it itself."""
    text = str(error)
    return text if source.argument in text else f"{source.argument}: {text}"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False)
