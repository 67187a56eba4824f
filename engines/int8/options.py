"""How to come to INT8, and on which pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection

from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.int8.add import QuantizeOptions
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.engines.int8.budget import Budget
from tap_deploy.engines.smoothing.smoothed_bundle import AUTO, SMOOTHQUANT
from tap_deploy.engines.verdict.judge import VerdictOptions
from tap_deploy.engines.verdict.regions import split_images
from tap_deploy.errors import InputError

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
