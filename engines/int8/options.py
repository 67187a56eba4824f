"""How to come to INT8, and on which pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.engines.int8.budget import Budget
from tap_deploy.engines.qdq.chosen_nodes import QuantizationPlan, default_plans
from tap_deploy.engines.smoothing.smoothed_bundle import AUTO, SMOOTHQUANT
from tap_deploy.engines.verdict.judge import VerdictOptions
from tap_deploy.engines.verdict.regions import split_images
from tap_deploy.errors import InputError
from tap_deploy.precisions import (
    CALIBRATION_METHODS,
    DEFAULT_CALIBRATION_METHOD,
)

EVALUATION_SAMPLES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Options:
    """How to come to INT8.

    Attributes:
        quantize: pictures and method.
        smoothquant: ``auto`` smooths where that lowers the noise of held-back pictures, ``on``
            everywhere, ``off`` nowhere.
        budget: what INT8 may cost; blocks that cost too much stay float. None excludes none.
        exclusions: what stays float, in place of a search.
        evaluation_data: pictures to judge on; None holds back a fifth of the calibration data.
        evaluation_samples: pictures to judge on, at most.
        verdict: how to judge; None not to.

    Raises:
        InputError: no such mode of SmoothQuant, both budget and exclusions, or no samples.
    """

    quantize: QuantizeOptions
    smoothquant: str = AUTO
    budget: Budget | None = None
    exclusions: Exclusions | None = None
    evaluation_data: pathlib.Path | None = None
    evaluation_samples: int = EVALUATION_SAMPLES
    verdict: VerdictOptions | None = dataclasses.field(default_factory=VerdictOptions)

    def __post_init__(self) -> None:
        if self.smoothquant not in SMOOTHQUANT:
            raise InputError(
                f"smoothquant is {self.smoothquant!r}; expected {', '.join(SMOOTHQUANT)}"
            )
        if self.budget is not None and self.exclusions is not None:
            raise InputError("a budget and exclusions were given; pass one: both choose blocks")
        if self.evaluation_samples < 1:
            raise InputError(
                f"evaluation_samples is {self.evaluation_samples}; expected at least 1"
            )

    def images(self) -> tuple[CalibrationImages, CalibrationImages | None]:
        """Find the pictures to calibrate on, and those to judge on if there is to be a verdict.

        Raises:
            InputError: there are none, one cannot be read that is not to be skipped, or none is
                left to judge on.
        """
        if self.verdict is None:
            return self.quantize.images(), None
        if self.evaluation_data is not None:
            calibration = self.quantize.images()
            evaluation = evaluation_images(
                self.evaluation_data,
                self.quantize.seed,
                samples=self.evaluation_samples,
                calibrated_on=set(calibration.digests),
                strict=self.quantize.strict,
            )
            return calibration, evaluation
        # Enough more that as many as asked for are left to calibrate on.
        drawn = dataclasses.replace(self.quantize, samples=self.quantize.samples * 5 // 4 + 1)
        calibration, evaluation = split_images(drawn.images())
        return calibration.first(self.quantize.samples), evaluation.first(self.evaluation_samples)


def evaluation_images(
    path: pathlib.Path,
    seed: int = 0,
    *,
    samples: int = EVALUATION_SAMPLES,
    calibrated_on: Collection[str] = (),
    strict: bool = False,
) -> CalibrationImages:
    """Find pictures to judge on, none of which was calibrated on.

    Args:
        path: a folder, a picture, or a list of paths.
        seed: of the draw, if there are too many.
        samples: at most so many.
        calibrated_on: SHA-256 of pictures that must not judge.
        strict: stop at a picture that cannot be read, instead of skipping it.

    Raises:
        InputError: there is none, all were calibrated on, or one cannot be read that is not to
            be skipped.
    """
    return CalibrationImages.from_path(
        path, samples=samples, seed=seed, exclude=calibrated_on, strict=strict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How a bundle shall be quantized.

    Attributes:
        calibration_data: folder of pictures, a picture, or a list of paths.
        prompts_file: JSON with prompts, see ``CalibrationPrompts.from_file``; drawn if None.
        method: how ranges are chosen.
        samples: pictures to look at, at most.
        cache: file that keeps the ranges, and beside it an unfinished calibration.
        force: replace int8 graphs that are there, and a cache that is stale.
        seed: of drawn pictures and prompts.
        attention: quantize the products of attention, too.
        residuals: quantize the sums of residual branches, too.
        reduce_range: weights of 7 bits, for CPUs without VNNI; see ``qdq_from_ranges``.
        threads: CPU threads; None for one per core.
        strict: stop at a picture that cannot be read, instead of skipping it.

    Raises:
        InputError: there are no calibration data, no such method, or a number is too small.
    """

    calibration_data: pathlib.Path | None
    prompts_file: pathlib.Path | None = None
    method: str = DEFAULT_CALIBRATION_METHOD
    samples: int = 500
    cache: pathlib.Path | None = None
    force: bool = False
    seed: int = 0
    attention: bool = False
    residuals: bool = False
    reduce_range: bool = False
    threads: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.calibration_data is None:
            raise InputError(
                "int8 needs real pictures to calibrate with, of the kind that the model will see; "
                "pass them with --calibration-data DIR (500 are better than 100)"
            )
        if self.method not in CALIBRATION_METHODS:
            raise InputError(
                f"unknown method {self.method!r}; expected one of {', '.join(CALIBRATION_METHODS)}"
            )
        if self.samples < 1 or self.seed < 0:
            raise InputError(
                f"samples is {self.samples} and seed {self.seed}; expected at least 1 and 0"
            )

    def images(self) -> CalibrationImages:
        """Find the pictures.

        Raises:
            InputError: there is none, or one cannot be read that is not to be skipped.
        """
        path = pathlib.Path(str(self.calibration_data))
        return CalibrationImages.from_path(
            path, samples=self.samples, seed=self.seed, strict=self.strict
        )

    def plans(self, bundle: Bundle) -> dict[str, QuantizationPlan]:
        """Return what is to be quantized in every graph of a bundle."""
        return default_plans(bundle, attention=self.attention, residuals=self.residuals)

    def prompts(self) -> CalibrationPrompts:
        """Read the prompts, or say how to draw them.

        Raises:
            InputError: the file cannot be used.
        """
        if self.prompts_file is None:
            return CalibrationPrompts(seed=self.seed)
        return CalibrationPrompts.from_file(self.prompts_file, seed=self.seed)
