"""Blocks: groups of nodes that are quantized or kept in higher precision together."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tap_deploy.errors import InputError
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.storage.json_files import read_json

# Node names are module paths. Each pattern matches the prefix that forms a block.
_BLOCK_PATTERNS = (
    re.compile(r"(?:\w+\.)*blocks\.\d+\.\w+"),  # attention, MLP, or one layer of a text block
    re.compile(r"decoder\.transformer\.final\w*"),
    re.compile(r"cross_conv\.\d+"),
    re.compile(r"decoder\.\w+_pred(?:\.\d+(?=\.))?"),  # a head, or one of the mask heads
    re.compile(r"upscaler"),
    re.compile(r"[^/]+"),
)


def block_of(node: str) -> str:
    """Return the block of a node, a prefix of its name.

    ``blocks.3.mlp.fc1/MatMul`` is in ``blocks.3.mlp``, ``cross_conv.2.conv2/Conv`` in
    ``cross_conv.2``. A node that matches no pattern is its own block.
    """
    matches = (pattern.match(node) for pattern in _BLOCK_PATTERNS)
    return next((match.group() for match in matches if match), node)


def nodes_by_block(nodes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group nodes by block, in the order of the graph."""
    blocks: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        block = block_of(node)
        blocks[block] = (*blocks.get(block, ()), node)
    return blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exclusions:
    """Blocks or nodes that are not quantized.

    An entry covers every node whose name equals it or continues it after a dot or slash:
    ``blocks.3`` covers the whole block, ``blocks.3.mlp.fc1`` one layer.

    Attributes:
        entries: graph name -> entries.

    Raises:
        InputError: unknown graph.
    """

    entries: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.entries) - set(GRAPH_NAMES))
        if unknown:
            raise InputError(
                f"exclusions for graph {unknown[0]!r}; expected {', '.join(GRAPH_NAMES)}"
            )

    def __len__(self) -> int:
        return sum(len(entries) for entries in self.entries.values())

    def keep(self, graph: str, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return the nodes of a graph that no entry covers.

        Raises:
            InputError: an entry covers none of the nodes, so it is probably a typo.
        """
        entries = self.entries.get(graph, ())
        for entry in entries:
            if not any(_covers(entry, node) for node in nodes):
                raise InputError(
                    f"exclusion {entry!r} covers no quantizable node of {graph}; expected one of "
                    f"its blocks: {', '.join(nodes_by_block(nodes))}"
                )
        return tuple(node for node in nodes if not any(_covers(entry, node) for entry in entries))

    def to_dict(self) -> dict[str, list[str]]:
        """Return graph name -> entries as plain JSON types."""
        return {graph: list(entries) for graph, entries in self.entries.items()}

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Exclusions:
        """Load a JSON file whose key ``exclude`` maps graphs to lists of names; ignore the rest.

        Raises:
            InputError: the file is missing, is not JSON, or has another structure.
        """
        try:
            values: Any = read_json(path)
        except (OSError, ValueError) as exc:
            raise InputError(f"exclusions {path} cannot be read as JSON: {exc}") from exc
        entries = values.get("exclude") if isinstance(values, dict) else None
        if not isinstance(entries, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in entries.values()
        ):
            raise InputError(
                f'exclusions {path}: expected {{"exclude": {{"image_encoder": ["blocks.3.mlp"]}}}}'
            )
        return cls(entries={graph: tuple(names) for graph, names in entries.items()})


def _covers(entry: str, node: str) -> bool:
    return node == entry or node.startswith((f"{entry}.", f"{entry}/"))
