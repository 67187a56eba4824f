"""``tap-export run``: regions of a picture, from a bundle."""

from __future__ import annotations

import pathlib

import click

from tap_deploy.bundle import Bundle
from tap_deploy.cli.options import (
    allow_failed_option,
    backend_option,
    bundle_argument,
    device_option,
    force_option,
    json_option,
    precision_option,
    provider_option,
    threads_option,
)
from tap_deploy.cli.progress import stage_bar
from tap_deploy.cli.prompt_options import load_sketch, parse_box, parse_point
from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.files import atomic_file, check_file_output
from tap_deploy.image import load_image
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.visualize.enlarge import MAX_SCALE as MAX_OVERLAY_SCALE

FILE = click.Path(path_type=pathlib.Path)


@click.command("run")
@bundle_argument
@click.argument("image", type=FILE)
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
    "--top-k", type=click.IntRange(min=1), default=1, show_default=True, help="Names per region."
)
@click.option("--concepts", type=FILE, help="Names to choose from, in place of the bundle's.")
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
@click.option("--convert", is_flag=True, help="Turn greyscale, alpha, CMYK pictures into RGB.")
@click.option("--overlay", type=FILE, help="Draw the regions on the picture: a PNG to write.")
@click.option(
    "--overlay-scale",
    type=click.IntRange(1, MAX_OVERLAY_SCALE),
    default=1,
    show_default=True,
    help="Enlarge the overlay so many times, so that labels fit on a small picture.",
)
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
    image: pathlib.Path,
    points: tuple[str, ...],
    boxes: tuple[str, ...],
    sketches: tuple[pathlib.Path, ...],
    top_k: int,
    concepts: pathlib.Path | None,
    captions: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    convert: bool,
    overlay: pathlib.Path | None,
    overlay_scale: int,
    backend: str,
    precision: str,
    device: str | None,
    provider: str | None,
    threads: int | None,
    allow_failed: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Segment, name and caption regions of IMAGE with BUNDLE.

    Each --point, --box and --sketch asks for one region; coordinates are pixels of IMAGE.
    """
    prompts = _prompts(points, boxes, sketches)
    if overlay is not None:
        _check_overlay(overlay, image, force)
    picture = load_image(image, convert=convert)
    _warn_if_synthetic(bundle)
    vocabulary = None if concepts is None else Vocabulary.load(concepts)
    with stage_bar("run", 5) as stage:
        stage("load bundle")
        with TapPredictor.from_bundle(
            bundle,
            backend,
            precision,
            threads,
            device=device,
            provider=provider,
            allow_failed=allow_failed,
        ) as predictor:
            _note_what_is_missing(predictor, vocabulary, captions)
            regions = predictor.predict(
                picture,
                prompts=prompts,
                top_k=top_k,
                masks="rle" if overlay is None else True,
                captions=captions,
                vocabulary=vocabulary,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                on_progress=lambda name, done, total: stage(name) if done == 0 else None,
            )
    if overlay is not None:
        with atomic_file(overlay) as partial:
            regions.visualize(picture, overlay_scale).save(partial, "PNG")
    click.echo(regions.to_json() if as_json else describe(regions))


def _check_overlay(overlay: pathlib.Path, image: pathlib.Path, force: bool) -> None:
    if overlay.suffix.lower() != ".png":
        raise InputError(f"overlay {overlay} would be a PNG; choose a name that ends in .png")
    if overlay.exists() and image.exists() and overlay.samefile(image):
        raise InputError(f"overlay {overlay} is the picture itself; choose another name")
    check_file_output(overlay, force=force)


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
        lines.append("  ".join(parts))
    return "\n".join(lines)


def _prompts(
    points: tuple[str, ...], boxes: tuple[str, ...], sketches: tuple[pathlib.Path, ...]
) -> Prompts:
    parts = []
    if points:
        parts.append(Prompts.from_points([parse_point(text) for text in points]))
    if boxes:
        parts.append(Prompts.from_boxes([parse_box(text) for text in boxes]))
    if sketches:
        strokes = [stroke for path in sketches for stroke in load_sketch(path)]
        parts.append(Prompts.from_sketches(strokes))
    if not parts:
        raise InputError("no prompt: pass --point, --box or --sketch at least once")
    return Prompts.concatenate(parts)


def _warn_if_synthetic(path: str) -> None:
    if Bundle.open(path, check_hashes=False).manifest.checkpoint.synthetic:
        click.echo(
            "note: this bundle holds synthetic weights; masks, names and captions mean nothing",
            err=True,
        )


def _note_what_is_missing(
    predictor: TapPredictor, vocabulary: Vocabulary | None, captions: bool
) -> None:
    if vocabulary is None and predictor.vocabulary is None:
        click.echo("note: no names: the bundle has no concepts; pass --concepts FILE", err=True)
    if captions and predictor.tokenizer is None:
        click.echo(
            "note: no captions, only token ids: the bundle was exported without --tokenizer",
            err=True,
        )
