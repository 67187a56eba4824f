"""Tokenize Anything, deployed: masks, names and captions of image regions without PyTorch.

>>> from tap_deploy import TapPredictor
>>> predictor = TapPredictor.from_bundle("tap_vit_b")
>>> predictor.predict("photo.jpg", points=[[[320, 240, 1]]]).captions
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tap_deploy.bundle.bundle import Bundle
    from tap_deploy.concepts import Vocabulary
    from tap_deploy.config import TapConfig
    from tap_deploy.errors import TapError, VerificationError
    from tap_deploy.pictures.source import PictureFile
    from tap_deploy.prediction.inputs import EncodedImage
    from tap_deploy.predictor import TapPredictor
    from tap_deploy.prompts import Prompts
    from tap_deploy.regions import Regions

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "EncodedImage",
    "PictureFile",
    "Prompts",
    "Regions",
    "TapConfig",
    "TapError",
    "TapPredictor",
    "VerificationError",
    "Vocabulary",
    "__version__",
]

_HOMES = {
    "Bundle": "bundle.bundle",
    "EncodedImage": "prediction.inputs",
    "PictureFile": "pictures.source",
    "Prompts": "prompts",
    "Regions": "regions",
    "TapConfig": "config",
    "TapError": "errors",
    "TapPredictor": "predictor",
    "VerificationError": "errors",
    "Vocabulary": "concepts",
}


def __getattr__(name: str) -> object:
    """Load a name of `__all__` on first access, so that `import tap_deploy` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
