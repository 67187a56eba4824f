"""Inputs of a step, and its notes, which survive if the step is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

MICRO, VIT_B = "micro", "tap_vit_b"


class Skipped(Exception):
    """A step cannot run here; the message says what is missing and how to get it."""


class StepFailed(Exception):
    """A step ran and found a fault; the message says which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Folders and settings of a step.

    Attributes:
        project: the checkout.
        logs: folder for the output of steps: ``STEP.json``, ``STEP.log`` and more.
        work: folder for large files, removed at the end of the run.
        prepared: output of ``--prepare``; None to make the bundles here.
        seconds: minimum time per measurement, seconds.
        model: name of the bundle to measure latency on.
        deadline: time at which this step is killed, seconds since the epoch; None for never.
    """

    project: pathlib.Path
    logs: pathlib.Path
    work: pathlib.Path
    prepared: pathlib.Path | None = None
    seconds: float = 1.0
    model: str = VIT_B
    deadline: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds until this step is killed."""
        return float("inf") if self.deadline is None else self.deadline - time.time()

    def bundle(self, name: str) -> pathlib.Path:
        """Return the folder of a bundle made by an earlier step.

        Raises:
            Skipped: the bundle does not exist.
        """
        path = self.work / name
        if not (path / "manifest.json").exists():
            raise Skipped(f"there is no bundle {name}: step bundle-{name} did not pass")
        return path

    def notes_of(self, step: str) -> dict[str, Any]:
        """Return the notes of another step; empty if it has none."""
        return read_json(self.logs / f"{step}.json")

    def to_json(self) -> str:
        """Return the context as JSON, for another process."""
        values = dataclasses.asdict(self)
        return json.dumps(
            {n: str(v) if isinstance(v, os.PathLike) else v for n, v in values.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> Context:
        """Return the context from the JSON of ``to_json``."""
        values = json.loads(text)
        for name in ("project", "logs", "work", "prepared"):
            values[name] = None if values[name] is None else pathlib.Path(values[name])
        return cls(**values)


class Notes:
    """Notes of a step, in a JSON file that is rewritten atomically at every change."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        """Set a value."""
        self.values[name] = value
        write_json(self.path, self.values)

    def add(self, name: str, value: Any) -> None:
        """Append a value to a list."""
        self.put(name, [*self.values.get(name, []), value])

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Note whether the block succeeds; errors and ``Skipped`` are noted, not raised.

        Yields:
            A dict; the block may add details to it.
        """
        found: dict[str, Any] = {"name": name, "passed": True}
        start = time.perf_counter()
        try:
            yield found
        except Exception as exc:
            skipped = isinstance(exc, Skipped)
            found |= {"passed": None if skipped else False, "reason": one_line(exc)}
            print(f"{name}: {found['reason']}", flush=True)
        found["seconds"] = round(time.perf_counter() - start, 3)
        self.add("checks", found)

    def require(self) -> None:
        """Raise an error unless the checks passed.

        Raises:
            StepFailed: a check failed.
            Skipped: all checks were skipped.
        """
        checks = self.values.get("checks", [])
        wrong = [check for check in checks if check["passed"] is False]
        if wrong:
            raise StepFailed("; ".join(f"{check['name']}: {check['reason']}" for check in wrong))
        if checks and all(check["passed"] is None for check in checks):
            raise Skipped(checks[0]["reason"])


def one_line(error: BaseException) -> str:
    """Return the type and the first non-empty line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else "no text"
    return text if isinstance(error, (Skipped, StepFailed)) else f"{type(error).__name__}: {text}"


def write_json(path: pathlib.Path, values: Any) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=2, default=str) + "\n", "utf-8")
    os.replace(partial, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty dict if there is none."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
