"""Options of ``tap-export run --everything``: a point grid in place of prompts, and its filters."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from tap_deploy.console.options import option_group
from tap_deploy.errors import InputError
from tap_deploy.prediction.options import GridOptions

_SHARE = click.FloatRange(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverythingOptions:
    """What to search for in each picture; see ``TapPredictor.everything``. None is its default.

    Attributes:
        everything: whether to search at all.
        only: names of regions to keep, separated by commas.
    """

    everything: bool = False
    points_per_side: int | None = None
    pred_iou_thresh: float | None = None
    stability_score_thresh: float | None = None
    box_nms_thresh: float | None = None
    mask_nms_thresh: float | None = None
    crop_n_layers: int | None = None
    only: str | None = None
    only_thresh: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``TapPredictor.everything`` that were given.

        Raises:
            InputError: there are any, but ``everything`` is off.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "everything"]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given and not self.everything:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise InputError(
                f"{option} belongs to --everything; pass that as well, or leave it out"
            )
        if self.only is not None:
            given["only"] = [name.strip() for name in self.only.split(",")]
        return given


def _default(name: str) -> str:
    return f"default: {getattr(GridOptions, name)}"


everything_options = option_group(
    "search",
    EverythingOptions,
    click.option(
        "--everything",
        is_flag=True,
        help="Segment everything in each picture: a grid of points instead of prompts.",
    ),
    click.option(
        "--points-per-side",
        type=click.IntRange(min=1),
        help=f"Points along each side of the grid; {_default('points_per_side')}.",
    ),
    click.option(
        "--pred-iou-thresh",
        type=float,
        help=f"Drop masks up to this predicted IoU; {_default('pred_iou_thresh')}.",
    ),
    click.option(
        "--stability-score-thresh",
        type=_SHARE,
        help=f"Drop masks less stable than this; {_default('stability_score_thresh')}.",
    ),
    click.option(
        "--box-nms-thresh",
        type=_SHARE,
        help=f"Drop the worse of two if the IoU of their boxes is above this; "
        f"{_default('box_nms_thresh')}.",
    ),
    click.option(
        "--mask-nms-thresh",
        type=_SHARE,
        help=f"The same for the IoU of their masks; {_default('mask_nms_thresh')}.",
    ),
    click.option(
        "--crop-n-layers",
        type=click.IntRange(min=0),
        help=f"Also search 4 crops (1), and 16 smaller ones (2); {_default('crop_n_layers')}.",
    ),
    click.option(
        "--only",
        metavar="NAME[,NAME…]",
        help="Keep only regions with one of these names, before captions are written.",
    ),
    click.option(
        "--only-thresh",
        type=_SHARE,
        help="Smallest probability of a name of --only; default: 0.3.",
    ),
)
