"""Average precision by the libraries of COCO and LVIS."""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import io
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from tap_deploy.evaluation.instances import LVIS, InstanceFormat, Instances
from tap_deploy.evaluation.json_files import Entry
from tap_deploy.evaluation.modules import eval_module, old_code
from tap_deploy.optional_modules import version_of

_PERCENT = 100.0
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LVIS_METRICS = (*COCO_METRICS, "APr", "APc", "APf")


class Metric(enum.Enum):
    """What the IoU of a match is taken of; the value is its name in both libraries."""

    SEGM = "segm"
    BOX = "bbox"


def coco_scores(
    instances: Instances, results: list[Entry], metric: Metric
) -> dict[str, float | None]:
    """Return ``COCO_METRICS`` in percent, at most 100 results a picture and class.

    Args:
        instances: pictures and annotations.
        results: in the format of COCO results; they are changed.
        metric: masks or boxes.

    Raises:
        MissingDependencyError: pycocotools is not installed.
    """
    coco = eval_module("pycocotools.coco")
    cocoeval = eval_module("pycocotools.cocoeval")
    if not results:
        return dict.fromkeys(COCO_METRICS, 0.0)
    with old_code(), contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = coco.COCO()
        truth.dataset = _content(instances)
        truth.createIndex()
        judge = cocoeval.COCOeval(truth, truth.loadRes(results), metric.value)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: _percent(value) for name, value in zip(COCO_METRICS, judge.stats, strict=False)}


def lvis_scores(
    instances: Instances, results: list[Entry], metric: Metric
) -> dict[str, float | None]:
    """Return ``LVIS_METRICS`` in percent, at most 300 results a picture.

    Results of classes that were not looked for in a picture do not count.

    Args:
        instances: pictures and annotations.
        results: in the format of COCO results; they are changed.
        metric: masks or boxes.

    Raises:
        MissingDependencyError: lvis is not installed.
    """
    parts = lvis_modules()
    if not results:
        return dict.fromkeys(LVIS_METRICS, 0.0)
    with _quiet_lvis():
        truth = parts.lvis.LVIS.__new__(parts.lvis.LVIS)  # its constructor reads a file
        truth.logger, truth.dataset = logging.getLogger("lvis"), _content(instances)
        truth._create_index()
        judge = parts.eval.LVISEval(truth, results, metric.value)
        judge.run()
    return {name: _percent(judge.results[name]) for name in LVIS_METRICS}


def lvis_modules() -> types.SimpleNamespace:
    """Return the modules ``lvis.lvis`` and ``lvis.eval``, without loading the whole package.

    The package loads OpenCV and matplotlib to draw, which need libraries of a desktop, and
    configures the root logger.

    Raises:
        MissingDependencyError: lvis is not installed.
    """
    spec = importlib.util.find_spec("lvis")
    if spec is None or spec.submodule_search_locations is None:
        eval_module("lvis")
        raise AssertionError("unreachable: there is no lvis to import")
    eval_module("pycocotools.mask")
    if "lvis" not in sys.modules:
        hollow = types.ModuleType("lvis")
        hollow.__path__ = list(spec.submodule_search_locations)
        sys.modules["lvis"] = hollow
        try:
            parts = [importlib.import_module(f"lvis.{name}") for name in ("lvis", "eval")]
        finally:
            del sys.modules["lvis"]  # a user who imports it gets all of it
    else:
        parts = [importlib.import_module(f"lvis.{name}") for name in ("lvis", "eval")]
    vars(parts[1])["np"] = _OldNumpy()
    return types.SimpleNamespace(lvis=parts[0], eval=parts[1])


def require_library(form: InstanceFormat) -> None:
    """Raise MissingDependencyError unless the libraries of a data set are installed."""
    eval_module("pycocotools.cocoeval")
    if form is LVIS:
        lvis_modules()


def library_versions(form: InstanceFormat) -> dict[str, str]:
    """Return the versions of the libraries of a data set by name."""
    names = ("lvis", "pycocotools") if form is LVIS else ("pycocotools",)
    return {name: version_of(name) or "unknown" for name in names}


class _OldNumpy:
    """NumPy with the alias ``np.float``, which lvis uses and NumPy 1.24 removed."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextlib.contextmanager
def _quiet_lvis() -> Iterator[None]:
    """Silence a warning about results in memory, logged by a deprecated method."""
    logger = logging.getLogger("lvis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with old_code():
            yield
    finally:
        logger.setLevel(level)


def _content(instances: Instances) -> dict[str, Any]:
    """Return the annotations as the libraries read them from a file; they add to the entries."""
    return {
        "info": {},
        "images": instances.images,
        "categories": instances.categories,
        "annotations": [dict(entry) for entry in instances.annotations],
    }


def _percent(value: Any) -> float | None:
    """Return a metric in percent; the libraries return -1 where nothing counts."""
    return None if value < 0 else _PERCENT * float(value)
