"""A bundle: a folder with all files that a device needs to run a model."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tap_deploy.bundle.golden import Golden
from tap_deploy.bundle.graph_config import require_config
from tap_deploy.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest
from tap_deploy.bundle.variant import Variant
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import BundleError
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.hub_address import HubAddress, is_hub_address
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.precisions import FP16, FP32, INT8, precision_of
from tap_deploy.storage.files import sha256_of
from tap_deploy.storage.regular_files import Stamp, open_regular, stamp_of
from tap_deploy.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.model"
CONCEPTS_FILE = "concepts.npz"
GOLDEN_FILE = "golden/samples.npz"
ONNX_FOLDER = "onnx"
# Attempts to open a changing bundle: a replacement writes the manifest twice, so a reader can be
# behind by two writes.
CHANGES_BEHIND = 3
# Attempts to load files that others touch meanwhile (``cp -al`` changes the time of each), or whose
# numbers a network file system makes up anew.
LOAD_ATTEMPTS = 2

Loaded = TypeVar("Loaded")

# How to add a missing precision, for error messages.
_REMEDIES = {
    FP32: "export it again",
    FP16: "add it with: tap-export convert BUNDLE --precision fp16",
    INT8: "add it with: tap-export quantize BUNDLE --calibration-data FOLDER",
}


class Bundle:
    """An opened bundle, created by ``Bundle.open``.

    Attributes:
        path: the folder.
        manifest: the parsed ``manifest.json``.
    """

    def __init__(self, path: pathlib.Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._stamps: dict[str, Stamp] = {}  # of the files as they were checked

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check_hashes: bool = True) -> Bundle:
        """Open a bundle and check that its files are complete and unchanged.

        Args:
            path: the folder, or ``hf://OWNER/NAME@REVISION``, which is downloaded into the cache of
                huggingface_hub if it is not there yet.
            check_hashes: compare the size and SHA-256 of every file with the manifest; if False,
                only the size.

        Raises:
            BundleError: not a bundle, a different schema version, not verified, or a file is
                missing or changed.
            HubError: the hub does not answer, or does not have the bundle.
            MissingDependencyError: huggingface_hub is not installed.
        """
        root = _snapshot(path) if is_hub_address(path) else pathlib.Path(path)
        if not root.is_dir():
            raise BundleError(f"bundle {root} is not a folder; create one with: tap-export export")
        bundle = cls(root, Manifest.read(root / MANIFEST_NAME))
        for _ in range(CHANGES_BEHIND):
            try:
                return bundle._checked(check_hashes)
            except BundleError:
                # Another process may have changed the bundle since its manifest was read.
                again = cls(root, Manifest.read(root / MANIFEST_NAME))
                if again.manifest == bundle.manifest:
                    raise
                bundle = again
        return bundle._checked(check_hashes)

    @property
    def config(self) -> TapConfig:
        """Sizes of the model."""
        return self.manifest.config

    @property
    def hub_address(self) -> HubAddress | None:
        """Its address, if it lies in the cache of the model hub; nothing is written there."""
        return HubAddress.of_snapshot(self.path)

    def variant(self, name: str) -> Variant:
        """Return the three graphs of a variant, a key of ``precisions.VARIANT_DTYPES``.

        Raises:
            BundleError: the bundle lacks the variant, one of its graphs, or a record of a file; or
                a graph is of a model of other sizes than the manifest says.
        """
        records = self.manifest.graphs.get(name)
        if records is None:
            raise BundleError(
                f"bundle {self.path} has no precision {precision_of(name)!r}; "
                f"it has {', '.join(self.manifest.graphs)}; {_REMEDIES[precision_of(name)]}"
            )
        for graph in GRAPH_NAMES:
            if graph not in records:
                raise BundleError(f"bundle {self.path} lists no {name} {graph}; export it again")
            for file in records[graph].files:  # files that are not listed were not checked
                if not self._has(file):
                    raise BundleError(f"bundle {self.path} does not list {file}; export it again")
            require_config(self.path / records[graph].file, self.config)
        return Variant(
            name=name,
            config=self.config,
            records={graph: records[graph] for graph in GRAPH_NAMES},
            file_records={
                graph: {
                    self.path / file: self.manifest.files[file] for file in records[graph].files
                }
                for graph in GRAPH_NAMES
            },
        )

    def vocabulary(self) -> Vocabulary | None:
        """Load the exported concepts; None if the bundle has none."""
        if not self._has(CONCEPTS_FILE):
            return None
        return self.loaded((CONCEPTS_FILE,), lambda: Vocabulary.load(self.path / CONCEPTS_FILE))

    def tokenizer(self) -> Tokenizer | None:
        """Load the exported tokenizer; None if the bundle has none."""
        if not self._has(TOKENIZER_FILE):
            return None
        return self.loaded((TOKENIZER_FILE,), lambda: Tokenizer(self.path / TOKENIZER_FILE))

    def golden(self) -> Golden:
        """Load the golden samples.

        Raises:
            BundleError: the bundle has none, they cannot be read, or they are those of a model of
                other sizes.
        """
        if not self._has(GOLDEN_FILE):
            raise BundleError(f"bundle {self.path} has no {GOLDEN_FILE}; export it again")
        path = self.path / GOLDEN_FILE
        return self.loaded((GOLDEN_FILE,), lambda: Golden.load(path, self.config))

    def loaded(self, names: Iterable[str], load: Callable[[], Loaded]) -> Loaded:
        """Load files, and check that they are the ones whose SHA-256 was compared.

        The runtimes open graphs by their paths, so a file may change between its check and its use.
        A file that was touched since its check is checked again. One that is touched while it is
        loaded is checked and loaded again; if it never rests, its content decides.

        Args:
            names: paths relative to the bundle, listed in the manifest.
            load: loads them; a result that is not returned is closed, if it has ``close``.

        Returns:
            The result of ``load``.

        Raises:
            BundleError: a file is missing or changed.
        """
        names = tuple(names)
        self._check_touched(names)
        attempts = 0
        while True:
            with contextlib.ExitStack() as rejected:
                result, attempts = load(), attempts + 1
                rejected.callback(getattr(result, "close", lambda: None))
                unchanged = self.is_unchanged(names)
                self._check_touched(names)
                if unchanged or attempts == LOAD_ATTEMPTS:
                    rejected.pop_all()
                    return result

    def _check_touched(self, names: tuple[str, ...]) -> None:
        for name in names:
            if not self.is_unchanged((name,)):
                self._check_file(name, self.manifest.files[name], check_hash=True)

    def is_unchanged(self, names: Iterable[str]) -> bool:
        """Whether files were not touched since they were compared with the manifest."""
        return all(
            name in self._stamps and self._stamp(name) == self._stamps[name] for name in names
        )

    def _stamp(self, name: str) -> Stamp | None:
        try:
            return stamp_of((self.path / name).stat())
        except OSError:
            return None

    def _has(self, name: str) -> bool:
        return name in self.manifest.files

    def _checked(self, check_hashes: bool) -> Bundle:
        if not self.manifest.verification.passed:
            raise BundleError(f"bundle {self.path} did not pass its verification; export it again")
        with ThreadPoolExecutor(usable_cores()) as threads:  # hashing runs without the GIL
            checks = [
                threads.submit(self._check_file, name, record, check_hashes)
                for name, record in self.manifest.files.items()
            ]
        for check in checks:
            check.result()
        return self

    def _check_file(self, name: str, record: FileRecord, check_hash: bool) -> None:
        try:
            with open_regular(self.path / name) as file:
                found = os.fstat(file.fileno())
                size, stamp = found.st_size, stamp_of(found)
                digest = sha256_of(file) if check_hash and size == record.size_bytes else None
        except FileNotFoundError as exc:
            raise BundleError(
                f"bundle {self.path}: {name} is missing; copy or export it again"
            ) from exc
        except OSError as exc:
            raise BundleError(f"bundle {self.path}: {name} cannot be read: {exc}") from exc
        if size != record.size_bytes:
            raise BundleError(
                f"bundle {self.path}: {name} has {size} bytes, expected {record.size_bytes}; "
                "copy or export it again"
            )
        if digest is not None and digest != record.sha256:
            raise BundleError(
                f"bundle {self.path}: {name} was changed: SHA-256 {digest[:12]}…, "
                f"expected {record.sha256[:12]}…; copy or export it again"
            )
        self._stamps[name] = stamp  # from before the reading: a later write changes it


def _snapshot(address: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder of a bundle on the hub, with the files of its manifest."""
    from tap_deploy.hub.downloads import fetch_snapshot

    def listed(manifest: pathlib.Path) -> Iterable[str]:
        return Manifest.read(manifest).files

    return fetch_snapshot(HubAddress.parse(address), MANIFEST_NAME, listed)


def file_records(root: pathlib.Path) -> dict[str, FileRecord]:
    """Return the size and SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): FileRecord.of(path) for path in files}
