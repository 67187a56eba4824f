"""What ``tap-export verify`` compares with, on which pictures, and within which tolerances."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import Golden
from tap_deploy.config import DEMO
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, option_group
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import InputError
from tap_deploy.image import load_image, model_image
from tap_deploy.precisions import FP32
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import ONNXRUNTIME, RunOn
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.verify.picture_samples import PromptedPicture, golden_from_sessions
from tap_deploy.verify.suite import FULL, SHORT
from tap_deploy.verify.tolerances import Tolerance, Tolerances

if TYPE_CHECKING:
    from tap_deploy.reference.model import TapModel

MOST_PICTURES = 32
SUITES = {"short": SHORT, "full": FULL}
BUNDLE, REFERENCE = "bundle", "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare with, and within which tolerances.

    Attributes:
        against: ``bundle``: its golden samples, and its fp32 graphs on pictures; ``reference``:
            PyTorch; None for PyTorch if there is a checkpoint.
        checkpoint: weights for PyTorch; None for those shipped with this package.
        images: pictures to compare on as well: a folder, a picture, or a list of paths.
        prompts: JSON with prompts for the pictures; None proposes them.
        suite: also run the parity suite, a key of ``SUITES``; None leaves it out.
        bisect: find the first layer out of tolerance of a graph that fails.
        atol: ``name:value`` pairs that replace tolerances by absolute ones.
        rtol: ``name:value`` pairs that replace tolerances by relative ones.

    Raises:
        InputError: options that exclude each other.
    """

    against: str | None = None
    checkpoint: pathlib.Path | None = None
    images: pathlib.Path | None = None
    prompts: pathlib.Path | None = None
    suite: str | None = None
    bisect: bool = False
    atol: tuple[str, ...] = ()
    rtol: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.against == BUNDLE and self.checkpoint is not None:
            raise InputError("--against bundle needs no --checkpoint; pass one of them")
        if self.prompts is not None and self.images is None:
            raise InputError("--prompts are for the pictures of --images; pass both")

    @property
    def needs_torch(self) -> bool:
        """Whether PyTorch is the reference."""
        return self.checkpoint is not None or self.against == REFERENCE

    @property
    def reference_name(self) -> str:
        """What the graphs are compared with, for reports."""
        if self.needs_torch:
            return "PyTorch"
        pictures = "" if self.images is None else "; on pictures, the fp32 graphs in onnxruntime"
        return f"golden samples, made by PyTorch{pictures}"

    def require_reference(self, run_on: RunOn) -> None:
        """Raise InputError if the pictures would compare graphs with themselves."""
        itself = run_on.on_cpu and (run_on.backend, run_on.precision) == (ONNXRUNTIME, FP32)
        if self.images is not None and itself and not self.needs_torch:
            raise InputError(
                "fp32 graphs in onnxruntime are the reference for --images themselves; pass "
                "--checkpoint FILE, --against reference, or another precision or backend"
            )

    @property
    def own_tolerances(self) -> bool:
        """Whether the user chose tolerances, so that the result says nothing to others."""
        return bool(self.atol or self.rtol)

    def tolerances(self, defaults: Tolerances) -> Tolerances:
        """Return tolerances with those of the user in their place.

        Raises:
            InputError: a pair is malformed, or names an unknown output, or one twice.
        """
        if not self.own_tolerances:
            return defaults
        chosen: dict[str, Tolerance] = {}
        for option, pairs, relative in (("--atol", self.atol, False), ("--rtol", self.rtol, True)):
            for pair in pairs:
                name, value = _parsed(option, pair, defaults)
                if name in chosen:
                    raise InputError(f"{option} {pair}: {name} already has a tolerance; pass one")
                chosen[name] = Tolerance(max=value, relative=relative)
        return {**defaults, **chosen}

    def is_of_bundle(self, bundle: Bundle) -> bool:
        """Whether the reference is that of the bundle, and not a model with other weights."""
        if not self.needs_torch:
            return True
        return sha256_of_file(self._weights(bundle)) == bundle.manifest.checkpoint.sha256

    def goldens(self, bundle: Bundle, threads: int | None) -> list[Golden]:
        """Return the samples to compare on, with the outputs of the reference.

        Raises:
            BundleError: the bundle has no golden samples.
            CheckpointError: the checkpoint cannot be loaded.
            InputError: a picture or its prompts cannot be read, or the weights are missing.
            MissingDependencyError: a package is not installed.
        """
        if self.needs_torch:
            return list(self._from_torch(bundle, threads))
        return [bundle.golden(), *self._from_sessions(bundle, threads)]

    def reference_sessions(self, bundle: Bundle, run_on: RunOn) -> Mapping[str, Session] | None:
        """Return sessions that are not those to verify; None without PyTorch for fp32."""
        if self.needs_torch:
            model = self.model(bundle)
            from tap_deploy.export.samples import sessions_from_model

            return sessions_from_model(model)
        if run_on.on_cpu and (run_on.backend, run_on.precision) == (ONNXRUNTIME, FP32):
            return None
        threads = run_on.threads if run_on.on_cpu else None
        return sessions_from_bundle(bundle, RunOn(threads=threads, allow_failed=True))

    def model(self, bundle: Bundle) -> TapModel:
        """Load the PyTorch model.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            MissingDependencyError: torch is not installed.
        """
        require_export_extra()
        from tap_deploy.reference.checkpoint import load_checkpoint

        sizes = bundle.manifest.weights_config
        weights, image_size = self._weights(bundle), bundle.config.image_size
        model, _ = load_checkpoint(weights, sizes, image_size=image_size)
        return model

    def _from_sessions(self, bundle: Bundle, threads: int | None) -> Iterator[Golden]:
        if self.images is None:
            return
        with TapPredictor.from_bundle(bundle.path, threads=threads, allow_failed=True) as predictor:
            pictures = list(self._pictures(predictor, bundle))
        sessions = sessions_from_bundle(bundle, RunOn(threads=threads, allow_failed=True))
        for picture in pictures:
            yield golden_from_sessions(sessions, bundle.config, picture)
        for session in sessions.values():
            session.close()

    def _from_torch(self, bundle: Bundle, threads: int | None) -> Iterator[Golden]:
        model = self.model(bundle)
        from tap_deploy.export.samples import golden_from_picture, golden_samples

        yield from golden_samples(model)
        if self.images is None:
            return
        with TapPredictor.from_bundle(bundle.path, threads=threads, allow_failed=True) as predictor:
            for picture in self._pictures(predictor, bundle):
                yield golden_from_picture(model, picture)

    def _weights(self, bundle: Bundle) -> pathlib.Path:
        if self.checkpoint is not None:
            return self.checkpoint
        if bundle.manifest.model != DEMO:
            raise InputError(
                f"--against reference needs the weights of {bundle.manifest.model}; pass "
                "--checkpoint FILE"
            )
        return DemoModel().weights

    def _pictures(self, predictor: TapPredictor, bundle: Bundle) -> Iterator[PromptedPicture]:
        from tap_deploy.engines.calibration.pictures import CalibrationImages
        from tap_deploy.engines.calibration.prompts import CalibrationPrompts
        from tap_deploy.engines.verdict.regions import cases_from_images

        assert self.images is not None
        found = CalibrationImages.from_path(self.images, samples=MOST_PICTURES)
        own = None if self.prompts is None else CalibrationPrompts.from_file(self.prompts)
        for path, digest in zip(found.paths, found.digests, strict=True):
            one = CalibrationImages(paths=(path,), digests=(digest,))
            rgb = load_image(path, convert=True)
            images, frame = model_image(rgb, bundle.config.image_size)
            prompts = [case.prompts for case in cases_from_images(predictor, one, prompts=own)]
            yield PromptedPicture(
                name=path.name,
                images=images,
                prompts=[(p.model_coords(frame.scale), p.labels) for p in prompts],
            )


