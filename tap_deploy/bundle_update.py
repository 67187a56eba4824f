"""Adding to a bundle that is there: further precisions, with all that is known of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from tap_deploy.bundle import Bundle, file_records
from tap_deploy.files import atomic_file, translated_writes
from tap_deploy.manifest import MANIFEST_NAME, GraphRecord, Manifest


@dataclasses.dataclass(kw_only=True)
class BundleAddition:
    """What shall be added; filled in while ``folder`` is filled with files.

    Attributes:
        folder: a temporary one; a file in it goes to the same relative path in the bundle.
        graphs: variant -> graph name -> record, whose ``file`` is relative to the bundle. A variant
            that the bundle has already is replaced as a whole.
        precisions: variant -> what is known of how it was made, JSON types.
        dropped: files of the bundle that the addition makes untrue; they are removed.
    """

    folder: pathlib.Path
    graphs: dict[str, dict[str, GraphRecord]] = dataclasses.field(default_factory=dict)
    precisions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    dropped: set[str] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def bundle_addition(bundle: Bundle) -> Iterator[BundleAddition]:
    """Yield an empty addition; when the block ends well, it becomes part of the bundle.

    An interrupted update never leaves a manifest that vouches for half of it: a variant that is
    replaced is first taken out of the manifest, then its files are moved, then it is entered.
    ``bundle.manifest`` is up to date afterwards. If the block raises, the bundle is as it was.

    Raises:
        InputError: the bundle cannot be written.
    """
    partial = bundle.path / f".partial-{secrets.token_hex(4)}"
    try:
        with translated_writes(bundle.path):
            partial.mkdir()
            addition = BundleAddition(folder=partial)
            yield addition
            _add(bundle, addition)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def record_precision(bundle: Bundle, variant: str, values: Mapping[str, Any]) -> None:
    """Merge values into what the manifest knows of a variant, e.g. a verdict.

    Raises:
        InputError: the bundle cannot be written.
    """
    known = bundle.manifest.precisions
    merged = known | {variant: dict(known.get(variant, {})) | dict(values)}
    _write(bundle, dataclasses.replace(bundle.manifest, precisions=merged))


def _add(bundle: Bundle, addition: BundleAddition) -> None:
    files = file_records(addition.folder)
    _write(bundle, _without(bundle.manifest, set(addition.graphs), set(files) | addition.dropped))
    for name in addition.dropped:
        (bundle.path / name).unlink(missing_ok=True)
    for name in files:
        target = bundle.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(addition.folder / name, target)
    manifest = bundle.manifest
    _write(
        bundle,
        dataclasses.replace(
            manifest,
            graphs=manifest.graphs | addition.graphs,
            precisions=manifest.precisions | addition.precisions,
            files=dict(sorted((manifest.files | files).items())),
        ),
    )


def _without(manifest: Manifest, variants: set[str], files: set[str]) -> Manifest:
    """Return the manifest without some variants, and without files that are to go."""
    kept = {name: records for name, records in manifest.graphs.items() if name not in variants}
    needed = {record.file for records in kept.values() for record in records.values()}
    gone = {
        record.file
        for name in variants
        for record in manifest.graphs.get(name, {}).values()
        if record.file not in needed
    }
    return dataclasses.replace(
        manifest,
        graphs=kept,
        precisions={n: v for n, v in manifest.precisions.items() if n not in variants},
        files={
            name: record
            for name, record in manifest.files.items()
            if name not in files and name.removesuffix(".data") not in gone
        },
    )


def _write(bundle: Bundle, manifest: Manifest) -> None:
    with atomic_file(bundle.path / MANIFEST_NAME) as partial:
        partial.write_text(manifest.to_json(), "utf-8")
    bundle.manifest = manifest
