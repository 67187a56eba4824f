"""What is evaluated: a bundle on some backend, or PyTorch."""

from __future__ import annotations

from typing import Any, Protocol

from tap_deploy.evaluation.data_pictures import DataPicture
from tap_deploy.image import Frame
from tap_deploy.pictures.source import ImageSource, PictureFile
from tap_deploy.prediction.options import Masks
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions


class Encoded(Protocol):
    """A picture after the image encoder of a subject."""

    @property
    def frame(self) -> Frame:
        """Placement of the picture in the model frame."""


class Subject(Protocol):
    """A predictor to evaluate: ``TapPredictor`` or ``ReferencePredictor``."""

    def encode(self, image: ImageSource) -> Encoded:
        """Run the image encoder."""

    def predict(self, image: Any, *, prompts: Prompts, masks: Masks, captions: bool) -> Regions:
        """Predict P prompts on an encoded picture."""


def encoded(subject: Subject, picture: DataPicture) -> Encoded:
    """Read and encode a picture; grey, CMYK and transparent ones are converted.

    Raises:
        InputError: the picture cannot be read, or has another size than annotated.
    """
    assert picture.path is not None
    found = subject.encode(PictureFile(source=picture.path, convert=True))
    picture.check_size(found.frame.height, found.frame.width)
    return found
