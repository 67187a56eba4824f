"""The pictures of ``tap-export run``: how they are read, which they are, and their prompts."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tap_deploy.cli.prompt_options import PromptOptions, parse_bands
from tap_deploy.console.options import option_group, strict_option
from tap_deploy.errors import InputError
from tap_deploy.pictures.folders import find_pictures
from tap_deploy.pictures.source import PictureFile, read_pipe
from tap_deploy.prompts import Prompts
from tap_deploy.storage.json_files import read_json

STDIN = "-"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures are read.

    Attributes:
        convert: convert greyscale, alpha, CMYK and deeper pictures to 8-bit RGB.
        bands: ``r,g,b``, band numbers of a raster from 1; None for its own order.
        max_pixels: largest picture to decode; None for the limit of Pillow.
        strict: stop at an unreadable picture instead of skipping it.
    """

    convert: bool = False
    bands: str | None = None
    max_pixels: int | None = None
    strict: bool = False

    def picture(self, source: str | bytes) -> PictureFile:
        """Return a picture, by its path or the bytes of its file, to be read this way.

        Raises:
            InputError: ``bands`` are no band numbers.
        """
        bands = None if self.bands is None else parse_bands(self.bands)
        return PictureFile(
            source=source, convert=self.convert, bands=bands, max_pixels=self.max_pixels
        )


picture_options = option_group(
    "reading",
    PictureOptions,
    click.option(
        "--convert",
        is_flag=True,
        help="Convert greyscale, alpha, CMYK and deeper pictures to 8-bit RGB.",
    ),
    click.option(
        "--bands",
        metavar="R,G,B",
        help="Raster bands to use as red, green and blue (1-based).",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        help="Largest picture to decode; default: the limit of Pillow, 89 million.",
    ),
    strict_option,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A picture of a run.

    Attributes:
        name: base name of its results: the path below the folder that was searched, the file
            name, or ``stdin``.
        argument: its path, or ``-``, for messages.
        image: the picture and how it is read.
        named: whether the command line names the picture itself, not only its folder.
    """

    name: str
    argument: str
    image: PictureFile
    named: bool


Item = tuple[Source, Prompts | None]  # a picture, and its prompts unless everything is searched
Skipped = list[tuple[Source, str]]  # pictures, and why each was skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The pictures of a run with their prompts.

    Attributes:
        sources: all pictures.
        items: pictures with their prompts; without, if everything is searched.
        skipped: pictures without prompts.
        single: whether this is one named picture, and results do not go to a folder.
    """

    sources: list[Source]
    items: list[Item]
    skipped: Skipped
    single: bool


def find_job(
    arguments: Sequence[str],
    prompts: PromptOptions | None,
    reading: PictureOptions,
    output: pathlib.Path | None,
) -> Job:
    """Return the pictures that a command line names, with their prompts.

    Args:
        arguments: paths of pictures and folders, and ``-`` for a picture on stdin.
        prompts: regions to ask for; None to search everything.
        reading: how pictures are read.
        output: folder for results, which is not searched; None if they go to stdout.

    Raises:
        InputError: there are no pictures or no prompts, or a prompt file cannot be read; or a
            picture has no prompts, and it is the only one or ``reading.strict`` is on.
    """
    shared = None if prompts is None else prompts.shared()
    sources = _find_sources(arguments, reading, output)
    if not sources:
        raise InputError(f"there are no pictures but those in {output}; choose another output")
    single = len(sources) == 1 and sources[0].named and output is None
    if prompts is None:
        items: list[Item] = [(source, None) for source in sources]
        return Job(sources=sources, items=items, skipped=[], single=single)
    boxes = None if prompts.box_file is None else BoxFile(prompts.box_file, sources)
    items, skipped = _with_prompts(sources, shared, boxes, strict=reading.strict or single)
    return Job(sources=sources, items=items, skipped=skipped, single=single)


def _find_sources(
    arguments: Sequence[str], reading: PictureOptions, without: pathlib.Path | None
) -> list[Source]:
    sources: list[Source] = []
    for argument in arguments:
        if argument == STDIN:
            if any(source.argument == STDIN for source in sources):
                raise InputError("- is named twice; stdin holds one picture")
            if sys.stdin is None:
                raise InputError("- is a picture on stdin, which is closed; pass a file")
            image = reading.picture(read_pipe(sys.stdin.buffer, "the picture on stdin"))
            sources.append(Source(name="stdin", argument=argument, image=image, named=True))
        elif os.path.isdir(argument):
            sources += _in_folder(pathlib.Path(argument), reading, without)
        else:
            name, image = os.path.basename(argument), reading.picture(argument)
            sources.append(Source(name=name, argument=argument, image=image, named=True))
    return sources


def _in_folder(
    folder: pathlib.Path, reading: PictureOptions, without: pathlib.Path | None
) -> Iterator[Source]:
    own = None if without is None else pathlib.Path(os.path.realpath(without))
    for path in find_pictures(folder):
        if own is not None and path.resolve().is_relative_to(own):
            continue
        name = path.relative_to(folder).as_posix()
        image = reading.picture(str(path))
        yield Source(name=name, argument=str(path), image=image, named=False)


class BoxFile:
    """Boxes XYXY from a JSON file: a list for every picture, or an object with one per picture.

    The keys of an object are the ``argument`` or the ``name`` of a ``Source``, or the file name
    of the picture if no other picture has it.
    """

    def __init__(self, path: pathlib.Path, sources: Sequence[Source]) -> None:
        """Read the boxes of these pictures.

        Raises:
            InputError: the file cannot be read, or its content has another form.
        """
        self.path = path
        try:
            values = read_json(path)
        except (OSError, ValueError) as exc:
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
                'with a list per picture, {"photo.jpg": [[…], …], …}'
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
        """Keys of the file that no call of ``of`` matched."""
        return [str(name) for name in self._boxes if name not in self._used]


def _file_name(source: Source) -> str:
    return pathlib.PurePath(source.name).name


def _with_prompts(
    sources: Sequence[Source], shared: Prompts | None, boxes: BoxFile | None, *, strict: bool
) -> tuple[list[Item], Skipped]:
    """Return the pictures with their prompts, and those without any."""
    items: list[Item] = []
    skipped: Skipped = []
    for source in sources:
        own = None if boxes is None else boxes.of(source)
        parts = [part for part in (shared, own) if part is not None]
        if parts:
            items.append((source, Prompts.concatenate(parts)))
            continue
        assert boxes is not None
        problem = f"{boxes.path} has no boxes for it"
        if strict:
            raise InputError(f"{source.argument}: {problem}; add them to the file")
        logger.warning("skipped: %s: %s", source.argument, problem)
        skipped.append((source, problem))
    if boxes is not None and boxes.unused:
        logger.warning(
            "%s has boxes for pictures that were not found: %s",
            boxes.path,
            ", ".join(boxes.unused[:3]) + (", …" if len(boxes.unused) > 3 else ""),
        )
    return items, skipped
