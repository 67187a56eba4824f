"""Measurement of the agreement between a candidate's and the reference's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.engines.verdict.captions import (
    Divergence,
    first_divergences,
    reference_margins,
)
from tap_deploy.engines.verdict.tally import Agreement, _Tally
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_ious
from tap_deploy.pictures.source import ImageSource
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_captioner import Captioner

Sessions = Mapping[str, Session]

# Fields of ``Regions`` whose signal-to-noise ratio is reported, in addition to the encoder's.
_REGION_TENSORS = ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings")
_CAPTIONS_PER_CALL = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A picture with prompts.

    Attributes:
        image: the picture.
        prompts: prompts in pixels of the picture.
    """

    image: ImageSource
    prompts: Prompts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """The reference's answers for one case.

    Attributes:
        encoded: the encoded picture.
        regions: results without masks.
        packed_masks: masks of all regions, packed to bits, uint8.
        concepts: top concept of each region, int [P]; None without a vocabulary.
    """

    encoded: EncodedImage
    regions: Regions
    packed_masks: np.ndarray
    concepts: np.ndarray | None

    @property
    def masks(self) -> np.ndarray:
        shape = (len(self.regions), self.regions.image_height, self.regions.image_width)
        count = int(np.prod(shape))
        bits: np.ndarray = np.unpackbits(self.packed_masks, count=count).astype(bool)
        return bits.reshape(shape)


class ReferenceAnswers:
    """The reference's answers for all cases, computed once for any number of candidates.

    Keeps in memory the embeddings of each picture, and for each region one bit per pixel and the
    low-resolution logits of the selected mask.

    Args:
        sessions: sessions of the reference, one per graph.
        config: sizes of the model.
        cases: pictures with prompts.
        vocabulary: concepts that regions are classified into.

    Raises:
        InputError: there are no regions, or a picture or prompt is invalid.
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
        """Run a candidate on the same cases and compare its answers.

        Args:
            sessions: sessions of the candidate, by graph; graphs without an entry use the
                reference. Graphs before the first one that differs are not run again.

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


def _captions(session: Session, config: TapConfig, regions: Regions) -> np.ndarray:
    captioner, tokens = Captioner(session, config), regions.semantic_tokens
    return np.concatenate(
        [
            captioner.generate(tokens[start : start + _CAPTIONS_PER_CALL])
            for start in range(0, len(tokens), _CAPTIONS_PER_CALL)
        ]
    )
