"""The sidecar of an engine plan: what a plan is for, and what it was made from, as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from tap_deploy.bundle.json_record import record_from_json
from tap_deploy.errors import BundleError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """What is known of one plan. A plan is raw bytes; all that must be said of it stands here.

    Attributes:
        graph: name of the graph.
        backend: "tensorrt" or "tensorrt_rtx".
        backend_version: ``__version__`` of the package that built it.
        compute_capabilities: GPUs that it was built for, like "8.7".
        minimum_compute_capability: it runs on this and on every later one, too; None: only on
            ``compute_capabilities``.
        version_compatible: later releases of the same major version can load it, with host code
            of the plan allowed.
        gpu: name of the GPU that it was built on; None without one.
        driver: version of the driver there; None without one.
        variant: see ``tap_deploy.precisions``.
        onnx_sha256: digest of the ONNX file.
        onnx_data_sha256: digest of the weights beside it; None if they are inside.
        plan_sha256: digest of the plan. Bytes with another one are never deserialised.
        size_bytes: of the plan.
        profiles: input -> {"min", "opt", "max"} -> shape: the optimization profile.
        flags: every setting of the builder that shapes the plan, JSON types.
        options: those of ``tap-export build`` that were not the defaults, to build it again.
        build_seconds: wall time of parsing and building.
        layer_precisions: what a layer computes in -> number of layers, from the engine
            inspector; None where no GPU could deserialise the plan.
    """

    graph: str
    backend: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    minimum_compute_capability: str | None
    version_compatible: bool
    gpu: str | None
    driver: str | None
    variant: str
    onnx_sha256: str
    onnx_data_sha256: str | None
    plan_sha256: str
    size_bytes: int
    profiles: dict[str, dict[str, Any]]
    flags: dict[str, Any]
    options: tuple[str, ...]
    build_seconds: float
    layer_precisions: dict[str, int] | None

    @property
    def key(self) -> str:
        """Digest of all that goes into a plan; two plans of one key serve alike."""
        return plan_key(
            graph=self.graph,
            backend=self.backend,
            backend_version=self.backend_version,
            compute_capabilities=self.compute_capabilities,
            variant=self.variant,
            onnx_sha256=self.onnx_sha256,
            onnx_data_sha256=self.onnx_data_sha256,
            profiles=self.profiles,
            flags=self.flags,
        )

    def runs_on(self, compute_capability: str) -> bool:
        """Whether a GPU of this compute capability, like "8.7", can load the plan."""
        lowest = self.minimum_compute_capability
        return compute_capability in self.compute_capabilities or (
            lowest is not None and _version(compute_capability) >= _version(lowest)
        )

    def loads_in(self, backend_version: str) -> bool:
        """Whether this version of the backend can load the plan."""
        if backend_version == self.backend_version:
            return True
        mine, other = _version(self.backend_version), _version(backend_version)
        return self.version_compatible and mine[0] == other[0] and mine <= other

    def to_json(self) -> str:
        """Return the record as JSON text, with its key for people to compare."""
        return json.dumps(dataclasses.asdict(self) | {"key": self.key}, indent=2) + "\n"

    @classmethod
    def read(cls, path: pathlib.Path) -> PlanRecord:
        """Read a sidecar.

        Raises:
            BundleError: it is missing, no JSON, or malformed.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            key = values.pop("key")
            record = record_from_json(cls, values)
        except (OSError, ValueError, RecursionError) as exc:
            raise BundleError(f"{path} cannot be read: {exc}; build the engine again") from exc
        except (KeyError, TypeError, AttributeError) as exc:
            raise BundleError(f"{path} is malformed: {exc}; build the engine again") from exc
        if record.key != key:
            raise BundleError(f"{path} was changed: its key does not fit; build the engine again")
        return record


def plan_key(**parts: Any) -> str:
    """Return the digest of the parts that make a plan what it is; see ``PlanRecord.key``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(text: str) -> tuple[int, ...]:
    """Numbers of a version, for comparison; what is no number ends it."""
    numbers = []
    for part in text.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers) or (-1,)
