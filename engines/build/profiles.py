"""Optimization profiles: the minimum, optimal and maximum shapes of an engine's inputs.

Each graph has one profile. An engine rejects sizes outside its profile, and the builder tunes the
kernels for the optimal size:

- ``B``: 1 to ``max_images``; optimal 1, as the predictor encodes one picture at a time by default;
- ``P``: 1 to ``max_prompts``; optimal 16 (or the maximum, if smaller), between a single click and
  a picture full of boxes;
- ``N``: 1 to ``max_points``; optimal 2, a point with its padding, or a box;
- ``M``: 1 to all mask tokens; optimal 1, because predictors usually request only the answer;
- ``K``: 1 to all candidates of sampling; optimal 1, greedy decoding;
- ``T``: 1 to the whole cache; optimal the whole cache. A size of 0 cannot be bound. The predictor
  passes the whole cache at every step and masks it, so that shapes stay the same for the replay of
  CUDA graphs. ``verify`` and ``selftest`` run graph by graph with a growing cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tap_deploy.config import TapConfig
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.graphs import GraphSpec, TensorSpec, draw_candidates

USUAL_PROMPTS = 16
USUAL_POINTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeRange:
    """Shapes of one input.

    Attributes:
        min: minimum shape.
        opt: shape that kernels are tuned for.
        max: maximum shape.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(f"{name} {_times(shape)}" for name, shape in self.items())

    def items(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the three shapes with their names, minimum first."""
        return [("min", self.min), ("opt", self.opt), ("max", self.max)]


# Input name -> its shapes.
Profile = Mapping[str, ShapeRange]


def optimization_profile(spec: GraphSpec, target: BuildTarget, config: TapConfig) -> Profile:
    """Return the profile of a graph, with every input, including those of fixed shape.

    Args:
        spec: inputs of the graph.
        target: maximum sizes.
        config: sizes of the model.
    """
    ranges = {
        "B": (1, 1, target.max_images),
        "P": (1, min(USUAL_PROMPTS, target.max_prompts), target.max_prompts),
        "N": (1, min(USUAL_POINTS, target.max_points), target.max_points),
        "M": (1, 1, config.num_mask_tokens),
        "Q": (1, min(USUAL_PROMPTS, target.max_prompts), target.max_prompts),
        "T": (1, config.text_seq_len, config.text_seq_len),
        "K": (1, 1, draw_candidates(config)),
    }
    return {tensor.name: _shape_range(tensor, ranges) for tensor in spec.inputs}


def profile_as_json(profile: Profile) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return a profile as stored in the sidecar."""
    return {name: dict(shapes.items()) for name, shapes in profile.items()}


def _shape_range(tensor: TensorSpec, ranges: dict[str, tuple[int, int, int]]) -> ShapeRange:
    shapes = [
        tuple(ranges[axis][bound] if isinstance(axis, str) else axis for axis in tensor.shape)
        for bound in range(3)
    ]
    return ShapeRange(min=shapes[0], opt=shapes[1], max=shapes[2])


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
