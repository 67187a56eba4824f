"""``tap-export run``: masks, names and captions of regions of one or more pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli.everything_options import EverythingOptions, everything_options
from tap_deploy.cli.output_options import OutputOptions, describe, output_options
from tap_deploy.cli.picture_options import (
    Item,
    Job,
    PictureOptions,
    Skipped,
    Source,
    find_job,
    picture_options,
)
from tap_deploy.cli.prompt_options import PromptOptions, prompt_options
from tap_deploy.concepts import Vocabulary
from tap_deploy.console.exits import EXIT_BAD_INPUT
from tap_deploy.console.options import FILE, bundle_argument, option_group, runtime_options
from tap_deploy.console.progress import share_bar, stage_bar
from tap_deploy.errors import InputError, TapError
from tap_deploy.image import load_image
from tap_deploy.prediction.answers import OnProgress
from tap_deploy.predictor import TapPredictor
from tap_deploy.regions import Regions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import atomic_file
from tap_deploy.storage.json_files import json_text

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What to return of each region; see ``TapPredictor.predict``.

    Attributes:
        concepts: file with names to choose from; None for those of the bundle.
    """

    top_k: int = 1
    concepts: pathlib.Path | None = None
    masks: bool = True
    candidates: bool = False
    captions: bool = True
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return arguments of ``TapPredictor.predict``.

        Raises:
            InputError: the concepts cannot be read.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        concepts = values.pop("concepts")
        return values | {
            "masks": "rle" if self.masks else False,
            "vocabulary": None if concepts is None else Vocabulary.load(concepts),
        }


answer_options = option_group(
    "answers",
    AnswerOptions,
    click.option(
        "--top-k",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Names per region.",
    ),
    click.option("--concepts", type=FILE, help="Concepts to use instead of the bundle's."),
    click.option("--masks/--no-masks", default=True, help="Return masks (default: yes)."),
    click.option(
        "--candidates", is_flag=True, help="Also return the masks of all mask tokens, with scores."
    ),
    click.option(
        "--captions/--no-captions", default=True, help="Generate captions (default: yes)."
    ),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=0), help="Maximum caption length, in tokens."
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Sampling temperature; 0 takes the most likely token.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Seed, for repeatable sampling."),
)


@click.command("run")
@bundle_argument
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@prompt_options
@everything_options
@answer_options
@picture_options
@runtime_options
@output_options
def run_command(
    bundle: str,
    images: tuple[str, ...],
    prompts: PromptOptions,
    search: EverythingOptions,
    answers: AnswerOptions,
    reading: PictureOptions,
    run_on: RunOn,
    output: OutputOptions,
) -> int:
    """Segment, name and caption regions of each IMAGE with BUNDLE.

    Each --point, --box and --sketch prompts one region; coordinates are pixels of IMAGE.
    --everything finds the regions itself. IMAGE is a picture, a folder of pictures, or - for a
    picture on stdin. If there are several, unreadable pictures are reported and skipped.
    """
    arguments = _arguments(prompts, search, answers)
    job = find_job(images, None if search.everything else prompts, reading, output.folder)
    output.check(job.sources, single=job.single)
    _warn_if_synthetic(bundle)
    if job.single:
        regions = run_single(bundle, job, run_on, arguments, output)
        click.echo(regions.to_json() if output.as_json else describe(regions))
        return 0
    result = run_many(bundle, job, run_on, arguments, output, strict=reading.strict)
    result.print(to_stderr=output.folder is None, as_json=output.as_json)
    return result.exit_code


def _arguments(
    prompts: PromptOptions, search: EverythingOptions, answers: AnswerOptions
) -> dict[str, Any]:
    """Return arguments of ``TapPredictor.predict``, or of ``everything`` if that was asked for.

    Raises:
        InputError: options exclude each other, or the concepts cannot be read.
    """
    given = search.arguments()
    arguments = answers.arguments()
    if not search.everything:
        return arguments | {"clip": prompts.clip}
    if prompts != PromptOptions():
        raise InputError(
            "--everything finds the regions itself; leave out --point, --box, --sketch, --boxes "
            "and --clip"
        )
    if arguments.pop("candidates"):
        raise InputError("--candidates is for prompts; leave it out with --everything")
    return arguments | given


def run_single(
    bundle: str, job: Job, run_on: RunOn, arguments: dict[str, Any], output: OutputOptions
) -> Regions:
    """Return the regions of the only picture of a job, and write its overlay.

    Args:
        bundle: path of the bundle.
        job: one picture, with its prompts if there are any.
        run_on: what runs the graphs.
        arguments: of ``TapPredictor.predict``, or of ``everything`` if there are no prompts.
        output: where the overlay goes.

    Raises:
        TapError: the picture or the bundle cannot be used, or the backend failed.
    """
    [(source, prompts)] = job.items
    picture = load_image(source.image)
    if prompts is None:
        with share_bar("run") as show, _loaded(bundle, run_on, arguments) as predictor:
            regions = predictor.everything(picture, on_progress=_searching(show), **arguments)
    else:
        with stage_bar("run", 5) as stage:
            stage("load bundle")
            with _loaded(bundle, run_on, arguments) as predictor:
                regions = predictor.predict(
                    picture,
                    prompts=prompts,
                    on_progress=lambda name, done, total: stage(name) if done == 0 else None,
                    **arguments,
                )
    if output.overlay is not None:
        with atomic_file(output.overlay) as partial:
            output.draw(picture, regions).save(partial, "PNG")
    return regions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """Outcome of a run on several pictures."""

    num_pictures: int
    num_regions: int
    skipped: Skipped

    @property
    def exit_code(self) -> int:
        """2 if a picture that the command line names was skipped; those of folders may be."""
        return EXIT_BAD_INPUT if any(source.named for source, _ in self.skipped) else 0

    def print(self, *, to_stderr: bool, as_json: bool) -> None:
        """Print the counts: as one line to stderr, or as a result to stdout."""
        line = (
            f"pictures: {self.num_pictures}, regions: {self.num_regions}, "
            f"skipped: {len(self.skipped)}"
        )
        values = {
            "pictures": self.num_pictures,
            "regions": self.num_regions,
            "skipped": [{"file": source.argument, "error": text} for source, text in self.skipped],
        }
        text = json_text(values) if as_json and not to_stderr else line
        click.echo(text, err=to_stderr)


