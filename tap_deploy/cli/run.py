"""``tap-export run``: regions of a picture, or of many, from a bundle."""

from __future__ import annotations

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli.options import (
    FILE,
    allow_failed_option,
    backend_option,
    bundle_argument,
    device_option,
    force_option,
    json_option,
    precision_option,
    provider_option,
    strict_option,
    threads_option,
)
from tap_deploy.cli.prompt_options import load_sketch, parse_bands, parse_box, parse_point
from tap_deploy.cli.run_pictures import (
    BoxFile,
    Output,
    Source,
    find_sources,
    run_pictures,
)
from tap_deploy.concepts import Vocabulary
from tap_deploy.console.exits import EXIT_BAD_INPUT
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.image import load_image
from tap_deploy.pictures.source import ImageSource, PictureFile
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.storage.files import atomic_file, check_file_output
from tap_deploy.visualize.enlarge import MAX_SCALE as MAX_OVERLAY_SCALE
from tap_deploy.visualize.fonts import font_from_path

logger = logging.getLogger(__name__)


@click.command("run")
@bundle_argument
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--point",
    "points",
    multiple=True,
    metavar="X,Y[,LABEL][;…]",
    help="A region by its points: label 1 inside (default), 0 outside.",
)
@click.option("--box", "boxes", multiple=True, metavar="X0,Y0,X1,Y1", help="A region by its box.")
@click.option(
    "--sketch",
    "sketches",
    multiple=True,
    type=FILE,
    help="A region by a stroke: a JSON list [[x, y], …], or a line x,y per point.",
)
@click.option(
    "--boxes",
    "box_file",
    type=FILE,
    help="Regions by boxes: a JSON list [[x0, y0, x1, y1], …] for every picture, or an object of "
    'such lists, {"photo.jpg": [[…], …], …}.',
)
@click.option("--clip", is_flag=True, help="Move prompts that reach out of the picture into it.")
@click.option(
    "--top-k", type=click.IntRange(min=1), default=1, show_default=True, help="Names per region."
)
@click.option("--concepts", type=FILE, help="Names to choose from, in place of the bundle's.")
@click.option("--masks/--no-masks", default=True, help="Make masks (default: yes).")
@click.option(
    "--candidates", is_flag=True, help="Also all masks that the model had to choose from."
)
@click.option("--captions/--no-captions", default=True, help="Write captions (default: yes).")
@click.option("--max-new-tokens", type=click.IntRange(min=0), help="Longest caption, in tokens.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Above 0: draw the tokens.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Makes draws repeatable.")
@click.option(
    "--convert",
    is_flag=True,
    help="Turn greyscale, alpha, CMYK and deeper pictures into 8-bit RGB.",
)
@click.option(
    "--bands", metavar="R,G,B", help="Which bands of a raster are red, green and blue; from 1."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    help="Largest picture to decode; default: the limit of Pillow, 89 million.",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="A folder for results: IMAGE.json for each picture.",
)
@click.option("--overlays", is_flag=True, help="Also draw each into the folder: IMAGE.png.")
@click.option("--overlay", type=FILE, help="Draw the regions on the picture: a PNG to write.")
@click.option(
    "--overlay-scale",
    type=click.IntRange(1, MAX_OVERLAY_SCALE),
    default=1,
    show_default=True,
    help="Enlarge overlays so many times, so that labels fit on a small picture.",
)
@click.option("--font", type=FILE, help="For labels of overlays: a TrueType or OpenType file.")
@strict_option
@backend_option
@precision_option
@device_option
@provider_option
@threads_option
@allow_failed_option
@force_option
@json_option
def run_command(
    bundle: str,
    images: tuple[str, ...],
    points: tuple[str, ...],
    boxes: tuple[str, ...],
    sketches: tuple[pathlib.Path, ...],
    box_file: pathlib.Path | None,
    clip: bool,
    top_k: int,
    concepts: pathlib.Path | None,
    masks: bool,
    candidates: bool,
    captions: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    convert: bool,
    bands: str | None,
    max_pixels: int | None,
    output: pathlib.Path | None,
    overlays: bool,
    overlay: pathlib.Path | None,
    overlay_scale: int,
    font: pathlib.Path | None,
    backend: str,
    precision: str,
    device: str | None,
    provider: str | None,
    threads: int | None,
    allow_failed: bool,
    strict: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Segment, name and caption regions of each IMAGE with BUNDLE.

    Each --point, --box and --sketch asks for one region; coordinates are pixels of IMAGE. IMAGE is
    a picture, a folder of pictures, or - for a picture on stdin. Of several pictures, those that
    cannot be read are named and skipped.
    """
    rgb = None if bands is None else parse_bands(bands)

    def read(source: str | bytes) -> PictureFile:
        return PictureFile(source=source, convert=convert, bands=rgb, max_pixels=max_pixels)

    shared = _prompts(points, boxes, sketches)
    if shared is None and box_file is None:
        raise InputError("no prompt: pass --point, --box, --sketch or --boxes at least once")
    sources = find_sources(images, read, output)
    by_picture = None if box_file is None else BoxFile(box_file, sources)
    if not sources:
        raise InputError(f"there are no pictures but those in {output}; choose another output")
    single = len(sources) == 1 and sources[0].named and output is None
    if overlay is not None:
        _check_overlay(overlay, sources, single=single, force=force)
    if font is not None:
        font_from_path(font)  # better now than after the work
    if overlays and output is None:
        raise InputError("--overlays draws into the folder of --output; pass -o FOLDER, too")
    items, skipped = _with_prompts(sources, shared, by_picture, strict=strict or single)

    def draw(image: ImageSource, regions: Regions) -> Image.Image:
        return regions.visualize(image, overlay_scale, font=font)

    picture = load_image(items[0][0].image) if single else None
    files = Output(output, as_json=as_json, describe=describe, draw=draw if overlays else None)
    files.check(sources, force=force)
    _warn_if_synthetic(bundle)
    options: dict[str, Any] = {
        "top_k": top_k,
        "masks": "rle" if masks else False,
        "candidates": candidates,
        "captions": captions,
        "vocabulary": None if concepts is None else Vocabulary.load(concepts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "clip": clip,
    }
    load = functools.partial(
        TapPredictor.from_bundle,
        bundle,
        backend,
        precision,
        threads,
        device=device,
        provider=provider,
        allow_failed=allow_failed,
    )
    if picture is None:
        return _run_many(load, items, skipped, options, files, strict=strict, as_json=as_json)
    regions = _run_one(load, picture, items[0][1], options)
    if overlay is not None:
        with atomic_file(overlay) as partial:
            draw(picture, regions).save(partial, "PNG")
    click.echo(regions.to_json() if as_json else describe(regions))
    return 0


def _run_one(
    load: Callable[[], TapPredictor],
    picture: npt.NDArray[np.uint8],
    prompts: Prompts,
    options: dict[str, Any],
) -> Regions:
    with stage_bar("run", 5) as stage:
        stage("load bundle")
        with load() as predictor:
            _note_what_is_missing(predictor, options)
            return predictor.predict(
                picture,
                prompts=prompts,
                on_progress=lambda name, done, total: stage(name) if done == 0 else None,
                **options,
            )


def _run_many(
    load: Callable[[], TapPredictor],
    items: list[tuple[Source, Prompts]],
    skipped: list[tuple[Source, str]],
    options: dict[str, Any],
    files: Output,
    *,
    strict: bool,
    as_json: bool,
) -> int:
    """Run, say how it went, and return the exit code."""
    with load() as predictor:
        _note_what_is_missing(predictor, options)
        num_regions, failed = run_pictures(predictor, items, options, files, strict=strict)
    skipped = skipped + failed
    num_pictures = len(items) - len(failed)
    if not num_pictures:
        raise InputError(f"none of {len(skipped)} pictures could be used")
    summary = {
        "pictures": num_pictures,
        "regions": num_regions,
        "skipped": [{"file": source.argument, "error": text} for source, text in skipped],
    }
    line = f"pictures: {num_pictures}, regions: {num_regions}, skipped: {len(skipped)}"
    if files.folder is None:
        click.echo(line, err=True)
    else:
        click.echo(json.dumps(summary, ensure_ascii=False) if as_json else line)
    # A picture of a folder may be broken; one that was asked for by name must not be.
    return EXIT_BAD_INPUT if any(source.named for source, _ in skipped) else 0


def _check_overlay(
    overlay: pathlib.Path, sources: Sequence[Source], *, single: bool, force: bool
) -> None:
    if not single:
        raise InputError(
            f"overlay {overlay} would be of one picture; for several pass -o FOLDER --overlays"
        )
    if overlay.suffix.lower() != ".png":
        raise InputError(f"overlay {overlay} would be a PNG; choose a name that ends in .png")
    image = pathlib.Path(sources[0].argument)
    if overlay.exists() and image.exists() and overlay.samefile(image):
        raise InputError(f"overlay {overlay} is the picture itself; choose another name")
    check_file_output(overlay, force=force)


def _with_prompts(
    sources: Sequence[Source], shared: Prompts | None, boxes: BoxFile | None, *, strict: bool
) -> tuple[list[tuple[Source, Prompts]], list[tuple[Source, str]]]:
    """Return each picture with its prompts, and those without any, with what is wrong."""
    items, skipped = [], []
    for source in sources:
        own = None if boxes is None else boxes.of(source)
        parts = [part for part in (shared, own) if part is not None]
        if parts:
            items.append((source, Prompts.concatenate(parts)))
            continue
        assert boxes is not None
        problem = f"{boxes.path} has no boxes for it"
        if strict:
            raise InputError(f"{source.argument}: {problem}; name it there")
        logger.warning("skipped: %s: %s", source.argument, problem)
        skipped.append((source, problem))
    if boxes is not None and boxes.unused:
        logger.warning(
            "%s has boxes for pictures that are not there: %s",
            boxes.path,
            ", ".join(boxes.unused[:3]) + (", …" if len(boxes.unused) > 3 else ""),
        )
    return items, skipped


def describe(regions: Regions) -> str:
    """Return one line per region for people to read."""
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


def _prompts(
    points: tuple[str, ...], boxes: tuple[str, ...], sketches: tuple[pathlib.Path, ...]
) -> Prompts | None:
    parts = []
    if points:
        parts.append(Prompts.from_points([parse_point(text) for text in points]))
    if boxes:
        parts.append(Prompts.from_boxes([parse_box(text) for text in boxes]))
    if sketches:
        strokes = [stroke for path in sketches for stroke in load_sketch(path)]
        parts.append(Prompts.from_sketches(strokes))
    return Prompts.concatenate(parts) if parts else None


def _warn_if_synthetic(path: str) -> None:
    if Bundle.open(path, check_hashes=False).manifest.checkpoint.synthetic:
        click.echo(
            "note: this bundle holds synthetic weights; masks, names and captions mean nothing",
            err=True,
        )


def _note_what_is_missing(predictor: TapPredictor, options: dict[str, Any]) -> None:
    if options["vocabulary"] is None and predictor.vocabulary is None:
        click.echo("note: no names: the bundle has no concepts; pass --concepts FILE", err=True)
    if options["captions"] and predictor.tokenizer is None:
        click.echo(
            "note: no captions, only token ids: the bundle was exported without --tokenizer",
            err=True,
        )
