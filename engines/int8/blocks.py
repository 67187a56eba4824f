"""Blocks: groups of nodes that are quantized, or kept in a higher precision, together."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tap_deploy.errors import InputError
from tap_deploy.graphs import GRAPH_NAMES

# Node names are module paths. One pattern a line: what of the path is one block.
_BLOCK_PATTERNS = (
    re.compile(r"(?:\w+\.)*blocks\.\d+\.\w+"),  # attention, MLP, or one layer of a text block
    re.compile(r"decoder\.transformer\.final_\w+"),
    re.compile(r"cross_conv\.\d+"),
    re.compile(r"decoder\.\w+_pred(?:\.\d+(?=\.))?"),  # a head, or one of the four mask heads
    re.compile(r"upscaler"),
    re.compile(r"[^/]+"),
)


def block_of(node: str) -> str:
    """Return the block that a node belongs to: a prefix of its name.

    ``blocks.3.mlp.fc1/MatMul`` is of ``blocks.3.mlp``, ``cross_conv.2.conv1/Conv`` of
    ``cross_conv.2``; what is in no group is a block of its own.
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
    """What is not quantized: per graph, blocks or nodes by name.

    An entry stands for every node whose name it is, or whose name continues it after a dot or a
    slash: ``blocks.3`` for the whole block, ``blocks.3.mlp.fc1`` for one layer.

    Raises:
        InputError: a graph that does not exist.
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
        """Return the nodes of a graph that are quantized all the same.

        Raises:
            InputError: an entry stands for none of the nodes, so it is a slip of the pen.
        """
        entries = self.entries.get(graph, ())
        for entry in entries:
            if not any(_covers(entry, node) for node in nodes):
                raise InputError(
                    f"exclusion {entry!r} stands for no quantizable node of {graph}; its blocks "
                    f"are {', '.join(nodes_by_block(nodes))}"
                )
        return tuple(node for node in nodes if not any(_covers(entry, node) for entry in entries))

    def to_dict(self) -> dict[str, list[str]]:
        """Return plain JSON types: graph -> entries."""
        return {graph: list(entries) for graph, entries in self.entries.items()}

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Exclusions:
        """Read a JSON file: an object ``exclude`` of graph -> list of names; the rest is notes.

        Raises:
            InputError: it is missing, no JSON, or something else.
        """
        try:
            values: Any = json.loads(pathlib.Path(path).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
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
