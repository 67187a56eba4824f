"""Finds the files that an ONNX graph refers to, with neither onnx nor a runtime.

Weights may be in other files: ``TensorProto.external_data`` names them, in initializers, in
attributes, and in the subgraphs and functions that contain them. A node ``EPContext`` names a
compiled engine, whose code a runtime executes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from tap_deploy.errors import BundleError
from tap_deploy.storage.protobuf import MessageFile

# Field numbers of the messages of ONNX that lead to a tensor or a node.
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
OP_TYPE, EXTERNAL_DATA, KEY, VALUE = 4, 13, 1, 2
# A node without these bytes refers to no file.
MARKS = re.compile(b"location|EPContext")
MAX_DEPTH = 64  # messages within each other; a subgraph takes three


def require_listed_data(path: str | os.PathLike[str], listed: Collection[str]) -> None:
    """Check that a graph has no data in other files than those that the manifest lists for it.

    Takes milliseconds: only the structure is read, not the weights.

    Args:
        path: the ONNX file.
        listed: names of the other files, in the folder of the graph.

    Raises:
        BundleError: it refers to another file, or is not a graph, or cannot be read.
    """
    try:
        found = referred_files(path)
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise BundleError(
            f"graph {os.fspath(path)} cannot be read: {reason}; export the bundle again"
        ) from exc
    for name in sorted(found.difference(listed)):
        raise BundleError(
            f"graph {os.fspath(path)} has data in {name!r}; expected only files that the manifest "
            f"lists for it: {', '.join(listed) or 'none'}; export the bundle again"
        )


def referred_files(path: str | os.PathLike[str]) -> set[str]:
    """Return the names of the files that a graph refers to, as they are written in it.

    Raises:
        OSError: see ``open_regular``.
        ValueError: the file is not an ONNX graph, is nested too deeply, or refers to an engine.
    """
    file = MessageFile(path)
    search = _Search(file)
    search.visit("model", file.message, 0)
    return search.found


class _Search:
    """A walk through one graph."""

    def __init__(self, file: MessageFile) -> None:
        self.found: set[str] = set()
        self._file = file

    def visit(self, kind: str, data: memoryview, depth: int) -> None:
        """Visit a message and those within it."""
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        inner = MESSAGES[kind]
        for number, value in self._file.fields(data):
            if isinstance(value, int):
                continue
            if number in inner:
                if inner[number] != "node" or MARKS.search(value):
                    self.visit(inner[number], value, depth + 1)
            elif kind == "tensor" and number == EXTERNAL_DATA:
                self._entry(value)
            elif kind == "node" and number == OP_TYPE and bytes(value) == b"EPContext":
                raise ValueError("a node EPContext loads a compiled engine")

    def _entry(self, data: memoryview) -> None:
        """Note the name in a pair of texts ``location`` and name."""
        pairs = self._file.fields(data)
        entry = [(number, bytes(value)) for number, value in pairs if not isinstance(value, int)]
        if (KEY, b"location") in entry:
            names = [text.decode(errors="replace") for n, text in entry if n == VALUE]
            self.found.update(names or [""])  # as protobuf reads a missing value
