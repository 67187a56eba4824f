"""``tap-export fetch``: downloads the published model, or a bundle, from the model hub."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.console.options import FILE, force_option, json_option
from tap_deploy.errors import InputError
from tap_deploy.hub.published import (
    WHERE_THE_TOKENIZER_IS,
    fetch_published,
    installed_tokenizer,
)
from tap_deploy.hub_address import is_hub_address
from tap_deploy.published_files import (
    CONCEPTS,
    MODELS,
    REPOSITORY,
    VERSIONS,
    published_checkpoint,
)
from tap_deploy.storage.files import (
    atomic_file,
    atomic_folder,
    check_file_output,
    check_folder_for_files,
    check_folder_output,
    new_folder,
)


@click.command("fetch")
@click.argument("model", metavar="MODEL|hf://OWNER/NAME[@REVISION]")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="DIR",
    help="Copy the files to DIR. Default: leave them in the cache of huggingface_hub, where a "
    "second fetch finds them.",
)
@click.option(
    "--concepts",
    type=click.Choice(CONCEPTS),
    show_default=CONCEPTS[0],
    help="Concept weights to fetch along.",
)
@click.option(
    "--version",
    type=click.Choice(VERSIONS),
    show_default=VERSIONS[0],
    help="Version of the weights; tap_vit_h has only 1.1.",
)
@click.option(
    "--revision", help=f"Branch, tag or commit of {REPOSITORY}. Default: its newest state."
)
@force_option
@json_option
def fetch_command(
    model: str,
    output: pathlib.Path | None,
    concepts: str | None,
    version: str | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Download a published MODEL, or a bundle, from the model hub; print where it is.

    MODEL is tap_vit_b, tap_vit_l or tap_vit_h. The MD5 of the weights must be the one that their
    authors publish. The tokenizer of the captions comes with the authors' code, and is looked for
    in an installed tokenize_anything.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured. Needs "tap-deploy[hub]".
    """
    if is_hub_address(model):
        if revision is not None:
            raise InputError(f"pass the revision in the address: {model}@{revision}")
        for option, value in (("--concepts", concepts), ("--version", version)):
            if value is not None:
                raise InputError(
                    f"{option} is for the published models ({', '.join(MODELS)}), and {model} is "
                    f"a bundle, which has its own; drop {option}"
                )
        found = {"bundle": str(_fetch_bundle(model, output, force=force))}
    elif model in MODELS:
        version, concepts = version or VERSIONS[0], concepts or CONCEPTS[0]
        found = _fetch_model(model, version, concepts, revision, output, force=force)
    else:
        raise InputError(
            f"unknown model {model!r}; expected one of {', '.join(MODELS)}, or the address of a "
            "bundle on the model hub: hf://OWNER/NAME"
        )
    lines = [f"{name:<11} {value}" for name, value in found.items()]
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))


def _fetch_model(
    model: str,
    version: str,
    concepts: str,
    revision: str | None,
    output: pathlib.Path | None,
    *,
    force: bool,
) -> dict[str, str]:
    """Fetch a published model; returns its paths, the MD5 of the weights, and the commit."""
    published = published_checkpoint(model, version)
    tokenizer = installed_tokenizer()
    names = {"checkpoint": f"{published.name}.pkl", "concepts": f"{concepts}.pkl"}
    if tokenizer is not None:
        names["tokenizer"] = "tokenizer.model"
    if output is not None:
        _check_output(output, names.values(), force=force)
    fetched = fetch_published(published, concepts=concepts, revision=revision)
    found = {"checkpoint": fetched.checkpoint, "concepts": fetched.concepts, "tokenizer": tokenizer}
    paths = {name: path for name, path in found.items() if path is not None}
    if tokenizer is None:
        click.echo(f"note: {WHERE_THE_TOKENIZER_IS}", err=True)
    if output is not None:
        paths = _copied(paths, {name: output / names[name] for name in paths})
    texts = {name: str(path) for name, path in paths.items()}
    return texts | {"md5": fetched.md5, "revision": fetched.commit}


def _check_output(folder: pathlib.Path, names: Iterable[str], *, force: bool) -> None:
    """Check, before a long download, that files can be written to a folder."""
    check_folder_for_files(folder)
    for name in names if folder.is_dir() else ():
        check_file_output(folder / name, force=force)


def _copied(
    sources: Mapping[str, pathlib.Path], targets: Mapping[str, pathlib.Path]
) -> dict[str, pathlib.Path]:
    for name, target in targets.items():
        with new_folder(target.parent), atomic_file(target) as partial:
            shutil.copyfile(sources[name], partial)
    return dict(targets)


def _fetch_bundle(address: str, output: pathlib.Path | None, *, force: bool) -> pathlib.Path:
    """Fetch a bundle; returns its folder, in the cache if there is no output."""
    if output is not None:
        check_folder_output(output, force=force, marker=MANIFEST_NAME)
    bundle = Bundle.open(address)
    if output is None:
        return bundle.path
    with atomic_folder(output, force=force, marker=MANIFEST_NAME) as partial:
        for name in (*bundle.manifest.files, MANIFEST_NAME):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, partial / name)
    return output
