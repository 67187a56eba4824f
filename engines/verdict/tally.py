"""Aggregation of a candidate's agreement with the reference over all regions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tap_deploy.engines.verdict.captions import (
    CaptionAgreement,
    Divergence,
)

_LARGEST_SQNR_DB = 200.0  # replaces infinity (no difference), which JSON does not support


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of a candidate with the reference over all regions; shares and IoUs are 0..1.

    Attributes:
        images: number of pictures.
        regions: number of regions.
        mask_iou: mean IoU between the masks of reference and candidate, at picture size.
        mask_iou_worst: mean IoU of the worst 5 % of the regions.
        same_mask_token: share of regions with the same selected mask token.
        concept_top1: share of regions with the same top concept; None without a vocabulary.
        iou_drift: mean absolute difference of the predicted IoUs.
        captions: agreement of the captions.
        sqnr_db: tensor name -> signal-to-quantization-noise ratio, dB.
    """

    images: int
    regions: int
    mask_iou: float
    mask_iou_worst: float
    same_mask_token: float
    concept_top1: float | None
    iou_drift: float
    captions: CaptionAgreement
    sqnr_db: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)


def evaluated_on(regions: int, images: int) -> str:
    """Return how much was evaluated as text, for example "8 regions in 1 picture …"."""
    return (
        f"{regions} region{'s' if regions != 1 else ''} in {images} "
        f"picture{'s' if images != 1 else ''} not used for calibration"
    )


class _Tally:
    """Collects results per region, and signal and noise energy per tensor."""

    def __init__(self) -> None:
        self.mask_ious: list[float] = []
        self.same_tokens: list[bool] = []
        self.same_concepts: list[bool] = []
        self.iou_drifts: list[float] = []
        self.caption_lengths: list[int] = []
        self.equal_tokens: list[int] = []
        self.divergences: list[Divergence] = []
        self._powers: dict[str, tuple[float, float]] = {}  # signal, noise

    def add_signal(self, name: str, expected: np.ndarray, found: np.ndarray) -> None:
        wide = expected.astype(np.float64)
        noise = np.nan_to_num(found.astype(np.float64) - wide, nan=np.inf)
        signal_power, noise_power = self._powers.get(name, (0.0, 0.0))
        with np.errstate(over="ignore"):
            self._powers[name] = (
                signal_power + float((wide**2).sum()),
                noise_power + float((noise**2).sum()),
            )

    def agreement(self, images: int, with_concepts: bool) -> Agreement:
        ious = np.sort(self.mask_ious)
        worst = ious[: max(1, len(ious) // 20)]
        return Agreement(
            images=images,
            regions=len(ious),
            mask_iou=float(ious.mean()),
            mask_iou_worst=float(worst.mean()),
            same_mask_token=float(np.mean(self.same_tokens)),
            concept_top1=float(np.mean(self.same_concepts)) if with_concepts else None,
            iou_drift=float(np.mean(self.iou_drifts)),
            captions=CaptionAgreement.from_regions(
                self.caption_lengths, self.equal_tokens, self.divergences
            ),
            sqnr_db={name: _decibels(*powers) for name, powers in self._powers.items()},
        )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return _LARGEST_SQNR_DB
    if signal == 0 or not np.isfinite(noise):
        return -_LARGEST_SQNR_DB
    limits = (-_LARGEST_SQNR_DB, _LARGEST_SQNR_DB)
    return float(np.clip(10 * np.log10(signal / noise), *limits))
