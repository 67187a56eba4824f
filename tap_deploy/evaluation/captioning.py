"""Region captions on Visual Genome: ground-truth boxes as prompts."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tap_deploy.errors import InputError
from tap_deploy.evaluation.boxes import prompts_from_boxes
from tap_deploy.evaluation.caption_scores import caption_scores
from tap_deploy.evaluation.data_pictures import DataPicture
from tap_deploy.evaluation.modules import eval_module
from tap_deploy.evaluation.subject import Subject, encoded
from tap_deploy.evaluation.visual_genome import Phrase, read_phrases
from tap_deploy.optional_modules import version_of
from tap_deploy.storage.files import sha256_of_file


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captioning:
    """Boxes of Visual Genome as prompts, the caption of semantic token 0 as answer, greedy.

    Attributes:
        pictures: the pictures to evaluate.
        phrases: boxes and true captions by picture.
        key: what the answers depend on, by name.
    """

    pictures: tuple[DataPicture, ...]
    phrases: Mapping[int, Sequence[Phrase]]
    key: Mapping[str, str]
    _words_by: set[str] = dataclasses.field(default_factory=set, init=False)  # filled by score()

    name: ClassVar[str] = "vg-caption"

    @classmethod
    def read(
        cls, annotations: pathlib.Path, images: pathlib.Path, *, limit: int | None = None
    ) -> Captioning:
        """Read a data set; see ``read_phrases`` for the arguments.

        Raises:
            InputError: the file is malformed, or a picture is missing.
            MissingDependencyError: pycocoevalcap is not installed.
        """
        eval_module("pycocoevalcap.cider.cider")
        pictures, phrases = read_phrases(annotations, images, limit=limit)
        key = {"annotations": sha256_of_file(annotations)}
        return cls(pictures=pictures, phrases=phrases, key=key)

    @property
    def conditions(self) -> dict[str, str]:
        """What the metrics depend on beside the answers; ``words by`` after ``score``."""
        version = version_of("pycocoevalcap") or "unknown"
        return {"pycocoevalcap": version, "words by": " and ".join(sorted(self._words_by))}

    @property
    def num_regions(self) -> int:
        """Number of boxes."""
        return sum(len(self.phrases[picture.id]) for picture in self.pictures)

    def answer(self, subject: Subject, picture: DataPicture) -> dict[str, Any]:
        """Return ``captions``, one per box."""
        boxes = [phrase.box for phrase in self.phrases[picture.id]]
        if not boxes:
            return {"captions": []}
        image = encoded(subject, picture)
        prompts = prompts_from_boxes(boxes, image.frame)
        regions = subject.predict(image, prompts=prompts, masks=False, captions=True)
        if regions.captions is None:
            raise InputError(
                "the model has no tokenizer, so no captions; export it with --tokenizer, or pass "
                "--tokenizer for a checkpoint"
            )
        return {"captions": regions.captions}

    def score(self, answers: Mapping[int, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the metrics times 100; None for METEOR without Java."""
        found, true = [], []
        for picture in self.pictures:
            found += answers[picture.id]["captions"]
            true += [phrase.caption for phrase in self.phrases[picture.id]]
        scores, words_by = caption_scores(found, true)
        self._words_by.add(words_by)
        return scores
