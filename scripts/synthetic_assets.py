"""Make synthetic replacements of the files that TAP publishes: checkpoint, concepts, tokenizer.

They have the published formats and random contents, so that export and runtime can be tried
without a download. The resulting masks, names and captions are meaningless.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.console.exits import CleanExits
from tap_deploy.errors import InputError
from tap_deploy.reference.checkpoint import save_checkpoint
from tap_deploy.reference.synthetic import synthetic_state_dict
from tap_deploy.storage.files import atomic_file
from tap_deploy.training.words.caption_tokenizer import train_tokenizer

PROJECT = Path(__file__).resolve().parent.parent
LOGIT_SCALE = 100.0  # CLIP's logit scale, which the published concept weights include
CONCEPTS = (
    "apple", "bicycle", "bird", "book", "bottle", "bowl", "car", "cat", "chair", "clock",
    "coffee", "cup", "dog", "person", "plate", "saucer", "spoon", "table", "tree", "window",
)  # fmt: skip


@click.command(cls=CleanExits)
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help='JSON file with the fields of TapConfig, at the top level or under "config".',
)
@click.option("--seed", default=0, show_default=True, help="Seed of all random numbers.")
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder to write to; existing files are replaced.",
)
def main(config_path: Path, seed: int, output: Path) -> None:
    """Write the config, checkpoint.pkl, concepts.npz and tokenizer.model."""
    try:
        values = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"config {config_path} cannot be read as JSON: {error}") from error
    if isinstance(values, dict):
        values = values.get("config", values)
    config = TapConfig.from_dict(values)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / config_path.name) as partial:
        partial.write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
    save_checkpoint(synthetic_state_dict(config, seed), output / "checkpoint.pkl")
    made_up_vocabulary(config.sem_embed_dim, seed).save(output / "concepts.npz")
    with atomic_file(output / "tokenizer.model") as partial:
        partial.write_bytes(train_tokenizer(own_prose(), config.vocab_size))
    for path in sorted(output.iterdir()):
        click.echo(f"{path.stat().st_size / 1024:10.1f} KiB  {path}")


def made_up_vocabulary(dim: int, seed: int) -> Vocabulary:
    """Return a vocabulary of random vectors of length ``LOGIT_SCALE`` for ``CONCEPTS``.

    ``weights`` is float32 ``[dim, K]``, one column per concept.
    """
    weights = np.random.default_rng(seed).standard_normal((dim, len(CONCEPTS)))
    weights *= LOGIT_SCALE / np.linalg.norm(weights, axis=0)
    return Vocabulary(weights=weights.astype(np.float32), names=CONCEPTS)


def own_prose() -> Iterator[str]:
    """Yield the lines of this project's Markdown files."""
    for path in sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")]):
        yield from filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))


if __name__ == "__main__":
    main()
