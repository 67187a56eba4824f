"""Prompt options of the command line, and the parsers of their texts and files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.console.options import FILE, option_group
from tap_deploy.errors import InputError
from tap_deploy.pictures.source import Bands
from tap_deploy.prompts import Prompts
from tap_deploy.storage.json_files import parse_json
from tap_deploy.storage.regular_files import read_text

Stroke = npt.NDArray[np.float64]  # [n, 2] XY


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Regions to ask for, in pixels of each picture.

    Attributes:
        points: one text ``x,y[,label][;x,y[,label]…]`` per region.
        boxes: one text ``x0,y0,x1,y1`` per region.
        sketches: files with strokes, see ``load_sketch``.
        box_file: JSON file with boxes, see ``picture_options.BoxFile``.
        clip: move points and boxes outside the picture to its border.
    """

    points: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    sketches: tuple[Path, ...] = ()
    box_file: Path | None = None
    clip: bool = False

    def shared(self) -> Prompts | None:
        """Return the prompts for every picture: points, boxes and sketches; None for none.

        Raises:
            InputError: a text or file cannot be read, or there is no prompt and no box file.
        """
        parts = []
        if self.points:
            parts.append(Prompts.from_points([parse_point(text) for text in self.points]))
        if self.boxes:
            parts.append(Prompts.from_boxes([parse_box(text) for text in self.boxes]))
        if self.sketches:
            strokes = [stroke for path in self.sketches for stroke in load_sketch(path)]
            parts.append(Prompts.from_sketches(strokes))
        if not parts and self.box_file is None:
            raise InputError("no prompt: pass --point, --box, --sketch, --boxes or --everything")
        return Prompts.concatenate(parts) if parts else None


prompt_options = option_group(
    "prompts",
    PromptOptions,
    click.option(
        "--point",
        "points",
        multiple=True,
        metavar="X,Y[,LABEL][;…]",
        help="The points of one region: label 1 inside (default), 0 outside. Repeatable.",
    ),
    click.option(
        "--box",
        "boxes",
        multiple=True,
        metavar="X0,Y0,X1,Y1",
        help="The box of one region. Repeatable.",
    ),
    click.option(
        "--sketch",
        "sketches",
        multiple=True,
        type=FILE,
        help="File with the stroke of one region: a JSON list [[x, y], …], or a line x,y per "
        "point. Repeatable.",
    ),
    click.option(
        "--boxes",
        "box_file",
        type=FILE,
        help="JSON file with boxes: a list [[x0, y0, x1, y1], …] for every picture, or an object "
        'with a list per picture, {"photo.jpg": [[…], …], …}.',
    ),
    click.option(
        "--clip", is_flag=True, help="Clip prompts that extend beyond the picture to its border."
    ),
)


def parse_point(text: str) -> list[list[float]]:
    """Parse ``x,y[,label][;x,y[,label]…]``, the points of one region, to [[x, y, label], …].

    The label defaults to 1, foreground.

    Raises:
        InputError: the text has another form.
    """
    points = []
    for part in text.split(";"):
        numbers = _numbers(part)
        if len(numbers) == 2:
            numbers.append(float(PointLabel.FOREGROUND))
        if len(numbers) != 3:
            raise InputError(
                f"point {text!r}: cannot read {part!r}; expected x,y or x,y,label, several points "
                "of one region separated by ';'"
            )
        points.append(numbers)
    return points


def parse_box(text: str) -> list[float]:
    """Parse ``x0,y0,x1,y1``, the top-left and bottom-right corner of a box.

    Raises:
        InputError: the text has another form.
    """
    numbers = _numbers(text)
    if len(numbers) != 4:
        raise InputError(f"box {text!r}: cannot read it; expected x0,y0,x1,y1")
    return numbers


def parse_bands(text: str) -> Bands:
    """Parse ``r,g,b``, band numbers counted from 1.

    Raises:
        InputError: the text has another form.
    """
    numbers = _numbers(text)
    if len(numbers) != 3 or any(number < 1 or number % 1 for number in numbers):
        raise InputError(f"bands {text!r}: cannot read them; expected r,g,b, for example 4,3,2")
    red, green, blue = map(int, numbers)
    return red, green, blue


def load_sketch(path: str | os.PathLike[str]) -> list[Stroke]:
    """Read strokes, float64 [n, 2] XY in pixels each, for ``Prompts.from_sketches``.

    The file is JSON, one stroke ``[[x, y], …]`` or a list of strokes, or text: one stroke, a line
    ``x,y`` per point. Empty lines, lines that start with ``#`` and a header ``x,y`` are skipped.

    Raises:
        InputError: the file cannot be read, or its content has another form.
    """
    try:
        text = read_text(path)
    except OSError as exc:
        raise InputError(f"sketch {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"sketch {path} is not text; expected JSON or lines of x,y") from exc
    if text.lstrip().startswith(("[", "{")):
        strokes = _strokes_from_json(text, path)
    else:
        strokes = [_stroke_from_lines(text, path)]
    if not strokes or any(len(stroke) == 0 for stroke in strokes):
        raise InputError(f"sketch {path} holds an empty stroke; expected at least one point x,y")
    return strokes


def _numbers(text: str) -> list[float]:
    """Return the comma-separated numbers of a text; empty if it holds anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _strokes_from_json(text: str, path: str | os.PathLike[str]) -> list[Stroke]:
    try:
        values: Any = parse_json(text)
    except ValueError as exc:
        raise InputError(f"sketch {path} is not valid JSON: {exc}") from exc
    try:
        single = isinstance(values[0][0], (int, float))
        strokes = [np.array(stroke, np.float64) for stroke in ([values] if single else values)]
    # OverflowError: an integer of more digits than a float can hold.
    except (TypeError, ValueError, LookupError, OverflowError) as exc:
        raise InputError(_json_problem(path)) from exc
    if any(stroke.ndim != 2 or stroke.shape[1] != 2 for stroke in strokes):
        raise InputError(_json_problem(path))
    return strokes


def _json_problem(path: str | os.PathLike[str]) -> str:
    return f"sketch {path}: expected a stroke [[x, y], …] or a list of strokes"


def _stroke_from_lines(text: str, path: str | os.PathLike[str]) -> Stroke:
    points: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if not bare or bare.startswith("#") or (not points and bare.replace(" ", "") == "x,y"):
            continue
        point = _numbers(bare if "," in bare else ",".join(bare.split()))
        if len(point) != 2:
            raise InputError(
                f"sketch {path}, line {number}: cannot read {bare[:40]!r}; expected x,y"
            )
        points.append(point)
    return np.array(points, np.float64).reshape(-1, 2)
