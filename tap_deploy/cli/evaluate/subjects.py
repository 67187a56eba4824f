"""What to evaluate: bundles on a backend, and checkpoints in PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import click

from tap_deploy import __version__
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import DEMO, VARIANTS, TapConfig
from tap_deploy.console.config_file import config_from_file
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, option_group
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import InputError
from tap_deploy.evaluation.subject import Subject
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PYTORCH = "PyTorch"
_PROMPTS_PER_CALL = 32  # PyTorch keeps 8 MB of upscaled features per prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """What a checkpoint needs beside its weights; None for that of the first bundle.

    Attributes:
        model: name of a published variant, or of the demo model.
        config: JSON file with the fields of ``TapConfig``, instead of ``model``.
        concepts: concept weights, also for bundles.
        tokenizer: SentencePiece model of the captions.
    """

    model: str | None
    config: pathlib.Path | None
    concepts: pathlib.Path | None
    tokenizer: pathlib.Path | None

    def __post_init__(self) -> None:
        if self.model is not None and self.config is not None:
            raise InputError("pass either --model or --config, to say which model it is")


weights_options = option_group(
    "weights",
    WeightsOptions,
    click.option(
        "--model",
        type=click.Choice(list(VARIANTS)),
        help="Sizes of a CHECKPOINT; default: those of the BUNDLE beside it.",
    ),
    click.option("--config", type=FILE, help="The same, as a JSON file of TapConfig."),
    click.option(
        "--concepts", type=FILE, help="Concept weights, .pkl or .npz; default: the BUNDLE's."
    ),
    click.option(
        "--tokenizer",
        type=FILE,
        help="SentencePiece model for the captions of a CHECKPOINT; default: the BUNDLE's.",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A subject that is not loaded yet.

    Attributes:
        name: its name in the report.
        key: what its answers depend on.
        opened: loads it.
    """

    name: str
    key: Mapping[str, str]
    opened: Callable[[], AbstractContextManager[Subject]]


class Subjects:
    """The bundles and checkpoints of a command line.

    Raises:
        InputError: a path is neither.
        BundleError: a bundle cannot be used.
    """

    def __init__(self, paths: Sequence[str], weights: WeightsOptions) -> None:
        self._weights = weights
        self._bundles = [Bundle.open(path) for path in paths if pathlib.Path(path).is_dir()]
        self._checkpoints = [pathlib.Path(path) for path in paths if pathlib.Path(path).is_file()]
        for path in paths:
            if not pathlib.Path(path).exists():
                raise InputError(f"{path} is neither a bundle nor a file of weights")

    def vocabulary(self) -> Vocabulary:
        """Return the concepts to classify into.

        Raises:
            InputError: there are none.
        """
        found = None
        if self._weights.concepts is not None:
            found = Vocabulary.load(self._weights.concepts)
        elif self._bundles:
            found = self._bundles[0].vocabulary()
        elif self._weights.model == DEMO:
            found = Vocabulary.load(DemoModel().require().concepts)
        if found is None:
            raise InputError("no concepts to classify into; pass --concepts")
        return found

    def candidates(self, run_on: Sequence[RunOn]) -> list[Candidate]:
        """Return the subjects, PyTorch first: the others are compared with it."""
        found = [self._checkpoint(path) for path in self._checkpoints]
        found += [self._bundle(bundle, each) for bundle in self._bundles for each in run_on]
        return found

    def _bundle(self, bundle: Bundle, run_on: RunOn) -> Candidate:
        variant = bundle.variant(run_on.variant)
        several = len({other.path for other in self._bundles}) > 1
        options = dataclasses.asdict(run_on)
        device = run_on.resolved_device.kind  # cuda:0 and cuda:1 continue each other
        runtime = (run_on.backend, run_on.precision, device, run_on.provider)
        digests = [digest for graph in GRAPH_NAMES for digest in variant.digests(graph)]
        return Candidate(
            name=f"{bundle.path.name} " * several + f"{run_on.backend} {run_on.precision}",
            key={
                "version": __version__,
                "graphs": " ".join(digests),
                "run_on": " ".join(map(str, runtime)),
            },
            opened=lambda: TapPredictor.from_bundle(bundle.path, check_hashes=False, **options),
        )

    def _checkpoint(self, path: pathlib.Path) -> Candidate:
        config, image_size = self._sizes(path)
        several = len(self._checkpoints) > 1
        digest = sha256_of_file(path)
        for bundle in self._bundles:
            if bundle.manifest.checkpoint.sha256 not in ("", digest):
                logger.warning(
                    "bundle %s was exported from other weights than %s: differences are not those "
                    "of the conversion alone",
                    bundle.path,
                    path,
                )
        return Candidate(
            name=PYTORCH + f" {path.name}" * several,
            key={
                "version": __version__,
                "checkpoint": digest,
                "image_size": str(image_size or config.image_size),
            },
            opened=lambda: _reference(path, config, image_size, self._tokenizer()),
        )

    def _sizes(self, path: pathlib.Path) -> tuple[TapConfig, int | None]:
        """Return the sizes of a checkpoint, and the image size to run it at if that differs."""
        if self._weights.config is not None:
            return config_from_file(self._weights.config), None
        if self._weights.model is not None:
            return TapConfig.from_name(self._weights.model), None
        if not self._bundles:
            raise InputError(f"{path} has no record of its sizes; pass --model or --config")
        bundle = self._bundles[0]
        return bundle.manifest.weights_config, bundle.config.image_size

    def _tokenizer(self) -> Tokenizer | None:
        if self._weights.tokenizer is not None:
            return Tokenizer(self._weights.tokenizer)
        if self._bundles:
            return self._bundles[0].tokenizer()
        if self._weights.model == DEMO:
            return Tokenizer(DemoModel().require().tokenizer)
        return None


@contextlib.contextmanager
def _reference(
    path: pathlib.Path, config: TapConfig, image_size: int | None, tokenizer: Tokenizer | None
) -> Iterator[Subject]:
    """Yield the PyTorch model, on a GPU if PyTorch sees one."""
    require_export_extra()
    import torch

    from tap_deploy.reference.checkpoint import load_checkpoint
    from tap_deploy.reference.predictor import ReferencePredictor

    # cuDNN's convolutions use TF32 by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, _ = load_checkpoint(path, config, image_size=image_size)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    yield ReferencePredictor(model, None, tokenizer, prompts_per_call=_PROMPTS_PER_CALL)
