"""Writes the model card of the demo model."""

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
    """The facts in a model card.

    Attributes:
        scores: name of the subject -> its scores.
        parameters: number of trained parameters.
        names: number of concepts.
        weights_bytes: size of the checkpoint, bytes.
        weights_sha256: SHA-256 of the checkpoint.
        training: see ``RunFolder.summary``.
        history: changes during the run, Markdown; "" if there were none.
        tools: versions of the tools of the evaluation.
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
        """Return the facts as JSON types."""
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

A Tokenize Anything model with {facts.parameters / 1e6:.1f} million parameters, trained to mask,
name and caption {facts.names} kinds of objects in synthetic scenes of 256 x 256 pixels. It has the
architecture and the file format of the published models, so that all parts of this project can be
tried, timed and evaluated with it. It does not work on photographs of real objects.

| file | |
|---|---|
| `{DEMO}.safetensors` | {facts.weights_bytes / 1e6:.1f} MB: parameters in float16, buffers in float32; SHA-256 `{facts.weights_sha256}` |
| `{DEMO}.json` | configuration of the model, the fields of `TapConfig` |
| `tokenizer.model` | SentencePiece model |
| `concepts.npz` | a vector for each of the {facts.names} names |
| `scores.json` | the scores below with all digits, the training settings and tool versions |
| `samples/` | pictures, prompts and expected results |
"""  # noqa: E501  # table rows cannot be wrapped


def _numbers(facts: CardFacts) -> str:
    subjects = list(facts.scores)
    regions = ", ".join(sorted({str(score.regions) for score in facts.scores.values()}))
    lines = [
        "## Scores",
        "",
        f"{regions} regions of the test split, on which the model was not trained: it has other "
        "random numbers and\nbackgrounds, and the same kinds of objects.",
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
    lines += ["", f"Measured with {tools}. To repeat:", "", "    tap-export eval demo"]
    return "\n".join(lines)


def _targets(facts: CardFacts) -> str:
    lines = ["## Targets", "", "| | target | reached |", "|---|---:|---:|"]
    for target in TARGETS:
        found = min(target.found(score) for score in facts.scores.values())
        mark = "" if found >= target.least else " (missed)"
        lines.append(f"| {target.text} | >= {target.least:g} | {found:.3f}{mark} |")
    mark = "" if facts.weights_bytes <= MAX_WEIGHTS_BYTES else " (missed)"
    size = f"{facts.weights_bytes / 1e6:.2f} MB{mark}"
    lines.append(f"| size of the weights | <= {MAX_WEIGHTS_BYTES / 1e6:g} MB | {size} |")
    lines += [
        "",
        "Reached is the lowest score of the columns above; names and captions are scored with box",
        "prompts.",
    ]
    return "\n".join(lines)


def _training(summary: Mapping[str, Any]) -> str:
    runs = list(_runs(summary))
    lines = "\n".join(f"{place}. {_run(run)}" for place, run in enumerate(runs, 1))
    return f"""
## Training

{lines}

`docs/training.md` describes the objective and the schedules. To train such a model, evaluate it and
replace this one, run in a checkout:

    scripts/train_demo FOLDER
"""


def _runs(summary: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the known runs that led to a model, in order."""
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
        f"each, seed {summary['seed']}, learning rate {summary['learning_rate']:g}; loss weights "
        f"{summary['mask_weight']:g} for masks, {summary['caption_weight']:g} for captions, "
        f"{summary['dense_weight']:g} for auxiliary heads; {summary['hours']:.1f} hours."
    )


_REST = """
## Limits

- It recognises only objects that look like the glyphs of Noto Color Emoji, 56 to 140 pixels large.
- Captions contain only a size, a colour, a place and one neighbour.
- Colours and relations follow the rules of `docs/scenes.md`, not human judgement.

## Licences

Weights, tokenizer and sample pictures: Apache-2.0, like this project. They were made with Noto
Color Emoji (SIL OFL 1.1, which does not apply to documents made with the font), photographs from
scikit-image that are CC0 or in the public domain, and sentence vectors of all-MiniLM-L6-v2
(Apache-2.0); `docs/scenes.md` lists them.
"""
