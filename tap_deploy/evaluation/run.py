"""Runs a subject through a protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from tap_deploy.evaluation.answers import Answers
from tap_deploy.evaluation.data_pictures import DataPicture
from tap_deploy.evaluation.subject import Subject

Scores = dict[str, float | None]


class EvaluationProtocol(Protocol):
    """What is asked about each picture of a data set, and how the answers are scored."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def key(self) -> Mapping[str, str]:
        """What the answers depend on, apart from the subject."""

    @property
    def conditions(self) -> Mapping[str, str]:
        """What the metrics depend on beside the answers; complete after ``score``."""

    @property
    def pictures(self) -> tuple[DataPicture, ...]:
        """The pictures, in order."""

    @property
    def num_regions(self) -> int:
        """Number of regions that the subject is asked about."""

    def answer(self, subject: Subject, picture: DataPicture) -> dict[str, Any]:
        """Return what a subject says about a picture, as JSON types."""

    def score(self, answers: Mapping[int, Mapping[str, Any]]) -> Scores:
        """Return the metrics of the answers by picture."""


def answer_all(
    protocol: EvaluationProtocol,
    subject: Subject,
    pictures: Iterable[DataPicture],
    answers: Answers,
    on_picture: Callable[[], None] = lambda: None,
) -> None:
    """Ask a subject about pictures, one at a time.

    Args:
        protocol: data set and questions.
        subject: the predictor.
        pictures: those of the protocol that have no answer yet.
        answers: where the answers go.
        on_picture: called before each picture.

    Raises:
        InputError: a picture cannot be read, or the answers cannot be written.
        SessionError: the backend failed.
    """
    for picture in pictures:
        on_picture()
        answers.add(picture.id, protocol.answer(subject, picture))
