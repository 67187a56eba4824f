"""What to evaluate: bundles on a backend, and checkpoints in PyTorch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import click

from tap_deploy import __version__
from tap_deploy.bundle.bundle import TOKENIZER_FILE, Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import DEMO, VARIANTS, TapConfig
from tap_deploy.console.config_file import config_from_file
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, option_group
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import InputError
from tap_deploy.evaluation.subject import Subject
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.hub_address import is_hub_address
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
        name: its name in the report, different from those of the others.
        path: of the bundle or the checkpoint.
        key: what its answers depend on.
        opened: loads it.
    """

    name: str
    path: pathlib.Path
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
        found = [pathlib.Path(path) for path in paths]
        for path in found:
            if not (is_hub_address(path) or path.is_dir() or path.is_file()):
                raise InputError(f"{path} is neither a bundle nor a file of weights")
        self._bundles = [
            Bundle.open(path) for path in found if path.is_dir() or is_hub_address(path)
        ]
        self._checkpoints = [path for path in found if path.is_file()]
        self._labels = _labels([bundle.path for bundle in self._bundles])
        self._labels |= _labels(self._checkpoints)

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
        """Return the subjects, PyTorch first: the others are compared with it.

        Raises:
            InputError: two have the same answers, or one cannot be used.
        """
        found = [self._checkpoint(path) for path in self._checkpoints]
        found += [self._bundle(bundle, each) for bundle in self._bundles for each in run_on]
        for index, candidate in enumerate(found):
            for earlier in found[:index]:
                if earlier.key == candidate.key:
                    raise InputError(
                        f"{earlier.path} and {candidate.path} are the same subject, by the hashes "
                        "of their files; pass it once"
                    )
        return found

    def _bundle(self, bundle: Bundle, run_on: RunOn) -> Candidate:
        variant = bundle.variant(run_on.variant)
        options = dataclasses.asdict(run_on)
        device = run_on.resolved_device.kind  # cuda:0 and cuda:1 continue each other
        runtime = (run_on.backend, run_on.precision, device, run_on.provider)
        digests = [digest for graph in GRAPH_NAMES for digest in variant.digests(graph)]
        return Candidate(
            name=f"{self._labels[bundle.path]} {run_on.backend} {run_on.precision}".lstrip(),
            path=bundle.path,
            key={
                "version": __version__,
                "graphs": " ".join(digests),
                "config": json.dumps(bundle.config.to_dict()),
                "tokenizer": _tokenizer_digest(bundle),
                "run_on": " ".join(map(str, runtime)),
            },
            opened=lambda: TapPredictor.from_bundle(bundle.path, check_hashes=False, **options),
        )

    def _checkpoint(self, path: pathlib.Path) -> Candidate:
        config, image_size = self._sizes(path)
        tokenizer, tokenizer_digest = self._tokenizer()
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
            name=f"{PYTORCH} {self._labels[path]}".rstrip(),
            path=path,
            key={
                "version": __version__,
                "checkpoint": digest,
                "config": json.dumps(config.to_dict()),
                "image_size": str(image_size or config.image_size),
                "tokenizer": tokenizer_digest,
            },
            opened=lambda: _reference(path, config, image_size, tokenizer),
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

    def _tokenizer(self) -> tuple[Tokenizer | None, str]:
        """Return the tokenizer of the checkpoints and its SHA-256; None and "" without one."""
        path = self._weights.tokenizer
        if path is None and self._bundles:
            return self._bundles[0].tokenizer(), _tokenizer_digest(self._bundles[0])
        if path is None and self._weights.model == DEMO:
            path = DemoModel().require().tokenizer
        return (None, "") if path is None else (Tokenizer(path), sha256_of_file(path))


def _labels(paths: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Return what tells paths apart: their names, or the whole paths where names are equal.

    A single path needs no label: its label is empty.
    """
    # abspath(): "." has no name.
    names = {path: pathlib.Path(os.path.abspath(path)).name or str(path) for path in paths}
    if len(names) < 2:
        return dict.fromkeys(names, "")
    times = collections.Counter(names.values())
    return {path: name if times[name] == 1 else str(path) for path, name in names.items()}


def _tokenizer_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of the tokenizer of a bundle, "" if it has none."""
    record = bundle.manifest.files.get(TOKENIZER_FILE)
    return "" if record is None else record.sha256


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
