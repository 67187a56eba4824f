"""Agreement: how far a candidate's answers are from those of the reference, on real regions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.engines.verdict.captions import (
    CaptionAgreement,
    Divergence,
    first_divergences,
    reference_margins,
)
from tap_deploy.errors import InputError
from tap_deploy.pictures.source import ImageSource
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_captioner import Captioner

Sessions = Mapping[str, Session]

# Fields of ``Regions`` whose signal to noise ratio is reported beside that of the encoder.
_REGION_TENSORS = ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings")
_LARGEST_SQNR_DB = 200.0  # stands for "no difference at all", which JSON cannot write
_CAPTIONS_PER_CALL = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One picture and what is asked about it; coordinates in pixels of the picture."""

    image: ImageSource
    prompts: Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of two subjects over all regions; shares and IoU are in 0..1.

    Attributes:
        images: pictures.
        regions: prompts on them.
        mask_iou: mean intersection over union of the two masks, at the size of the picture.
        mask_iou_worst: mean of the worst twentieth of the regions.
        same_mask_token: share of regions that the same mask token answered.
        concept_top1: share of regions with the same likeliest concept; None without a vocabulary.
        iou_drift: mean absolute difference of the IoU predictions.
        captions: agreement of the captions.
        sqnr_db: tensor -> signal to quantization noise ratio, decibels.
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """What the reference said; masks are packed to bits."""

    encoded: EncodedImage
    regions: Regions
    packed_masks: np.ndarray
    concepts: np.ndarray | None  # int [P], the likeliest

    @property
    def masks(self) -> np.ndarray:
        shape = (len(self.regions), self.regions.image_height, self.regions.image_width)
        count = int(np.prod(shape))
        bits: np.ndarray = np.unpackbits(self.packed_masks, count=count).astype(bool)
        return bits.reshape(shape)


class ReferenceAnswers:
    """The cases and what the reference says about them, made once for any number of candidates.

    Memory holds per picture its embeddings, and per region one bit a pixel and the low
    resolution logits of the chosen mask.

    Args:
        sessions: the reference, one session per graph.
        config: sizes of the model.
        cases: pictures with prompts.
        vocabulary: concepts to choose names from.

    Raises:
        InputError: there are no regions, or a picture or prompt cannot be used.
    """

    def __init__(
        self,
        sessions: Sessions,
        config: TapConfig,
        cases: Iterable[Case],
        *,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.sessions, self.config, self.vocabulary = dict(sessions), config, vocabulary
        predictor = TapPredictor(sessions, config)
        self.cases: list[Case] = []
        self._answers: list[_Answer] = []
        for case in cases:
            if len(case.prompts):
                self.cases.append(case)
                self._answers.append(self._answer(predictor, case))
        if not self.cases:
            raise InputError("no regions to compare on; expected pictures with prompts")

    def agreement(self, sessions: Sessions) -> Agreement:
        """Ask a candidate for the same regions and compare.

        Args:
            sessions: the candidate: any mix, one session per graph. What comes before the first
                session that is not the reference's own is not computed again.

        Raises:
            SessionError: the backend failed.
        """
        mixed = self.sessions | dict(sessions)
        tally = _Tally()
        for case, answer in zip(self.cases, self._answers, strict=True):
            encoded, regions = self._ask(mixed, case, answer)
            self._compare(tally, answer, encoded, regions)
        return tally.agreement(len(self.cases), self.vocabulary is not None)

    def _ask(self, sessions: Sessions, case: Case, answer: _Answer) -> tuple[EncodedImage, Regions]:
        predictor = TapPredictor(sessions, self.config)
        same_encoder = self._is_reference(sessions, graphs.IMAGE_ENCODER)
        encoded = answer.encoded if same_encoder else predictor.encode(case.image)
        if same_encoder and self._is_reference(sessions, graphs.PROMPT_DECODER):
            ids = _captions(sessions[graphs.TEXT_DECODER], self.config, answer.regions)
            masks = answer.masks
            return encoded, dataclasses.replace(answer.regions, caption_ids=ids, masks=masks)
        return encoded, predictor.predict(encoded, prompts=case.prompts)

    def _is_reference(self, sessions: Sessions, name: str) -> bool:
        return sessions[name] is self.sessions[name]

    def _answer(self, predictor: TapPredictor, case: Case) -> _Answer:
        encoded = predictor.encode(case.image)
        regions = predictor.predict(encoded, prompts=case.prompts)
        assert regions.masks is not None
        return _Answer(
            encoded=encoded,
            regions=dataclasses.replace(regions, masks=None),
            packed_masks=np.packbits(regions.masks),
            concepts=self._likeliest(regions),
        )

    def _likeliest(self, regions: Regions) -> np.ndarray | None:
        if self.vocabulary is None:
            return None
        likeliest: np.ndarray = self.vocabulary.scores(regions.semantic_embeddings).argmax(axis=1)
        return likeliest

    def _compare(
        self, tally: _Tally, answer: _Answer, encoded: EncodedImage, regions: Regions
    ) -> None:
        assert regions.masks is not None
        expected = answer.regions
        tally.mask_ious += mask_ious(answer.masks, regions.masks).tolist()
        tally.same_tokens += (expected.mask_index == regions.mask_index).tolist()
        drift = np.abs(expected.iou_predictions - regions.iou_predictions)
        tally.iou_drifts += np.nan_to_num(drift, nan=np.inf).tolist()
        concepts = self._likeliest(regions)
        if concepts is not None and answer.concepts is not None:
            tally.same_concepts += (answer.concepts == concepts).tolist()
        tally.add_signal(
            "image_embeddings", answer.encoded.image_embeddings, encoded.image_embeddings
        )
        for name in _REGION_TENSORS:
            tally.add_signal(name, getattr(expected, name), getattr(regions, name))
        self._compare_captions(tally, expected, regions)

    def _compare_captions(self, tally: _Tally, expected: Regions, found: Regions) -> None:
        assert expected.caption_ids is not None and found.caption_ids is not None
        pad = self.config.pad_id
        lengths = (expected.caption_ids[:, 1:] != pad).sum(axis=1)
        equal, places = first_divergences(expected.caption_ids, found.caption_ids, lengths)
        tally.caption_lengths += lengths.tolist()
        tally.equal_tokens += equal.tolist()
        rows = np.flatnonzero(places > 0)
        if not len(rows):
            return
        margins = reference_margins(
            self.sessions[graphs.TEXT_DECODER],
            self.config,
            expected.semantic_tokens[rows],
            expected.caption_ids[rows],
            found.caption_ids[rows],
            places[rows],
        )
        tally.divergences += [
            Divergence(position=int(place), logit_margin=float(margin))
            for place, margin in zip(places[rows], margins, strict=True)
        ]


def mask_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of each pair of masks bool [P, H, W], float64 [P]; 1 for two empty ones."""
    union = (a | b).sum(axis=(1, 2))
    ious: np.ndarray = np.where(union, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)
    return ious


class _Tally:
    """One entry per region, and sums of squares per tensor."""

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


def _captions(session: Session, config: TapConfig, regions: Regions) -> np.ndarray:
    captioner, tokens = Captioner(session, config), regions.semantic_tokens
    return np.concatenate(
        [
            captioner.generate(tokens[start : start + _CAPTIONS_PER_CALL])
            for start in range(0, len(tokens), _CAPTIONS_PER_CALL)
        ]
    )
