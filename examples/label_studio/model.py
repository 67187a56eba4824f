"""TAP as an ML backend of Label Studio: smart clicks and boxes, and predictions without prompts."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

from answers import Controls, prediction_from_prompts, prediction_of_everything, predictor
from label_studio_ml.model import LabelStudioMLBase
from label_studio_ml.response import ModelResponse

from tap_deploy import TapError

logger = logging.getLogger(__name__)

Json = dict[str, Any]


class TapBackend(LabelStudioMLBase):  # type: ignore[misc]  # the SDK has no annotations
    """Answers ``/predict`` with masks or boxes, labels and captions."""

    def setup(self) -> None:
        """Say which model made a prediction."""
        precision = os.environ.get("TAP_PRECISION", "fp32")
        self.set("model_version", f"{pathlib.Path(os.environ['TAP_BUNDLE']).name}-{precision}")

    def predict(self, tasks: list[Json], context: Json | None = None, **kwargs: Any) -> Any:
        """Return a prediction per task: of its prompts, or else of everything with a label."""
        controls, key = self._controls()

        def predict(picture: bytes) -> Json:
            if context and context.get("result"):
                return prediction_from_prompts(picture, context, controls)
            return prediction_of_everything(picture, controls)

        return ModelResponse(predictions=[self._prediction(task, key, predict) for task in tasks])

    def _prediction(self, task: Json, key: str, predict: Callable[[bytes], Json]) -> Json:
        """Return the prediction of a task; an empty one if its picture is bad."""
        try:
            return predict(self._picture(task, key))
        except TapError as exc:
            logger.error("task %s: %s", task.get("id"), exc)
            return {"result": [], "score": 0.0}

    def _picture(self, task: Json, key: str) -> bytes:
        """Return the bytes of a task's picture, from wherever it is.

        Raises:
            TapError: it cannot be fetched.
        """
        try:
            path = self.get_local_path(task["data"][key], task_id=task.get("id"))
            return pathlib.Path(path).read_bytes()
        except Exception as exc:  # the SDK raises those of requests, and a bare Exception
            raise TapError(f"cannot fetch the picture: {type(exc).__name__}: {exc}") from exc

    def _controls(self) -> tuple[Controls, str]:
        """Return what the labelling configuration asks for, and the key of pictures in a task."""
        kind, tag = "brushlabels", "BrushLabels"
        if not self._first(tag):
            kind, tag = "rectanglelabels", "RectangleLabels"
        shape, image, key = self.get_first_tag_occurence(tag, "Image")
        text = self._first("TextArea")
        vocabulary = predictor().vocabulary
        names = () if vocabulary is None else vocabulary.names
        labels = self.build_label_map(shape, names)
        threshold = self.label_interface.get_control(shape).attr.get("model_score_threshold", 0.3)
        controls = Controls(
            image=image,
            kind=kind,
            shape=shape,
            caption=text,
            labels={name: label for name, label in labels.items() if name in names},
            threshold=float(threshold),
        )
        return controls, key

    def _first(self, tag: str) -> str | None:
        """Return the name of the first control of a kind on a picture; None without one."""
        try:
            return str(self.get_first_tag_occurence(tag, "Image")[0])
        except ValueError:
            return None
