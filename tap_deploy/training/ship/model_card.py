"""The model card of the demo model: what it is, how good it is, how to check that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tap_deploy.config import DEMO
from tap_deploy.demo_model import MAX_WEIGHTS_BYTES
from tap_deploy.training.scores.evaluation import PROMPT_KINDS, PromptScores, Scores
from tap_deploy.training.scores.targets import TARGETS

_TITLES = {
    "mask_iou": "mask mIoU, full picture size",
    "concept_top1": "concept top-1",
    "concept_top5": "concept top-5",
    "caption_named": "caption names the object",
    "caption_exact": "caption exactly right",
    "cider": "CIDEr-D",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells.

    Attributes:
        scores: by subject.
        parameters: numbers in the model that are trained.
        names: concepts to choose from.
        weights_bytes: size of the checkpoint.
        weights_sha256: its digest.
        training: see ``training_summary``.
        history: what was changed during the run, Markdown; "" if nothing was.
        tools: versions of what evaluated it.
    """

    scores: Mapping[str, Scores]
    parameters: int
    names: int
    weights_bytes: int
    weights_sha256: str
    training: Mapping[str, Any]
    history: str
    tools: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self) | {
            "scores": {name: score.to_dict() for name, score in self.scores.items()}
        }


def model_card(facts: CardFacts) -> str:
    """Return the card as Markdown."""
    measured = [_numbers(facts), _targets(facts)]
    parts = [_about(facts), *measured, _training(facts.training), facts.history, _REST]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _about(facts: CardFacts) -> str:
    return f"""
# {DEMO}

A Tokenize Anything of {facts.parameters / 1e6:.1f} million parameters that masks, names and
captions {facts.names} kinds of objects in made scenes of 256 x 256 pixels. It has the
architecture and the file format of the published models, so that everything in this project can
be tried, timed and measured with it. It is of no use on photographs of real things.

| file | |
|---|---|
| `{DEMO}.safetensors` | {facts.weights_bytes / 1e6:.1f} MB: parameters in float16, buffers in float32; SHA-256 `{facts.weights_sha256}` |
| `{DEMO}.json` | sizes of the model, the fields of `TapConfig` |
| `tokenizer.model` | SentencePiece |
| `concepts.npz` | a vector for each of the {facts.names} names |
| `scores.json` | the numbers below, with all digits, and how they came about |
| `samples/` | pictures, prompts and right answers |
"""  # noqa: E501  # a row of a table has no second line


def _numbers(facts: CardFacts) -> str:
    subjects = list(facts.scores)
    regions = ", ".join(sorted({str(score.regions) for score in facts.scores.values()}))
    lines = [
        "## Numbers",
        "",
        f"{regions} regions of the test split, which nothing was trained on: other random "
        "numbers and other\nbackgrounds than in training, the same kinds of objects.",
        "",
        "| measure | prompt | " + " | ".join(subjects) + " |",
        "|---|---|" + "---:|" * len(subjects),
    ]
    for field in dataclasses.fields(PromptScores):
        for kind in PROMPT_KINDS:
            values = [getattr(getattr(s, kind), field.name) for s in facts.scores.values()]
            digits = 1 if field.name == "cider" else 3
            cells = " | ".join(f"{value:.{digits}f}" for value in values)
            lines.append(f"| {_TITLES[field.name]} | {kind} | {cells} |")
    tools = ", ".join(f"{name} {version}" for name, version in facts.tools.items())
    lines += ["", f"Measured with {tools}. To measure again:", "", "    tap-export eval-demo"]
    return "\n".join(lines)


def _targets(facts: CardFacts) -> str:
    lines = ["## Asked for and reached", "", "| | asked for | reached |", "|---|---:|---:|"]
    for target in TARGETS:
        found = min(target.found(score) for score in facts.scores.values())
        mark = "" if found >= target.least else " (missed)"
        lines.append(f"| {target.text} | >= {target.least:g} | {found:.3f}{mark} |")
    mark = "" if facts.weights_bytes <= MAX_WEIGHTS_BYTES else " (missed)"
    size = f"{facts.weights_bytes / 1e6:.2f} MB{mark}"
    lines.append(f"| size of the weights | <= {MAX_WEIGHTS_BYTES / 1e6:g} MB | {size} |")
    lines += ["", "The lower of the columns above counts; names and captions with box prompts."]
    return "\n".join(lines)


def _training(summary: Mapping[str, Any]) -> str:
    runs = list(_runs(summary))
    lines = "\n".join(f"{place}. {_run(run)}" for place, run in enumerate(runs, 1))
    return f"""
## Training

{lines}

`docs/training.md` has the objective and the schedules. To train such a model anew, measure it and
put it in the place of this one, in a checkout:

    scripts/train_demo FOLDER
"""


def _runs(summary: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield all runs that led to a model, the first one first, as far as they are known."""
    origin = summary.get("origin")
    if origin is not None and origin["run"] is not None:
        yield from _runs(origin["run"])
    yield summary


def _run(summary: Mapping[str, Any]) -> str:
    origin = summary.get("origin")
    begun = "new weights" if origin is None else f"weights of SHA-256 `{origin['sha256'][:12]}…`"
    return (
        f"From {begun}: {summary['step']} of {summary['steps']} steps of "
        f"{summary['pictures_per_step']} scenes with {summary['regions_per_picture']} regions "
        f"each, seed {summary['seed']}, learning rate {summary['learning_rate']:g}; weights of "
        f"masks {summary['mask_weight']:g}, captions {summary['caption_weight']:g}, auxiliary "
        f"heads {summary['dense_weight']:g}; {summary['hours']:.1f} hours."
    )


_REST = """
## Limits

- Only objects that look like the glyphs of Noto Color Emoji, 56 to 140 pixels large.
- Captions know a size, a colour, a place and one neighbour, and nothing else.
- Colours and relations are learned as the rules of `docs/scenes.md` put them, not as people do.

## Licences

Weights, tokenizer and sample pictures: Apache-2.0, as this project. They were made with Noto Color
Emoji (SIL OFL 1.1, which leaves documents made with the font free), photographs that scikit-image
has under CC0 or in the public domain, and sentence vectors of all-MiniLM-L6-v2 (Apache-2.0);
`docs/scenes.md` has the list.
"""