verify_options = option_group(
    "options",
    VerifyOptions,
    click.option(
        "--against",
        type=click.Choice([BUNDLE, REFERENCE]),
        help="bundle: its golden samples, and its fp32 graphs on --images. reference: PyTorch.",
    ),
    click.option(
        "--checkpoint",
        type=FILE,
        help="Weights for PyTorch; the demo model has them. Compares on more samples.",
    ),
    click.option(
        "--images",
        type=FILE,
        help="Compare on these pictures as well: a folder, a picture or a list; at most "
        f"{MOST_PICTURES}, chosen at random.",
    ),
    click.option("--prompts", type=FILE, help="JSON with prompts for --images; see quantize."),
    click.option(
        "--suite",
        type=click.Choice(list(SUITES)),
        help="Also run the parity suite: every graph in every shape, and its properties.",
    ),
    click.option(
        "--bisect",
        is_flag=True,
        help="Find the first layer out of tolerance of a graph that fails.",
    ),
    click.option(
        "--atol",
        multiple=True,
        metavar="NAME:VALUE",
        help="Absolute tolerance of an output, for example low_res_masks:1e-3; repeatable.",
    ),
    click.option(
        "--rtol",
        multiple=True,
        metavar="NAME:VALUE",
        help="Tolerance relative to the largest expected magnitude of an output; repeatable.",
    ),
)


def _parsed(option: str, pair: str, known: Tolerances) -> tuple[str, float]:
    name, _, text = pair.rpartition(":")
    if name not in known:
        raise InputError(
            f"{option} {pair}: expected NAME:VALUE with one of the outputs {', '.join(known)}"
        )
    value = -1.0
    with contextlib.suppress(ValueError):
        value = float(text)
    if not 0 <= value < math.inf:
        raise InputError(f"{option} {pair}: {text!r} is no tolerance; expected a number from 0")
    return name, value
