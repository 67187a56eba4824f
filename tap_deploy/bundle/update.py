"""Changing a bundle that is there: further precisions, and what is known of them.

Several processes may do that at once. Each change is made to the manifest as it is then, under the
lock of the folder, and only if the graphs that it speaks of are still those that it was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping

from tap_deploy.bundle.bundle import Bundle, file_records
from tap_deploy.bundle.manifest import MANIFEST_NAME, FileRecord, GraphRecord, Manifest
from tap_deploy.bundle.precision_record import PrecisionRecord
from tap_deploy.errors import BundleError, InputError
from tap_deploy.storage.files import atomic_file, translated_writes
from tap_deploy.storage.folder_lock import locked_folder

Revision = Callable[[PrecisionRecord], PrecisionRecord]


@dataclasses.dataclass(kw_only=True)
class BundleAddition:
    """What shall be added; filled in while ``folder`` is filled with files.

    Attributes:
        folder: a temporary one; a file in it goes to the same relative path in the bundle.
        graphs: variant -> graph name -> record, whose ``file`` is relative to the bundle. A variant
            that the bundle has already is replaced as a whole.
        precisions: variant -> its record; or a function that makes it from the record at the time
            of writing, and raises if the two do not fit.
        dropped: files whose paths start with one of these are out of date after the change, and are
            removed.
    """

    folder: pathlib.Path
    graphs: dict[str, dict[str, GraphRecord]] = dataclasses.field(default_factory=dict)
    precisions: dict[str, PrecisionRecord | Revision] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@contextlib.contextmanager
def bundle_addition(bundle: Bundle, *, based_on: Collection[str] = ()) -> Iterator[BundleAddition]:
    """Yield an empty addition; when the block ends well, it becomes part of the bundle.

    An interrupted update never leaves a manifest that vouches for half of it: a variant that is
    replaced is first taken out of the manifest, then its files are moved, then it is entered.
    ``bundle.manifest`` is up to date afterwards. If the block raises, the bundle is as it was.

    Args:
        bundle: as it was before the work began that the addition comes from.
        based_on: variants that it was made from, or measured with.

    Raises:
        InputError: the bundle cannot be written, another process holds it, or the folder for a file
            is a link to outside of the bundle.
        BundleError: another process changed one of these variants, or of those that are added.
    """
    partial = bundle.path / f".partial-{secrets.token_hex(4)}"
    try:
        with translated_writes(bundle.path):
            partial.mkdir()
            addition = BundleAddition(folder=partial)
            yield addition
            files = file_records(partial)
            with changing_bundle(bundle, {*based_on, *addition.graphs, *addition.precisions}):
                _require_complete(bundle, addition, files)
                _add(bundle, addition, files)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_writable(bundle: Bundle) -> None:
    """Check before a long job that a bundle can be changed.

    Raises:
        InputError: it cannot.
    """
    if not os.access(bundle.path, os.W_OK):
        raise InputError(
            f"cannot write bundle {bundle.path}, which keeps the result; copy it to a folder that "
            "can be written"
        )


def revise_precision(bundle: Bundle, variant: str, change: Revision) -> None:
    """Replace the record of a variant in the manifest.

    Args:
        bundle: as it was when the variant was measured.
        variant: see ``tap_deploy.precisions``.
        change: makes the new record from the one at the time of writing; may raise.

    Raises:
        InputError: the bundle cannot be written, or another process holds it.
        BundleError: another process changed the variant since the bundle was read.
    """
    with changing_bundle(bundle, (variant,)):
        manifest = bundle.manifest
        changed = change(manifest.precision_record(variant))
        precisions = manifest.precisions | {variant: changed}
        _write(bundle, dataclasses.replace(manifest, precisions=precisions))


@contextlib.contextmanager
def changing_bundle(bundle: Bundle, variants: Collection[str]) -> Iterator[None]:
    """Keep other processes from changing a bundle during the block; read its manifest anew.

    Args:
        bundle: ``bundle.manifest`` becomes the one that is on the disk.
        variants: those that the change speaks of.

    Raises:
        InputError: another process holds the bundle.
        BundleError: one of the variants came, went or has other files than in ``bundle.manifest``.
    """
    with locked_folder(bundle.path):
        manifest = Manifest.read(bundle.path / MANIFEST_NAME)
        for variant in sorted(variants):
            if manifest.digests(variant) != bundle.manifest.digests(variant):
                raise _overtaken(bundle, f"changed its {variant} graphs")
        bundle.manifest = manifest
        yield


def _overtaken(bundle: Bundle, what: str) -> BundleError:
    return BundleError(
        f"bundle {bundle.path}: another command {what} meanwhile; nothing was written for this "
        "one, repeat it"
    )


def _require_complete(
    bundle: Bundle, addition: BundleAddition, files: Mapping[str, FileRecord]
) -> None:
    """Check that a bundle that was replaced as a whole has not taken the addition along."""
    records = [record for variant in addition.graphs.values() for record in variant.values()]
    named = {file for record in records for file in record.files}
    if not addition.folder.is_dir() or named - files.keys() - bundle.manifest.files.keys():
        raise _overtaken(bundle, "replaced it")


def _add(bundle: Bundle, addition: BundleAddition, files: Mapping[str, FileRecord]) -> None:
    before = bundle.manifest
    precisions = {
        variant: made(before.precision_record(variant)) if callable(made) else made
        for variant, made in addition.precisions.items()
    }
    reduced = _without(before, addition, files)
    dropped = before.files.keys() - reduced.files.keys() - files.keys()
    _require_own(bundle, dropped | files.keys())
    _write(bundle, reduced)
    for name in dropped:
        (bundle.path / name).unlink(missing_ok=True)
    for name in files:
        target = bundle.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(addition.folder / name, target)
    _write(
        bundle,
        dataclasses.replace(
            reduced,
            graphs=reduced.graphs | addition.graphs,
            precisions=reduced.precisions | precisions,
            files=dict(sorted((reduced.files | dict(files)).items())),
        ),
    )


def _require_own(bundle: Bundle, names: Collection[str]) -> None:
    """Check that no link leads a change out of the bundle: what lies there may serve others."""
    root = bundle.path.resolve()
    for folder in sorted({pathlib.PurePosixPath(name).parent for name in names}):
        target = (bundle.path / folder).resolve()
        if not target.is_relative_to(root):
            raise InputError(
                f"bundle {bundle.path}: its folder {folder} lies in {target}, by a link, where "
                "others may need it as it is; put a copy in the place of the link"
            )


def _without(
    manifest: Manifest, addition: BundleAddition, files: Mapping[str, FileRecord]
) -> Manifest:
    """Return the manifest without the variants that are replaced, and without what goes."""
    replaced = addition.graphs
    kept = {name: records for name, records in manifest.graphs.items() if name not in replaced}
    needed = _files_of(kept) | _files_of(replaced)
    gone = _files_of({n: r for n, r in manifest.graphs.items() if n in replaced}) - needed
    return dataclasses.replace(
        manifest,
        graphs=kept,
        precisions={n: v for n, v in manifest.precisions.items() if n not in replaced},
        files={
            name: record
            for name, record in manifest.files.items()
            if name not in files and name not in gone and not name.startswith(addition.dropped)
        },
    )


def _files_of(graphs: Mapping[str, Mapping[str, GraphRecord]]) -> set[str]:
    return {
        file for records in graphs.values() for record in records.values() for file in record.files
    }


def _write(bundle: Bundle, manifest: Manifest) -> None:
    with atomic_file(bundle.path / MANIFEST_NAME) as partial:
        partial.write_text(manifest.to_json(), "utf-8")
    bundle.manifest = manifest
