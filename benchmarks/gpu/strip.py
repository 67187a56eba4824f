"""Strips weights from a bundle and restores them on another machine.

Weights are cut out of the files as byte ranges, so that restoring them needs neither onnx nor any
knowledge of the graphs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.gpu.weights import Recipe, Recipes, made
from tap_deploy.bundle.bundle import file_records
from tap_deploy.bundle.manifest import MANIFEST_NAME

CUTS_FILE = "weights.json"
CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Weights that were cut out of a file.

    Attributes:
        offset: offset in the original file, bytes.
        size_bytes: size of the weights, bytes.
        recipe: how to make the weights.
    """

    offset: int
    size_bytes: int
    recipe: Recipe


def strip_bundle(source: pathlib.Path, target: pathlib.Path, recipes: Recipes) -> dict[str, int]:
    """Copy a bundle without the weights that have a recipe; return the bytes per kind.

    Args:
        source: the bundle.
        target: the folder to write; it must not exist.
        recipes: finds the recipe of a tensor.

    Returns:
        Bytes of ``entries`` of the state dict, of ``random`` weights, and of ``kept`` data.
    """
    sizes = {"entries": 0, "random": 0, "kept": 0}
    cuts: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = path.relative_to(source).as_posix()
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".onnx":
            shutil.copyfile(path, copy)
            continue
        found = list(_cuts(path, recipes))
        cuts[name] = [dataclasses.asdict(cut) for cut in found]
        sizes["kept"] += _copy_without(path, copy, found)
        for cut in found:
            sizes["random" if cut.recipe.entry is None else "entries"] += cut.size_bytes
    (target / CUTS_FILE).write_text(json.dumps(cuts) + "\n", "utf-8")
    return sizes


def restore_bundle(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a stripped bundle, make its weights, and update its manifest.

    Args:
        source: output of ``strip_bundle``.
        target: the folder to write; it must not exist.
    """
    parsed = json.loads((source / CUTS_FILE).read_text("utf-8"))
    cuts = {
        name: [Cut(**{**cut, "recipe": Recipe.from_json(cut["recipe"])}) for cut in found]
        for name, found in parsed.items()
    }
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(CUTS_FILE, *cuts))
    recipes = [cut.recipe for found in cuts.values() for cut in found]
    bytes_of = made(recipes, reference=importlib.util.find_spec("torch") is not None)
    for name, found in cuts.items():
        _copy_with(source / name, target / name, found, bytes_of)
    update_manifest(target)


def update_manifest(bundle: pathlib.Path) -> None:
    """Update sizes and digests of files in the manifest, and remove missing files from it."""
    path = bundle / MANIFEST_NAME
    values = json.loads(path.read_text("utf-8"))
    records = file_records(bundle)
    values["files"] = {
        name: dataclasses.asdict(records[name]) for name in values["files"] if name in records
    }
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _cuts(path: pathlib.Path, recipes: Recipes) -> Iterator[Cut]:
    """Yield the weights of a file that have a recipe, in file order."""
    import onnx

    content = path.read_bytes()
    position = 0
    for tensor in onnx.load_model_from_string(content).graph.initializer:
        raw = tensor.raw_data
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if not raw:
            continue
        offset = content.find(raw, position)
        if offset < 0:
            raise ValueError(
                f"{path}: weights {tensor.name} are not stored in the order of the graph"
            )
        position = offset + len(raw)
        recipe = recipes.find(np.frombuffer(raw, dtype).reshape(tuple(tensor.dims)))
        if recipe is not None:
            yield Cut(offset=offset, size_bytes=len(raw), recipe=recipe)


def _copy_without(source: pathlib.Path, target: pathlib.Path, cuts: list[Cut]) -> int:
    """Copy a file without its cuts; return the number of bytes written."""
    with source.open("rb") as whole, target.open("wb") as rest:
        for cut in cuts:
            rest.write(whole.read(cut.offset - whole.tell()))
            whole.seek(cut.size_bytes, 1)
        shutil.copyfileobj(whole, rest, CHUNK_BYTES)
        return rest.tell()


def _copy_with(
    source: pathlib.Path,
    target: pathlib.Path,
    cuts: list[Cut],
    bytes_of: Callable[[Recipe], bytes],
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as rest, target.open("wb") as whole:
        for cut in cuts:
            whole.write(rest.read(cut.offset - whole.tell()))
            weights = bytes_of(cut.recipe)
            if len(weights) != cut.size_bytes:
                raise ValueError(
                    f"{source}: weights have {len(weights)} bytes; expected {cut.size_bytes}"
                )
            whole.write(weights)
        shutil.copyfileobj(rest, whole, CHUNK_BYTES)
