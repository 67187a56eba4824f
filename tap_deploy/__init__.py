"""Tokenize Anything, deployed: masks, names and captions of image regions without PyTorch.

>>> from tap_deploy import TapPredictor
>>> predictor = TapPredictor.from_bundle("tap_vit_b")
>>> predictor.predict("photo.jpg", points=[[[320, 240, 1]]]).captions
"""

from tap_deploy.bundle import Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import TapError, VerificationError
from tap_deploy.predictor import EncodedImage, TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "EncodedImage",
    "Prompts",
    "Regions",
    "TapConfig",
    "TapError",
    "TapPredictor",
    "VerificationError",
    "Vocabulary",
    "__version__",
]
