"""Storage of plans in a bundle, and the checks before a plan may be deserialized.

``BUNDLE/engines/<backend>-<version>-<gpus>-<variant>/`` contains, per graph, ``<graph>.plan`` (the
bytes from the builder) and ``<graph>.json`` (``PlanRecord``), and ``selftest.json`` and
``verified.json`` after a self-test and a verification. Loading a plan executes code from it, so
only bytes with the SHA-256 of the sidecar are deserialized.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.json_record import json_object, record_from_json, record_to_json
from tap_deploy.bundle.marks import failure_for, passed_on, with_mark
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.bundle.precision_record import Marks, SelftestMark
from tap_deploy.bundle.update import changing_bundle
from tap_deploy.errors import BundleError
from tap_deploy.machine.state import machine_title
from tap_deploy.storage.files import atomic_file, new_folder
from tap_deploy.storage.folder_lock import locked_folder
from tap_deploy.storage.json_files import read_json
from tap_deploy.storage.regular_files import open_regular

ENGINES_FOLDER = "engines"
SELFTEST_FILE = "selftest.json"
VERIFIED_FILE = "verified.json"
MARK_FILES = {"selftest": SELFTEST_FILE, "verified": VERIFIED_FILE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedPlan:
    """A plan whose bytes match its record.

    Attributes:
        plan: the serialized engine.
        record: its sidecar.
        path: file of the plan.
    """

    plan: bytes
    record: PlanRecord
    path: pathlib.Path


def load_plan(
    bundle: Bundle,
    *,
    backend: str,
    backend_version: str,
    compute_capability: str | None,
    variant: str,
    graph: str,
    allow_failed_selftest: bool = False,
) -> LoadedPlan:
    """Read the plan of a graph after checking that it fits this machine and this bundle.

    Args:
        bundle: bundle that contains the plan.
        backend: "tensorrt" or "tensorrt_rtx".
        backend_version: ``__version__`` of the package that deserializes the plan.
        compute_capability: compute capability of the GPU, such as "8.7"; None skips its check.
        variant: see ``precisions``.
        graph: name of the graph.
        allow_failed_selftest: also load plans that failed ``tap-export selftest``.

    Raises:
        BundleError: there is no plan, or it is for another GPU, another version or another ONNX
            file, is damaged, or failed its self-test. The message has the command that builds it.
    """
    folder = plan_folder(
        bundle,
        backend=backend,
        backend_version=backend_version,
        compute_capability=compute_capability,
        variant=variant,
    )
    path = folder / f"{graph}.plan"
    remedy = f"build it with: {build_command(bundle, backend, variant)}"
    if not path.with_suffix(".json").is_file():
        raise BundleError(
            f"bundle {bundle.path} has no {backend} engine of {graph} in {variant}; {remedy}"
        )
    record = PlanRecord.read(path.with_suffix(".json"))
    remedy = f"build it with: {build_command(bundle, backend, variant, record.options)} --force"
    problem = _mismatch(record, backend, backend_version, compute_capability, variant, graph)
    problem = problem or _other_graph(bundle, record)
    if problem:
        raise BundleError(f"engine {path} {problem}; {remedy}")
    if not allow_failed_selftest:
        _refuse_failed(folder, remedy)
    return LoadedPlan(plan=_checked_bytes(path, record, remedy), record=record, path=path)


def plan_folder(
    bundle: Bundle,
    *,
    backend: str,
    backend_version: str,
    compute_capability: str | None,
    variant: str,
) -> pathlib.Path:
    """Return the folder of the plans for a machine; it may not exist.

    Prefers a folder for exactly this GPU and version, then a folder with compatible plans (several
    compute capabilities, hardware- or version-compatible), then any other, so that ``load_plan``
    can report the mismatch.
    """
    variant_folders = [
        folder
        for folder in _folders(bundle)
        if folder.name.startswith(f"{backend}-") and folder.name.endswith(f"-{variant}")
    ]
    exact = plan_path_name(backend, backend_version, (compute_capability or "",), None, variant)

    def rank(folder: pathlib.Path) -> tuple[bool, bool, bool, str]:
        record = next(iter(_records(folder)), None)
        loads = record is not None and record.loads_in(backend_version)
        runs = record is not None and (
            compute_capability is None or record.runs_on(compute_capability)
        )
        same = record is not None and record.backend_version == backend_version
        return (folder.name != exact, not (loads and runs), not same, folder.name)

    best = min(variant_folders, key=rank, default=None)
    return best or bundle.path / ENGINES_FOLDER / exact


def plan_path_name(
    backend: str,
    backend_version: str,
    compute_capabilities: tuple[str, ...],
    minimum_compute_capability: str | None,
    variant: str,
) -> str:
    """Return the name of a folder of plans, such as ``tensorrt-10.3.0-sm87-fp16``.

    Several compute capabilities are joined, ``sm86+sm89``; a trailing ``+`` means "and later".
    """
    gpus = "+".join(f"sm{c.replace('.', '')}" for c in compute_capabilities)
    later = "+" if minimum_compute_capability else ""
    return f"{backend}-{backend_version}-{gpus}{later}-{variant}"


def save_plan(bundle: Bundle, plan: bytes, record: PlanRecord) -> pathlib.Path:
    """Write a plan and its sidecar, and return the path of the plan.

    An existing plan stays until both are written. The sidecar is moved last, so that an interrupted
    write leaves no valid plan. The results of self-test and verification are removed, because they
    do not cover the new plan.

    Raises:
        InputError: the bundle cannot be written, or another process has locked it.
        BundleError: the graph changed since the plan was built.
    """
    folder = record_folder(bundle, record)
    path = folder / f"{record.graph}.plan"
    with changing_bundle(bundle, ()):
        if _other_graph(bundle, record):
            raise BundleError(
                f"graph {record.graph} of bundle {bundle.path} changed while its engine was built; "
                "the engine was not stored; build it again"
            )
        with new_folder(folder), atomic_file(path.with_suffix(".json")) as sidecar:
            sidecar.write_text(record.to_json(), "utf-8")
            with atomic_file(path) as partial:
                partial.write_bytes(plan)
                for name in (*MARK_FILES.values(), path.with_suffix(".json").name):
                    (folder / name).unlink(missing_ok=True)
    return path


def record_folder(bundle: Bundle, record: PlanRecord) -> pathlib.Path:
    """Return the folder for the plan of a record."""
    return (
        bundle.path
        / ENGINES_FOLDER
        / plan_path_name(
            record.backend,
            record.backend_version,
            record.compute_capabilities,
            record.minimum_compute_capability,
            record.variant,
        )
    )


def cached_record(folder: pathlib.Path, graph: str, key: str) -> PlanRecord | None:
    """Return the record of an existing, undamaged plan with this key; else None."""
    path = folder / f"{graph}.plan"
    try:
        record = PlanRecord.read(path.with_suffix(".json"))
        _checked_bytes(path, record, "")
    except BundleError:
        return None
    return record if record.key == key else None


def all_records(bundle: Bundle) -> Iterator[tuple[pathlib.Path, PlanRecord]]:
    """Yield path and record of every plan with a readable sidecar."""
    for folder in _folders(bundle):
        for record in _records(folder):
            yield folder / f"{record.graph}.plan", record


def plan_digests(folder: pathlib.Path) -> dict[str, str]:
    """Return graph name -> SHA-256 of its plan, from the sidecars of a folder."""
    return {record.graph: record.plan_sha256 for record in _records(folder)}


def record_selftest(
    folder: pathlib.Path,
    mark: SelftestMark,
    *,
    tested: Mapping[str, str],
    own: SelftestMark | None = None,
    file: str = SELFTEST_FILE,
) -> None:
    """Write the result of a self-test or verification of the plans of a folder, atomically.

    Args:
        folder: ``engines/<name>`` of a bundle.
        mark: the result.
        tested: result of ``plan_digests`` before the plans were loaded.
        own: the mark that this self-test wrote when it started.
        file: ``SELFTEST_FILE`` or ``VERIFIED_FILE``.

    Raises:
        InputError: the folder cannot be written, or another process has locked the bundle.
        BundleError: the plans were replaced, or failed another self-test meanwhile.
    """
    with locked_folder(folder.parents[1]):
        if plan_digests(folder) != tested:
            raise BundleError(
                f"the engines in {folder} were rebuilt during their self-test; repeat it"
            )
        marks = with_mark(read_marks(folder / file), mark, own, f"the engines in {folder}")
        values = {machine: record_to_json(result) for machine, result in marks.items()}
        with atomic_file(folder / file) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def plans_passed(folder: pathlib.Path) -> bool | None:
    """Return whether the plans of a folder passed their self-test and verification; None: neither.

    An unreadable result counts as a failure.
    """
    checks = [read_marks(folder / file) for file in MARK_FILES.values()]
    passed = [mark.passed for marks in checks for mark in marks.values()]
    return all(passed) if passed else None


def plans_verified_on(folder: pathlib.Path) -> set[str]:
    """Return the machines on which plans passed their self-test or their verification."""
    return passed_on(*(read_marks(folder / file) for file in MARK_FILES.values()))


def read_marks(path: pathlib.Path) -> Marks:
    """Return the marks in a file: none without a file, a failure if it is malformed."""
    try:
        values = json_object(read_json(path))
        if not values:
            raise ValueError("it holds no result")
        return {name: record_from_json(SelftestMark, mark) for name, mark in values.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as exc:
        return {"": SelftestMark(passed=False, error=f"{path} cannot be read: {exc}")}


def build_command(bundle: Bundle, backend: str, variant: str, options: Sequence[str] = ()) -> str:
    """Return the command line that builds the plans of a variant; ``options`` are appended."""
    words = ["tap-export", "build", str(bundle.path), "--backend", backend, "--precision", variant]
    return shlex.join([*words, *options])


def _mismatch(
    record: PlanRecord,
    backend: str,
    backend_version: str,
    compute_capability: str | None,
    variant: str,
    graph: str,
) -> str | None:
    """Return why a plan cannot be loaded on a machine; None if it can."""
    found, wanted = (record.backend, record.variant, record.graph), (backend, variant, graph)
    if found != wanted:
        return f"is for {' '.join(found)}, expected {' '.join(wanted)}"
    if not record.loads_in(backend_version):
        return f"was built by {backend} {record.backend_version}, installed is {backend_version}"
    if compute_capability is not None and not record.runs_on(compute_capability):
        gpus = ", ".join(record.compute_capabilities)
        return f"is for GPUs of SM {gpus}, this GPU is {compute_capability}"
    return None


def _other_graph(bundle: Bundle, record: PlanRecord) -> str | None:
    """Return the mismatch if the plan was built from another ONNX file; None if it was not."""
    variant = bundle.variant(record.variant)
    built_from = [record.onnx_sha256]
    if record.onnx_data_sha256 is not None:
        built_from.append(record.onnx_data_sha256)
    if list(variant.digests(record.graph)) == built_from:
        return None
    file = variant.records[record.graph].file
    return f"was built from a different {file} (SHA-256 {record.onnx_sha256[:12]}…)"


def _refuse_failed(folder: pathlib.Path, remedy: str) -> None:
    for file, check in ((SELFTEST_FILE, "self-test"), (VERIFIED_FILE, "verification")):
        marks = read_marks(folder / file)
        if marks and failure_for(marks, machine_title(on_cpu=False)) is not None:
            raise BundleError(
                f"the engines in {folder} failed their {check} ({file} lists the tensors); use "
                f"another precision, or {remedy}"
            )


def _checked_bytes(path: pathlib.Path, record: PlanRecord, remedy: str) -> bytes:
    try:
        with open_regular(path) as file:
            plan = file.read()
    except OSError as exc:
        raise BundleError(f"engine {path} cannot be read: {exc.strerror}; {remedy}") from exc
    digest = hashlib.sha256(plan).hexdigest()
    if digest != record.plan_sha256:
        raise BundleError(
            f"engine {path} was changed or damaged: SHA-256 {digest[:12]}…, "
            f"expected {record.plan_sha256[:12]}…; {remedy}"
        )
    return plan


def _folders(bundle: Bundle) -> list[pathlib.Path]:
    root = bundle.path / ENGINES_FOLDER
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _records(folder: pathlib.Path) -> Iterator[PlanRecord]:
    for path in sorted(folder.glob("*.json")):
        if path.name not in (SELFTEST_FILE, VERIFIED_FILE):
            try:
                yield PlanRecord.read(path)
            except BundleError:
                continue