def run_many(
    bundle: str,
    job: Job,
    run_on: RunOn,
    arguments: dict[str, Any],
    output: OutputOptions,
    *,
    strict: bool,
) -> RunResult:
    """Output the regions of every picture of a job; unreadable pictures are logged and skipped.

    Args:
        bundle: path of the bundle.
        job: pictures, with their prompts if there are any.
        run_on: what runs the graphs.
        arguments: of ``TapPredictor.predict_many``, or of ``everything`` if there are no prompts.
        output: takes the regions.
        strict: stop at the first picture that cannot be used.

    Raises:
        InputError: no picture can be used.
        TapError: a picture cannot be used and ``strict`` is on, the bundle cannot be used, or the
            backend failed.
    """
    with _loaded(bundle, run_on, arguments) as predictor:
        num_regions, failed = _run_items(predictor, job, arguments, output, strict=strict)
    skipped = job.skipped + failed
    num_pictures = len(job.items) - len(failed)
    if not num_pictures:
        raise InputError(f"none of {len(skipped)} pictures could be used")
    return RunResult(num_pictures=num_pictures, num_regions=num_regions, skipped=skipped)


def _run_items(
    predictor: TapPredictor,
    job: Job,
    arguments: dict[str, Any],
    output: OutputOptions,
    *,
    strict: bool,
) -> tuple[int, Skipped]:
    """Return the number of regions, and the skipped pictures."""
    items, num_regions = job.items, 0
    skipped: dict[int, str] = {}
    with share_bar("run") as show:

        def skip(index: int, error: TapError) -> None:
            text = _about(items[index][0], error)
            if strict:
                raise type(error)(text) from error
            skipped[index] = str(error)
            logger.warning("skipped: %s", text)

        answers = _answers(predictor, items, arguments, skip)
        # A generator, as pictures are skipped while the answers are made.
        answered = (index for index in range(len(items)) if index not in skipped)
        for regions in answers:
            index = next(answered)
            output.put(items[index][0], regions)
            num_regions += len(regions)
            show((index + 1) / len(items), items[index][0].name)
    return num_regions, [(items[index][0], text) for index, text in skipped.items()]


def _answers(
    predictor: TapPredictor,
    items: Sequence[Item],
    arguments: dict[str, Any],
    skip: Callable[[int, TapError], None],
) -> Iterator[Regions]:
    """Yield the regions of each picture that can be used, in order; ``skip`` takes the others."""
    pairs = [(source.image, prompts) for source, prompts in items if prompts is not None]
    if pairs:
        yield from predictor.predict_many(pairs, on_error=skip, **arguments)
        return
    for index, (source, _) in enumerate(items):
        try:
            regions = predictor.everything(source.image, **arguments)
        except InputError as exc:
            skip(index, exc)
            continue
        yield regions


def _searching(show: Callable[[float, str], None]) -> OnProgress:
    """Return a callback that shows the stages of ``everything``; the search takes most time."""
    begins = {"encode image": 0.0, "search points": 0.05, "write captions": 0.75, "make masks": 1.0}
    ends = dict(zip(begins, [*list(begins.values())[1:], 1.0], strict=True))

    def report(stage: str, done: int, total: int) -> None:
        share = begins[stage] + (ends[stage] - begins[stage]) * done / max(total, 1)
        show(share, f"{stage} {done}/{total}")

    return report


@contextlib.contextmanager
def _loaded(bundle: str, run_on: RunOn, arguments: dict[str, Any]) -> Iterator[TapPredictor]:
    """Load a bundle for a run.

    Raises:
        TapError: the bundle cannot be used, or does not have the names of ``--only``.
    """
    with TapPredictor.from_bundle(bundle, **dataclasses.asdict(run_on)) as predictor:
        _note_what_is_missing(predictor, arguments)
        if "only" in arguments:  # fail before the first picture is encoded
            vocabulary = arguments["vocabulary"] or predictor.vocabulary
            if vocabulary is None:
                raise InputError("--only needs names; pass --concepts FILE")
            vocabulary.check_names(arguments["only"])
        yield predictor


def _about(source: Source, error: TapError) -> str:
    """Return the message of an error, with the name of the picture if it lacks it."""
    text = str(error)
    return text if source.argument in text else f"{source.argument}: {text}"


def _warn_if_synthetic(path: str) -> None:
    if Bundle.open(path, check_hashes=False).manifest.checkpoint.synthetic:
        click.echo(
            "note: this bundle holds synthetic weights; masks, names and captions mean nothing",
            err=True,
        )


def _note_what_is_missing(predictor: TapPredictor, arguments: dict[str, Any]) -> None:
    if arguments["vocabulary"] is None and predictor.vocabulary is None:
        click.echo("note: no names: the bundle has no concepts; pass --concepts FILE", err=True)
    if arguments["captions"] and predictor.tokenizer is None:
        click.echo(
            "note: no captions, only token ids: the bundle was exported without --tokenizer",
            err=True,
        )
