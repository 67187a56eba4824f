"""The sidecar of a plan: a JSON file with the target and the inputs of its build."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from tap_deploy.bundle.json_record import record_from_json
from tap_deploy.errors import BundleError
from tap_deploy.storage.json_files import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """Metadata of a plan; the plan itself contains only the serialized engine.

    Attributes:
        graph: name of the graph.
        backend: "tensorrt" or "tensorrt_rtx".
        backend_version: ``__version__`` of the package that built the plan.
        compute_capabilities: compute capabilities of the target GPUs, such as "8.7".
        minimum_compute_capability: the plan also runs on this and all later compute capabilities;
            None: only on ``compute_capabilities``.
        version_compatible: whether later releases of the same major version can load the plan, if
            they allow its host code.
        gpu: name of the GPU of the build; None without a GPU.
        driver: driver version of the build machine; None without a GPU.
        variant: see ``tap_deploy.precisions``.
        onnx_sha256: SHA-256 of the ONNX file.
        onnx_data_sha256: SHA-256 of the external weights; None if there are none.
        plan_sha256: SHA-256 of the plan. Bytes with another digest are never deserialized.
        size_bytes: size of the plan, bytes.
        profiles: the optimization profile, input -> {"min", "opt", "max"} -> shape.
        flags: all builder settings that affect the plan, JSON types.
        options: options of ``tap-export build`` that differ from the defaults.
        build_seconds: wall time of parsing and building, seconds.
        layer_precisions: compute precision -> number of layers, from the engine inspector; None
            if no GPU could deserialize the plan.
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
    profiles: dict[str, dict[str, tuple[int, ...]]]
    flags: dict[str, Any]
    options: tuple[str, ...]
    build_seconds: float
    layer_precisions: dict[str, int] | None

    @property
    def key(self) -> str:
        """Digest of all inputs of the build; plans with the same key are interchangeable."""
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
        """Whether a GPU of this compute capability, such as "8.7", can load the plan."""
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
        """Return the record and its key as JSON text."""
        return json.dumps(dataclasses.asdict(self) | {"key": self.key}, indent=2) + "\n"

    @classmethod
    def read(cls, path: pathlib.Path) -> PlanRecord:
        """Read a sidecar.

        Raises:
            BundleError: it is missing, is not JSON, is malformed, or does not match its key.
        """
        try:
            values = read_json(path)
            key = values.pop("key")
            record = record_from_json(cls, values)
        except (OSError, ValueError) as exc:
            raise BundleError(f"{path} cannot be read: {exc}; build the engine again") from exc
        except (KeyError, TypeError, AttributeError) as exc:
            raise BundleError(f"{path} is malformed: {exc}; build the engine again") from exc
        if record.key != key:
            raise BundleError(f"{path} was changed: its key does not match; build the engine again")
        return record


def plan_key(**parts: Any) -> str:
    """Return the SHA-256 of the inputs of a build; see ``PlanRecord.key``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(text: str) -> tuple[int, ...]:
    """Parse the leading numbers of a version, for comparison; (-1,) without any."""
    numbers = []
    for part in text.split("."):
        if not part.isdecimal() or len(part) > 9:
            break
        numbers.append(int(part))
    return tuple(numbers) or (-1,)
