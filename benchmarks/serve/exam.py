"""Questions to the server, with the predictor's answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tap_deploy.demo_model import BOX, SKETCH, Sample, SampleRegion, load_samples
from tap_deploy.masks import mask_from_rle
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts

CLICKS_PER_SIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A prompt on a picture.

    Attributes:
        picture: index of the picture.
        prompt: as in the JSON of a request.
        prompts: the same for the predictor.
        expected: the predictor's region, with mask, name and caption.
    """

    picture: int
    prompt: dict[str, Any]
    prompts: Prompts
    expected: dict[str, Any]

    def body(self, *, captions: bool) -> dict[str, Any]:
        """Return the JSON of a request."""
        return {"prompts": [self.prompt], "masks": "rle", "captions": captions}

    @property
    def is_click(self) -> bool:
        """Whether it is a single point."""
        return len(self.prompt.get("points", ())) == 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Exam:
    """Pictures and questions about them.

    Attributes:
        pictures: bytes of picture files.
        encoded: the same pictures, encoded by the predictor.
        questions: about them.
    """

    pictures: tuple[bytes, ...]
    encoded: tuple[EncodedImage, ...]
    questions: tuple[Question, ...]

    @classmethod
    def of(cls, predictor: TapPredictor, *, pictures: int | None = None) -> Exam:
        """Ask a predictor for points, boxes and sketches on sample pictures, one after another.

        Args:
            predictor: knows the answers.
            pictures: number of sample pictures; None for all.
        """
        samples = load_samples()[:pictures]
        files = tuple(sample.picture.read_bytes() for sample in samples)
        encoded = tuple(map(predictor.encode, files))
        questions = [
            Question(
                picture=index,
                prompt=prompt,
                prompts=prompts,
                expected=_answer(predictor, encoded[index], prompts),
            )
            for index, sample in enumerate(samples)
            for prompt, prompts in _asked(sample, encoded[index])
        ]
        # Neighbours in the list are about different pictures, as with many users.
        order = np.random.default_rng(0).permutation(len(questions))
        return cls(
            pictures=files, encoded=encoded, questions=tuple(questions[index] for index in order)
        )

    def clicks(self) -> Exam:
        """Return the questions that are single points."""
        clicks = tuple(question for question in self.questions if question.is_click)
        return dataclasses.replace(self, questions=clicks)


@dataclasses.dataclass(kw_only=True)
class Tally:
    """Comparison of answers with those of the predictor.

    Attributes:
        answers: answers that were compared.
        masks: answers whose mask differs in at least one pixel.
        pixels: pixels that differ in all of them.
        most_pixels: pixels that differ in the worst of them.
        names: answers with another name.
        captions: answers with another caption.
        probability: largest difference of the probability of a name.
    """

    answers: int = 0
    masks: int = 0
    pixels: int = 0
    most_pixels: int = 0
    names: int = 0
    captions: int = 0
    probability: float = 0.0

    @property
    def wrong(self) -> int:
        """Number of differences in masks, names and captions."""
        return self.masks + self.names + self.captions

    def add(self, question: Question, region: dict[str, Any]) -> None:
        """Compare the region of an answer; a caption is compared if there is one."""
        expected = question.expected
        self.answers += 1
        if region["segmentation"] != expected["segmentation"]:
            masks = [mask_from_rle(each["segmentation"]) for each in (region, expected)]
            pixels = int(np.count_nonzero(masks[0] ^ masks[1]))
            self.masks += 1
            self.pixels += pixels
            self.most_pixels = max(self.most_pixels, pixels)
        if region["caption"] is not None:
            self.captions += region["caption"] != expected["caption"]
        if expected["concepts"] is not None:
            (found,), (right,) = region["concepts"], expected["concepts"]
            self.names += found["name"] != right["name"]
            distance = abs(found["probability"] - right["probability"])
            self.probability = max(self.probability, distance)


def _answer(predictor: TapPredictor, image: EncodedImage, prompts: Prompts) -> dict[str, Any]:
    regions = predictor.predict(image, prompts=prompts, masks="rle").to_dict()["regions"]
    region: dict[str, Any] = regions[0]
    return region


def _asked(sample: Sample, image: EncodedImage) -> list[tuple[dict[str, Any], Prompts]]:
    """Return the prompts of a sample and a grid of clicks, as JSON and for the predictor."""
    width, height = image.frame.width, image.frame.height
    shares = (np.arange(CLICKS_PER_SIDE) + 0.5) / CLICKS_PER_SIDE
    points = [[float(x * width), float(y * height), 1] for y in shares for x in shares]
    clicks = [({"points": [point]}, Prompts.from_points([[point]])) for point in points]
    return [*clicks, *((_json(region), region.prompts()) for region in sample.regions)]


def _json(region: SampleRegion) -> dict[str, Any]:
    if region.prompt == BOX:
        return {"box": [side for corner in region.points for side in corner]}
    if region.prompt == SKETCH:
        return {"sketch": [list(point) for point in region.points]}
    return {"points": [[*point, 1] for point in region.points]}
