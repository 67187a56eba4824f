"""Photographs for backgrounds, from the scikit-image package.

Only those that its documentation declares CC0 or public domain are used:

| file                    | what it shows            | released by, as                         |
|-------------------------|--------------------------|-----------------------------------------|
| `brick.png`             | a wall of bricks         | CC0Textures, CC0                        |
| `camera.png`            | a man with a camera      | Lav Varshney, CC0                       |
| `cell.png`              | a cell in saline         | P. Müller and others, CC0               |
| `chelsea.png`           | the fur and face of a cat| Stefan van der Walt, CC0                |
| `clock_motion.png`      | a clock, blurred         | Stefan van der Walt, public domain      |
| `coffee.png`            | a cup on a wooden table  | Rachel Michetti, Pikolo Espresso Bar, CC0 |
| `grass.png`             | a lawn                   | linolafett, CC0                         |
| `gravel.png`            | small stones             | CC0Textures, CC0                        |
| `hubble_deep_field.jpg` | stars and galaxies       | NASA, public domain                     |
| `retina.jpg`            | the back of an eye       | Mikael Häggström, CC0                   |
| `rocket.jpg`            | a launch in the dusk     | SpaceX, public domain                   |

They are read from the installed package; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import MissingDependencyError

Photograph = npt.NDArray[np.uint8]  # [h, w, 3] RGB, or [h, w] grey

# Splits share no photograph.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "brick.png",
        "camera.png",
        "chelsea.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
    ),
    "validation": ("cell.png", "clock_motion.png"),
    "test": ("coffee.png", "gravel.png", "rocket.jpg"),
}
_LONG_SIDE = 800  # pixels; finer detail would be lost in the scenes


def load_photographs(split: str) -> tuple[Photograph, ...]:
    """Return the photographs of a split, RGB uint8 [h, w, 3] or grey uint8 [h, w].

    Raises:
        MissingDependencyError: scikit-image or its pictures are not installed.
    """
    return tuple(_load(name) for name in PHOTOGRAPHS[split])


def _load(name: str) -> Photograph:
    spec = importlib.util.find_spec("skimage")  # importing it would take seconds
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder, "data", name)
        if path.is_file():
            with Image.open(path) as image:
                return _array_from_image(image)
    raise MissingDependencyError(
        f"{name} of scikit-image is not installed; backgrounds of scenes need it: "
        'pip install "tap-deploy[train]"'
    )


def _array_from_image(image: Image.Image) -> Photograph:
    converted = image.convert("L" if image.mode in ("L", "I;16", "I") else "RGB")
    converted.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(converted)
