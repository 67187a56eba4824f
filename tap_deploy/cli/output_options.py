"""Output options of ``tap-export run``: where results and overlays go."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import click
from PIL import Image

from tap_deploy.cli.picture_options import Source
from tap_deploy.console.options import FILE, force_option, json_option, option_group
from tap_deploy.console.progress import clear_line
from tap_deploy.errors import InputError
from tap_deploy.pictures.source import ImageSource
from tap_deploy.regions import Regions
from tap_deploy.storage.files import (
    atomic_file,
    check_file_output,
    check_folder_for_files,
    new_folder,
)
from tap_deploy.storage.json_files import json_text
from tap_deploy.visualize.fonts import font_from_path
from tap_deploy.visualize.scaling import MAX_SCALE


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the results of a run go: to stdout, or to files in a folder.

    Attributes:
        folder: gets ``<name>.json`` with the regions of each picture; None for stdout.
        overlays: also write ``<name>.png`` to the folder, the picture with its regions.
        overlay: PNG for the picture with its regions, if there is only one picture.
        overlay_scale: enlargement of overlays, an integer factor.
        font: TrueType or OpenType font of the labels; None for the bundled one.
        force: replace existing files.
        as_json: JSON instead of text on stdout.
    """

    folder: pathlib.Path | None = None
    overlays: bool = False
    overlay: pathlib.Path | None = None
    overlay_scale: int = 1
    font: pathlib.Path | None = None
    force: bool = False
    as_json: bool = False

    def check(self, sources: Sequence[Source], *, single: bool) -> None:
        """Check before the work that every file can be written, and make the folder.

        Args:
            sources: the pictures of the run.
            single: whether the run is of one named picture without a folder.

        Raises:
            InputError: options exclude each other, the font cannot be read, a file exists and
                ``force`` is off, two files would have one name, or the folder cannot be made.
        """
        if self.overlay is not None:
            self._check_overlay(self.overlay, sources, single=single)
        if self.font is not None:
            font_from_path(self.font)
        if self.overlays and self.folder is None:
            raise InputError("--overlays draws into the folder of --output; pass -o FOLDER as well")
        if self.folder is not None:
            self._check_folder(self.folder, sources)

    def draw(self, image: ImageSource, regions: Regions) -> Image.Image:
        """Return a picture with its regions drawn on it."""
        return regions.visualize(image, self.overlay_scale, font=self.font)

    def put(self, source: Source, regions: Regions) -> None:
        """Print the regions of one of several pictures, or write them to the folder."""
        values = {"file": source.argument, **regions.to_dict()}
        if self.folder is None:
            text = f"{source.argument}\n{describe(regions)}"
            clear_line()
            click.echo(json_text(values) if self.as_json else text)
            return
        paths = self._paths(self.folder, source)
        with new_folder(paths[0].parent):
            if self.overlays:
                with atomic_file(paths[1]) as partial:
                    self.draw(source.image, regions).save(partial, "PNG")
            with atomic_file(paths[0]) as partial:
                partial.write_text(json_text(values) + "\n", "utf-8")

    def _check_overlay(
        self, overlay: pathlib.Path, sources: Sequence[Source], *, single: bool
    ) -> None:
        if not single:
            raise InputError(
                f"overlay {overlay} is for a single picture; for several pass -o FOLDER --overlays"
            )
        if overlay.suffix.lower() != ".png":
            raise InputError(f"overlay {overlay} is not a PNG; choose a name that ends in .png")
        image = pathlib.Path(sources[0].argument)
        if overlay.exists() and image.exists() and overlay.samefile(image):
            raise InputError(f"overlay {overlay} is the picture itself; choose another name")
        check_file_output(overlay, force=self.force)

    def _check_folder(self, folder: pathlib.Path, sources: Sequence[Source]) -> None:
        seen: dict[str, Source] = {}
        for source in sources:
            other = seen.setdefault(source.name, source)
            if other.argument == source.argument and other is not source:
                raise InputError(f"picture {source.argument} is named twice; name it once")
            if other is not source:
                raise InputError(
                    f"pictures {other.argument} and {source.argument} have the same name, and so "
                    f"would their results in {folder}; pass a folder that holds both"
                )
        check_folder_for_files(folder)
        for source in sources:
            for path in self._paths(folder, source):
                if path.parent.is_dir():
                    check_file_output(path, force=self.force)

    def _paths(self, folder: pathlib.Path, source: Source) -> list[pathlib.Path]:
        suffixes = (".json", ".png") if self.overlays else (".json",)
        return [folder / f"{source.name}{suffix}" for suffix in suffixes]


output_options = option_group(
    "output",
    OutputOptions,
    click.option(
        "-o", "--output", "folder", type=FILE, help="Folder for results: IMAGE.json per picture."
    ),
    click.option("--overlays", is_flag=True, help="Also write overlays to the folder: IMAGE.png."),
    click.option(
        "--overlay", type=FILE, help="PNG to write: the picture with its regions drawn on it."
    ),
    click.option(
        "--overlay-scale",
        type=click.IntRange(1, MAX_SCALE),
        default=1,
        show_default=True,
        help="Enlarge overlays by this factor, to fit labels on a small picture.",
    ),
    click.option("--font", type=FILE, help="TrueType or OpenType font for the labels of overlays."),
    force_option,
    json_option,
)


def describe(regions: Regions) -> str:
    """Return one line of text per region."""
    lines = []
    for i in range(len(regions)):
        parts = [f"region {i}", f"IoU {regions.iou_predictions[i]:.3f}"]
        area = regions.area(i)
        if area is not None:
            parts.append(f"{area} pixels")
        if regions.concepts is not None:
            parts.append(", ".join(f"{name} {p:.2f}" for name, p in regions.concepts[i]))
        if regions.captions is not None:
            parts.append(repr(regions.captions[i]))
        if regions.candidate_iou_predictions is not None:
            scores = ", ".join(f"{score:.3f}" for score in regions.candidate_iou_predictions[i])
            parts.append(f"candidates {scores}")
        lines.append("  ".join(parts))
    return "\n".join(lines)
