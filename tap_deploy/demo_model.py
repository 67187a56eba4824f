"""The demo model: a small TAP that comes with this package, as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tap_deploy.config import DEMO
from tap_deploy.errors import CheckpointError

DEMO_FOLDER = Path(__file__).with_name("demo")  # of what is installed
MAX_WEIGHTS_BYTES = 12_000_000  # what a repository can carry without a thought


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoModel:
    """Where the files of the demo model are.

    Attributes:
        folder: has them all; by default that of the package.
    """

    folder: Path = DEMO_FOLDER

    @property
    def weights(self) -> Path:
        """Return the checkpoint, float16 safetensors; see ``require``."""
        return self.folder / f"{DEMO}.safetensors"

    @property
    def config(self) -> Path:
        """Return the ``TapConfig`` as JSON."""
        return self.folder / f"{DEMO}.json"

    @property
    def tokenizer(self) -> Path:
        """Return the SentencePiece model."""
        return self.folder / "tokenizer.model"

    @property
    def concepts(self) -> Path:
        """Return the vocabulary."""
        return self.folder / "concepts.npz"

    @property
    def card(self) -> Path:
        """Return the model card, Markdown."""
        return self.folder / "MODEL_CARD.md"

    @property
    def scores(self) -> Path:
        """Return what the evaluation gave, JSON; the model card tells it to people."""
        return self.folder / "scores.json"

    @property
    def samples(self) -> Path:
        """Return the folder of sample pictures; see ``demo_samples``."""
        return self.folder / "samples"

    def require(self) -> DemoModel:
        """Return the same, having made sure that weights, tokenizer and concepts are there.

        Raises:
            CheckpointError: one of them is not.
        """
        for path in (self.weights, self.tokenizer, self.concepts):
            if not path.is_file():
                raise CheckpointError(
                    f"{DEMO} is not whole: {path} is missing; install this package anew, or "
                    "train a model and put it there: python -m tap_deploy.training -o RUN, then "
                    "python -m tap_deploy.training.ship.ship RUN"
                )
        return self
