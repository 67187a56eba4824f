"""Which model to export: its sizes, weights, concepts and tokenizer, from options."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle.manifest import CheckpointRecord
from tap_deploy.config import DEMO, VARIANTS, TapConfig
from tap_deploy.console.config_file import config_from_file
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, option_group
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import InputError
from tap_deploy.hub.published import fetch_published, require_tokenizer
from tap_deploy.published_files import CONCEPTS, MODELS, published_checkpoint

if TYPE_CHECKING:
    from tap_deploy.reference.model import TapModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What to export.

    Attributes:
        model: name of a published variant, or of the demo model.
        config: JSON file with the fields of ``TapConfig``, instead of ``model``.
        image_size: side of the model frame, pixels; None for that of the weights.
        checkpoint: weights.
        synthetic_weights: seed of synthetic weights, instead of ``checkpoint``.
        mark_synthetic: record that the weights of ``checkpoint`` are synthetic.
        concepts: concept weights.
        tokenizer: SentencePiece model of the captions.
        fetch: download the published weights of ``model`` instead of reading ``checkpoint``.
    """

    model: str | None = None
    config: pathlib.Path | None = None
    image_size: int | None = None
    checkpoint: pathlib.Path | None = None
    synthetic_weights: int | None = None
    mark_synthetic: bool = False
    concepts: pathlib.Path | None = None
    tokenizer: pathlib.Path | None = None
    fetch: bool = False

    @property
    def is_synthetic(self) -> bool:
        """Whether the weights are synthetic."""
        return self.mark_synthetic or self.synthetic_weights is not None

    def with_demo_files(self) -> ModelOptions:
        """Return these options, with the files of the package if this is the demo model.

        Raises:
            CheckpointError: they are missing.
        """
        if self.model != DEMO:
            return self
        demo, checkpoint = DemoModel(), self.checkpoint
        if checkpoint is None and self.synthetic_weights is None:
            checkpoint = demo.require().weights
        return dataclasses.replace(
            self,
            checkpoint=checkpoint,
            concepts=self.concepts or demo.concepts,
            tokenizer=self.tokenizer or demo.tokenizer,
        )

    def with_published_files(self) -> ModelOptions:
        """Return these options, with published files from the hub if they are to be fetched.

        Raises:
            InputError: they name other weights as well, or there is no tokenizer.
            CheckpointError, HubError: see ``fetch_published``.
            MissingDependencyError: huggingface_hub, or what the export needs, is not installed.
        """
        if not self.fetch:
            return self
        self._require_fetchable()
        tokenizer = self.tokenizer or require_tokenizer()
        require_export_extra()
        name = CONCEPTS[0] if self.concepts is None else str(self.concepts)
        fetched = fetch_published(
            published_checkpoint(str(self.model)), concepts=name if name in CONCEPTS else None
        )
        return dataclasses.replace(
            self,
            checkpoint=fetched.checkpoint,
            concepts=fetched.concepts or self.concepts,
            tokenizer=tokenizer,
        )

    def _require_fetchable(self) -> None:
        others = {
            "--checkpoint": self.checkpoint,
            "--config": self.config,
            "--synthetic-weights": self.synthetic_weights,
            "--mark-synthetic": self.mark_synthetic or None,
        }
        if self.model == DEMO:
            raise InputError(f"{DEMO} comes with this package; drop --fetch")
        for option, value in others.items():
            if value is not None:
                raise InputError(f"--fetch gets the published weights; drop {option}, or --fetch")
        if self.model is None:
            raise InputError(f"--fetch needs --model, one of {', '.join(MODELS)}")

    def named_config(self) -> tuple[str, TapConfig]:
        """Return the name and the sizes of the model.

        Raises:
            InputError: not exactly one of model and config, or it cannot be read.
        """
        if self.model is not None and self.config is None:
            return self.model, TapConfig.from_name(self.model)
        if self.model is not None or self.config is None:
            raise InputError("pass either --model or --config, to say which model it is")
        return self.config.stem, config_from_file(self.config)

    def load(self, config: TapConfig) -> tuple[TapModel, CheckpointRecord, tuple[str, ...]]:
        """Return the model, the record of its weights, and the parts dropped from their names.

        Args:
            config: sizes of the weights.

        Raises:
            InputError: not exactly one of checkpoint and synthetic weights, or the image size does
                not fit ``config``.
            CheckpointError: the weights cannot be read or do not fit.
        """
        from tap_deploy.reference.image_size import at_image_size

        if self.image_size is not None:
            config.at_image_size(self.image_size)  # reports a wrong size before reading weights
        model, record, removed = self._load_weights(config)
        if self.image_size is None or self.image_size == config.image_size:
            return model, record, removed
        record = dataclasses.replace(record, image_size=config.image_size)
        return at_image_size(model, self.image_size), record, removed

    def _load_weights(
        self, config: TapConfig
    ) -> tuple[TapModel, CheckpointRecord, tuple[str, ...]]:
        """Return what ``load`` does, at the image size of ``config``."""
        from tap_deploy.export.bundle_export import checkpoint_record
        from tap_deploy.reference.checkpoint import load_checkpoint
        from tap_deploy.reference.synthetic import synthetic_model

        seed = self.synthetic_weights
        if self.checkpoint is None and seed is not None:
            label = f"synthetic weights, seed {seed}"
            record = CheckpointRecord(file=label, sha256="", md5="", known_as=None, synthetic=True)
            return synthetic_model(config, seed), record, ()
        if self.checkpoint is None or seed is not None:
            raise InputError("pass either --checkpoint or --synthetic-weights")
        model, found = load_checkpoint(self.checkpoint, config)
        record = checkpoint_record(self.checkpoint.name, found, synthetic=self.mark_synthetic)
        return model, record, found.removed


model_options = option_group(
    "model",
    ModelOptions,
    click.option(
        "--model",
        type=click.Choice(list(VARIANTS)),
        help=f"A published variant, or {DEMO}, whose files come with this package.",
    ),
    click.option(
        "--config",
        type=FILE,
        help='JSON file with the fields of TapConfig, or with them under "config".',
    ),
    click.option(
        "--image-size",
        type=click.IntRange(min=1),
        metavar="PIXELS",
        help="Side of the model frame: a multiple of patch size x window size (256 for published "
        "models, 128 for the demo). Default: that of the weights. Position embeddings are "
        "interpolated; the weights are not retrained, so check accuracy.",
    ),
    click.option("--checkpoint", type=FILE, help="Weights: official .pkl, .pth or .safetensors."),
    click.option(
        "--synthetic-weights",
        type=click.IntRange(min=0),
        metavar="SEED",
        help="Synthetic weights instead of a checkpoint, for tests and timing.",
    ),
    click.option(
        "--mark-synthetic",
        is_flag=True,
        help="Record that the weights of --checkpoint are synthetic.",
    ),
    click.option(
        "--concepts",
        type=FILE,
        help="Concept weights: official .pkl, or .npz; with --fetch, also one of "
        f"{', '.join(CONCEPTS)} (default: the first).",
    ),
    click.option(
        "--tokenizer",
        type=FILE,
        help="SentencePiece model of the captions; with --fetch, default: that of an installed "
        "tokenize_anything.",
    ),
    click.option(
        "--fetch",
        is_flag=True,
        help="Download the published weights of --model and the concepts first; needs "
        '"tap-deploy[hub]". See: tap-export fetch --help',
    ),
)
