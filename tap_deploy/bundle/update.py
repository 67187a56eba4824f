"""Updates of an existing bundle: adding precisions and records.

Several processes may update a bundle concurrently. Each one locks the folder, reads the current
manifest and applies its change, unless the graphs that the change depends on were modified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping

from tap_deploy.bundle.bundle import ONNX_FOLDER, Bundle, file_records
from tap_deploy.bundle.manifest import MANIFEST_NAME, FileRecord, GraphRecord, Manifest
from tap_deploy.bundle.precision_record import PrecisionRecord
from tap_deploy.errors import BundleError, InputError
from tap_deploy.storage.files import atomic_file, translated_writes
from tap_deploy.storage.folder_lock import locked_folder
from tap_deploy.storage.moves import moves_into
from tap_deploy.storage.sync import sync_tree
from tap_deploy.storage.unfinished import unfinished_path

Revision = Callable[[PrecisionRecord], PrecisionRecord]


@dataclasses.dataclass(kw_only=True)
class BundleAddition:
    """Files and records to add to a bundle; the caller fills it in.

    Attributes:
        folder: temporary folder; its files are moved to the same relative paths in the bundle.
        graphs: variant -> graph name -> record, whose ``file`` is relative to the bundle. An
            existing variant is replaced as a whole.
        precisions: variant -> its record, or a function that returns the new record from the one
            in the current manifest, and raises if they conflict.
        dropped: path prefixes of files that the change makes obsolete; they are removed.
    """

    folder: pathlib.Path
    graphs: dict[str, dict[str, GraphRecord]] = dataclasses.field(default_factory=dict)
    precisions: dict[str, PrecisionRecord | Revision] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@contextlib.contextmanager
def bundle_addition(bundle: Bundle, *, based_on: Collection[str] = ()) -> Iterator[BundleAddition]:
    """Yield an empty addition, and apply it to the bundle when the block ends without an error.

    If the block or the update raises, for example because the disk is full, the bundle is
    unchanged. A process that is killed, or a power cut, never leaves an inconsistent manifest: a
    replaced variant is first removed from the manifest, then its files are moved, then it is added;
    the next addition of the variant removes what is left of it. ``bundle.manifest`` is updated.

    Args:
        bundle: the bundle in the state from which the addition was made.
        based_on: variants from which the addition was made, or with which it was measured.

    Raises:
        InputError: the bundle cannot be written, or lies in the cache of the model hub; another
            process has locked it; or the folder of a file is a link out of the bundle.
        BundleError: another process changed one of these variants, or one that is added.
    """
    _require_own_copy(bundle)
    with translated_writes(bundle.path), unfinished_path(bundle.path, "addition") as partial:
        partial.mkdir()
        addition = BundleAddition(folder=partial)
        yield addition
        files = file_records(partial)
        with changing_bundle(bundle, {*based_on, *addition.graphs, *addition.precisions}):
            _require_complete(bundle, addition, files)
            _add(bundle, addition, files)


def require_writable(bundle: Bundle) -> None:
    """Check that a bundle is writable; called before a long job.

    Raises:
        InputError: it is not writable, or lies in the cache of the model hub.
    """
    _require_own_copy(bundle)
    if not os.access(bundle.path, os.W_OK):
        raise InputError(
            f"bundle {bundle.path} is not writable, but the result is stored in it; copy it to a "
            "writable folder"
        )


def _require_own_copy(bundle: Bundle) -> None:
    if bundle.hub_address is not None:
        raise InputError(
            f"{bundle.hub_address} is a copy in the model hub's cache, which stays as it was "
            "published, but the result is stored in the bundle; make a copy of your own with: "
            f"tap-export fetch {bundle.hub_address} -o DIR"
        )


def revise_precision(bundle: Bundle, variant: str, change: Revision) -> None:
    """Replace the record of a variant in the manifest.

    Args:
        bundle: the bundle in the state in which the variant was measured.
        variant: see ``tap_deploy.precisions``.
        change: returns the new record from the one in the current manifest; may raise.

    Raises:
        InputError: the bundle cannot be written, or another process has locked it.
        BundleError: another process changed the variant since the bundle was read.
    """
    with changing_bundle(bundle, (variant,)):
        manifest = bundle.manifest
        changed = change(manifest.precision_record(variant))
        precisions = manifest.precisions | {variant: changed}
        _write(bundle, dataclasses.replace(manifest, precisions=precisions))


@contextlib.contextmanager
def changing_bundle(bundle: Bundle, variants: Collection[str]) -> Iterator[None]:
    """Lock a bundle during the block, after reading its manifest again.

    Args:
        bundle: the bundle; ``bundle.manifest`` is replaced by the manifest on disk.
        variants: variants that the change depends on.

    Raises:
        InputError: another process has locked the bundle, or see ``require_writable``.
        BundleError: one of the variants was added, removed or changed since ``bundle.manifest`` was
            read.
    """
    _require_own_copy(bundle)
    with locked_folder(bundle.path):
        manifest = Manifest.read(bundle.path / MANIFEST_NAME)
        for variant in sorted(variants):
            if manifest.digests(variant) != bundle.manifest.digests(variant):
                raise _overtaken(bundle, f"changed its {variant} graphs")
        bundle.manifest = manifest
        yield


def _overtaken(bundle: Bundle, what: str) -> BundleError:
    return BundleError(
        f"bundle {bundle.path}: another command {what} meanwhile; nothing was written, repeat "
        "this command"
    )


def _require_complete(
    bundle: Bundle, addition: BundleAddition, files: Mapping[str, FileRecord]
) -> None:
    """Check that the added files exist: replacing the whole bundle removes them."""
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
    dropped |= _left_over(bundle, addition) - reduced.files.keys() - files.keys()
    _require_own(bundle, dropped | files.keys())
    final = dataclasses.replace(
        reduced,
        graphs=reduced.graphs | addition.graphs,
        precisions=reduced.precisions | precisions,
        files=dict(sorted((reduced.files | dict(files)).items())),
    )
    _exchange(bundle, addition.folder, dropped, files, (reduced, final))
    bundle.manifest = final


def _exchange(
    bundle: Bundle,
    folder: pathlib.Path,
    dropped: Collection[str],
    files: Collection[str],
    manifests: tuple[Manifest, Manifest],
) -> None:
    """Take files out of a bundle and others in; on an error, all is as it was.

    Everything that needs space on the disk is written first; then files are only renamed.

    Args:
        bundle: the bundle, locked.
        folder: the folder of the addition.
        dropped: files to remove.
        files: files of the addition.
        manifests: the manifest during the exchange and the one after it.
    """
    aside = folder / ".aside"
    aside.mkdir()
    names = ("before", "during", "after", "undoing")
    before, during, after, undoing = (aside / f"{name}.json" for name in names)
    before.write_bytes((bundle.path / MANIFEST_NAME).read_bytes())
    for path, content in zip((during, after, undoing), (*manifests, manifests[0]), strict=True):
        path.write_text(content.to_json(), "utf-8")
    sync_tree(folder)
    with moves_into(bundle.path, aside / "files") as moves:
        moves.replace(during, MANIFEST_NAME, before)
        for name in dropped:
            moves.take_out(name)
        for name in files:
            moves.put_in(folder / name, name)
        moves.sync()
        moves.replace(after, MANIFEST_NAME, undoing)


def _left_over(bundle: Bundle, addition: BundleAddition) -> set[str]:
    """Return the files in the folders of added variants: a killed process may have left some."""
    folders = [bundle.path / ONNX_FOLDER / variant for variant in addition.graphs]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(bundle.path).as_posix() for path in files}


def _require_own(bundle: Bundle, names: Collection[str]) -> None:
    """Check that no folder is a link out of the bundle: other programs may use its target."""
    root = bundle.path.resolve()
    for folder in sorted({pathlib.PurePosixPath(name).parent for name in names}):
        target = (bundle.path / folder).resolve()
        if not target.is_relative_to(root):
            raise InputError(
                f"bundle {bundle.path}: its folder {folder} resolves by a link to {target}, "
                "outside the bundle, which others may use; replace the link with a copy"
            )


def _without(
    manifest: Manifest, addition: BundleAddition, files: Mapping[str, FileRecord]
) -> Manifest:
    """Return the manifest without the replaced variants and the removed files."""
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
