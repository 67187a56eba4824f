"""Optimization profiles: the sizes that an engine takes, smallest, usual and largest.

One profile per graph. Sizes that an engine was not built for are refused at run time, and the
kernels are chosen for the usual size. So

- ``B``: one picture, as the predictor encodes them, unless a larger batch was asked for;
- ``P``: 1 to ``max_prompts``; usual is 16 (or the largest, if that is less): between a click and
  a picture full of boxes;
- ``N``: 1 to ``max_points``; usual is 2: a point with its padding, or a box;
- ``M``: 1, as a predictor asks for the answer only, to all mask tokens;
- ``K``: 1, as the best token is taken, to all candidates of a draw;
- ``T``: 1 to the whole cache, and the whole cache is the usual size. A length of 0 cannot be
  bound. The predictor shows the whole cache at every step and has it masked, so that nothing
  changes between replays of CUDA graphs. ``verify`` and ``selftest``, which run graph by graph,
  show a cache that grows. Both fit into this profile.
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
    """Smallest, usual and largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(f"{name} {_times(shape)}" for name, shape in self.items())

    def items(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the three shapes with their names, smallest first."""
        return [("min", self.min), ("opt", self.opt), ("max", self.max)]


# Input name -> its shapes.
Profile = Mapping[str, ShapeRange]


def optimization_profile(spec: GraphSpec, target: BuildTarget, config: TapConfig) -> Profile:
    """Return the profile of a graph: every input, also those of fixed shape.

    Args:
        spec: inputs of the graph.
        target: has the largest sizes.
        config: sizes of the model.
    """
    ranges = {
        "B": (1, 1, target.max_images),
        "P": (1, min(USUAL_PROMPTS, target.max_prompts), target.max_prompts),
        "N": (1, min(USUAL_POINTS, target.max_points), target.max_points),
        "M": (1, 1, config.num_mask_tokens),
        "T": (1, config.text_seq_len, config.text_seq_len),
        "K": (1, 1, draw_candidates(config)),
    }
    return {tensor.name: _shape_range(tensor, ranges) for tensor in spec.inputs}


def profile_as_json(profile: Profile) -> dict[str, dict[str, list[int]]]:
    """Return a profile in JSON types, as the sidecar keeps it."""
    return {
        name: {bound: list(shape) for bound, shape in shapes.items()}
        for name, shapes in profile.items()
    }


def _shape_range(tensor: TensorSpec, ranges: dict[str, tuple[int, int, int]]) -> ShapeRange:
    shapes = [
        tuple(ranges[axis][bound] if isinstance(axis, str) else axis for axis in tensor.shape)
        for bound in range(3)
    ]
    return ShapeRange(min=shapes[0], opt=shapes[1], max=shapes[2])


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
