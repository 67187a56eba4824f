"""Options of the int8 workflow, and selection of its pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection

from tap_deploy.bundle.variant import Variant
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.engines.int8.budget import AccuracyBudget
from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes, default_selection
from tap_deploy.engines.smoothing.smoothed_variant import AUTO, SMOOTHQUANT
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
    """Options of the int8 workflow.

    Attributes:
        quantize: calibration pictures and method.
        smoothquant: ``auto`` smooths where that lowers the error on held-back pictures, ``on``
            everywhere, ``off`` nowhere.
        budget: accuracy budget for the mixed-precision search; None for no search.
        exclusions: blocks that stay float, instead of a search.
        evaluation_data: pictures to judge on; None holds back a fifth of the calibration data.
        evaluation_samples: maximum number of pictures to judge on.
        verdict: options of the verdict; None for no verdict.

    Raises:
        InputError: unknown SmoothQuant mode, both budget and exclusions, or fewer than 1 sample.
    """

    quantize: QuantizeOptions
    smoothquant: str = AUTO
    budget: AccuracyBudget | None = None
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
            raise InputError("budget and exclusions are both given; expected only one of them")
        if self.evaluation_samples < 1:
            raise InputError(
                f"evaluation_samples is {self.evaluation_samples}; expected at least 1"
            )

    def images(self) -> tuple[CalibrationImages, CalibrationImages | None]:
        """Return the pictures to calibrate on, and those to judge on (None without a verdict).

        Raises:
            InputError: there are no pictures, one cannot be read and must not be skipped, or none
                is left to judge on.
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
        # Draw more, so that the requested number remains for calibration.
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
    """Return pictures to judge on, without calibration pictures.

    Args:
        path: a folder, a picture, or a list of paths.
        seed: seed of the random choice, if there are too many.
        samples: maximum number of pictures.
        calibrated_on: SHA-256 of pictures to exclude.
        strict: raise for an unreadable picture instead of skipping it.

    Raises:
        InputError: there are no pictures, all are excluded, or one cannot be read and must not be
            skipped.
    """
    return CalibrationImages.from_path(
        path, samples=samples, seed=seed, exclude=calibrated_on, strict=strict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of calibration and quantization.

    Attributes:
        calibration_data: folder of pictures, a picture, or a list of paths.
        prompts_file: JSON with prompts, see ``CalibrationPrompts.from_file``; None for random
            prompts.
        method: one of ``precisions.CALIBRATION_METHODS``.
        samples: maximum number of calibration pictures.
        cache: calibration cache file; the state of an unfinished calibration is stored next to it.
        force: replace existing int8 graphs and a stale cache.
        seed: seed of the random pictures and prompts.
        attention: also quantize the attention matmuls (QKᵀ and PV).
        residuals: also quantize residual additions.
        reduce_range: 7-bit weights for CPUs without VNNI; see ``qdq_from_ranges``.
        threads: CPU threads; None for one per core.
        strict: raise for an unreadable picture instead of skipping it.

    Raises:
        InputError: no calibration data, unknown method, or a number is too small.
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
                "int8 needs real calibration pictures, similar to those in production; pass them "
                "with --calibration-data DIR (500 or more)"
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
        """Return the calibration pictures.

        Raises:
            InputError: there are no pictures, or one cannot be read and must not be skipped.
        """
        path = pathlib.Path(str(self.calibration_data))
        return CalibrationImages.from_path(
            path, samples=self.samples, seed=self.seed, strict=self.strict
        )

    def selection(self, variant: Variant) -> dict[str, ChosenNodes]:
        """Return the nodes to quantize in every fp32 graph."""
        return default_selection(variant, attention=self.attention, residuals=self.residuals)

    def prompts(self) -> CalibrationPrompts:
        """Load the prompts from the file, or return random ones without a file.

        Raises:
            InputError: invalid file.
        """
        if self.prompts_file is None:
            return CalibrationPrompts(seed=self.seed)
        return CalibrationPrompts.from_file(self.prompts_file, seed=self.seed)
