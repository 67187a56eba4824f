"""The bodies of requests, and their conversion to prompts and options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tap_deploy.errors import InputError
from tap_deploy.prompts import Prompts
from tap_deploy.server.batches import CaptionOptions
from tap_deploy.server.options import (
    MAX_POINTS,
    MAX_POINTS_PER_SIDE,
    MAX_REGIONS,
    MAX_STROKE_POINTS,
    MAX_TOP_K,
)

MAX_SEED = 2**53 - 1  # larger integers change in clients whose numbers are all float64


def _whole(value: Any) -> Any:
    """Return 3 for 3.0, which is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Point = Annotated[list[Number], Field(min_length=3, max_length=3)]
Place = Annotated[list[Number], Field(min_length=2, max_length=2)]
Corners = Annotated[list[Number], Field(min_length=4, max_length=4)]
MaskFormat = Literal["rle", "png", "polygons", "none"]


class Strict(BaseModel):
    """A body in which unknown fields and numbers in quotes are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Prompt(Strict):
    """What asks for one region: points, a box, both together, or a sketch."""

    points: Annotated[list[Point], Field(min_length=1, max_length=MAX_POINTS)] | None = Field(
        None, description="[x, y, label] in pixels of the picture; label 1 inside, 0 outside."
    )
    box: Corners | None = Field(None, description="[x0, y0, x1, y1] in pixels of the picture.")
    sketch: Annotated[list[Place], Field(min_length=1, max_length=MAX_STROKE_POINTS)] | None = (
        Field(None, description="A stroke over the region: [x, y] in pixels of the picture.")
    )

    def to_prompts(self) -> Prompts:
        """Return the prompt of one region.

        Raises:
            InputError: it has nothing, or a sketch and something else; or a value is invalid.
        """
        if self.sketch is not None and self.points is None and self.box is None:
            return Prompts.from_sketches([self.sketch])
        if self.sketch is not None or (self.points is None and self.box is None):
            raise InputError("expected points, a box, both, or a sketch alone, for each region")
        if self.points is None:
            return Prompts.from_boxes([self.box])
        if self.box is None:
            return Prompts.from_points([self.points])
        return Prompts.from_points_and_boxes([self.points], [self.box])


class AnswerOptions(Strict):
    """What to return of each region."""

    masks: MaskFormat = Field("rle", description="Form of the masks; see the answer.")
    polygon_tolerance: float = Field(
        1.0, ge=0, le=100, description="Displacement of simplified outlines, pixels."
    )
    top_k: Whole = Field(1, ge=1, le=MAX_TOP_K, description="Names per region, best first.")
    captions: bool = True
    max_new_tokens: Whole | None = Field(None, ge=0, description="Longest caption, tokens.")
    temperature: float = Field(0.0, ge=0, le=1000, description="0 takes the likeliest words.")
    seed: Whole | None = Field(None, ge=0, le=MAX_SEED, description="For repeatable sampling.")
    stream: bool = Field(
        False, description="Answer with server-sent events: captions while they are written."
    )

    @property
    def caption_options(self) -> CaptionOptions:
        """How captions are written."""
        return CaptionOptions(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )


class RegionsRequest(AnswerOptions):
    """Prompts on a picture, and what to return."""

    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_REGIONS)
    clip: bool = Field(False, description="Move prompts outside the picture to its border.")

    def to_prompts(self, width: int, height: int) -> Prompts:
        """Return the prompts for a picture of ``width`` x ``height`` pixels.

        Raises:
            InputError: a prompt is invalid; the message counts regions from 0.
        """
        parts = []
        for index, prompt in enumerate(self.prompts):
            try:
                parts.append(prompt.to_prompts())
            except InputError as exc:
                raise InputError(f"prompt {index}: {exc}") from exc
        prompts = parts[0] if len(parts) == 1 else Prompts.concatenate(parts)
        return prompts.clip(width, height)[0] if self.clip else prompts


class EverythingRequest(AnswerOptions):
    """How to search a picture; see ``TapPredictor.everything``."""

    points_per_side: Whole = Field(32, ge=1, le=MAX_POINTS_PER_SIDE)
    pred_iou_thresh: Annotated[Number, Field(ge=-1, le=2)] = 0.6
    stability_score_thresh: Share = 0.6
    box_nms_thresh: Share = 0.7
    mask_nms_thresh: Share = 0.5
    only: Annotated[list[str], Field(min_length=1, max_length=MAX_TOP_K)] | None = Field(
        None, description="Keep only regions with one of these names of the vocabulary."
    )
    only_thresh: Share = 0.3

    def arguments(self) -> dict[str, Any]:
        """Return arguments of ``TapPredictor.everything``."""
        own = self.model_dump(exclude=set(AnswerOptions.model_fields))
        return {**own, "top_k": self.top_k, "masks": "rle" if self.masks != "none" else False}
