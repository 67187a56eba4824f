"""What is fuzzed: how to make an input from another one at random, and the law for what reads it.

The law: an input is taken, or refused by a ``TapError`` with one line; within seconds and without
much memory; and nothing in it is executed. ``tests/test_fuzz.py`` runs a few inputs of each target,
``scripts/soak fuzz`` runs them for as long as it is told.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from PIL import Image

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_references import referred_files
from tap_deploy.bundle.json_record import record_from_json
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.cli import main
from tap_deploy.cli.picture_options import BoxFile
from tap_deploy.cli.prompt_options import load_sketch, parse_box, parse_point
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import VARIANTS
from tap_deploy.console.config_file import config_from_file
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.calibration.table import load_tables
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.errors import TapError
from tap_deploy.evaluation.boxes import prompts_from_boxes
from tap_deploy.evaluation.instances import COCO, Instances
from tap_deploy.evaluation.truth_masks import truth_mask
from tap_deploy.evaluation.visual_genome import read_phrases
from tap_deploy.image import Frame, load_image
from tap_deploy.prompts import Prompts
from tap_deploy.reference.checkpoint import read_checkpoint, save_checkpoint
from tap_deploy.sessions.opening import create_session, sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.tokenizer import Tokenizer
from tests.commands import invoke
from tests.hostile import law_broken

SECONDS = 20  # for one input
CANARY = "canary"  # a file that appears if an input is executed

NUMBERS = (0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, 1 << 63)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1 << 62, 10**400, 1e308, float("nan"), "", "a", "\0", "\ud800"),
    *("../../etc/passwd", "/etc/passwd", "a" * 5000, [], {}, [[]], [None], {"": {}}, [[[[1]]]]),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of input.

    Attributes:
        make: returns an input.
        read: reads it from a path, or from its text.
        suffix: of the file.
        native: whether code in C, which may end the process, parses the input.
    """

    make: Callable[[random.Random], bytes]
    read: Callable[[pathlib.Path], object]
    suffix: str = ""
    native: bool = False

    def check(self, content: bytes, folder: pathlib.Path) -> bool:
        """Let an input be read; returns whether it was taken.

        Raises:
            Exception: it broke the law.
        """
        path = folder / f"input{self.suffix}"
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.read(path)
            except TapError as exc:
                assert "\n" not in str(exc) and str(exc).isprintable(), exc
                return False
            finally:
                assert not (folder / CANARY).exists() and not os.path.exists(CANARY), "executed"
        return True


# --- random changes ---


def mutated(content: bytes, rng: random.Random, *, most: int = 8) -> bytes:
    """Change some bytes, numbers and lengths of a file."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, most))):
        place = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:  # most formats have their structure at the beginning
            place = min(place, rng.randrange(257))
        match rng.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[place % len(data)] = rng.randrange(256)
            case 2:
                data[place:place] = rng.randbytes(rng.randint(1, 9))
            case 3:
                del data[place : place + rng.randint(1, 64)]
            case 4:
                form = rng.choice("<>") + rng.choice("HIQ")
                size = struct.calcsize(form)
                number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
                data[place : place + size] = struct.pack(form, number)
            case 5:
                start = rng.randrange(len(data) + 1)
                data[place:place] = data[start : start + rng.randint(1, 200)]
            case _ if rng.random() < 0.2:
                del data[place:]
    return bytes(data)


def mutated_json(value: Any, rng: random.Random, *, most: int = 4) -> bytes:
    """Change values, keys and sometimes the text of a JSON document."""
    document = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, most))):
        document = _changed(document, rng)
    text = json.dumps(document)
    kind = rng.random()
    if kind < 0.1:
        return mutated(text.encode(), rng)
    if kind < 0.15:
        deep = rng.choice((50, 200, 5000))
        return text.replace("null", "[" * deep + "]" * deep, 1).encode()
    if kind < 0.2 and text.startswith("{") and document:
        return f"{{{json.dumps(rng.choice(list(document)))}: 0, {text[1:]}".encode()
    if kind < 0.25:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    return text.encode()


def _changed(value: Any, rng: random.Random) -> Any:
    """Return a document with one place changed."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        match rng.randrange(12):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[rng.choice(("", "\0", "\ud800", "../x", "x" * 300, "schema_version"))] = (
                    value.pop(key)
                )
            case 2 if isinstance(value, list):
                value.append(rng.choice(value))
            case _:
                value[key] = _changed(value[key], rng)
        return value
    if isinstance(value, int) and abs(value) < 1 << 62 and rng.random() < 0.4:
        return rng.choice((value + 1, -value, value * 1000, value + 0.5, str(value)))
    return copy.deepcopy(rng.choice(VALUES))


# --- checkpoints ---


@functools.cache
def checkpoint(suffix: str) -> bytes:
    """A small checkpoint in the format of a suffix."""
    import tempfile

    state = {f"layer.{i}.weight": torch.arange(6.0).reshape(2, 3) + i for i in range(3)}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"a{suffix}")
        if suffix == ".old.pth":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        else:
            save_checkpoint(state, path)
        return path.read_bytes()


class Executed:
    """What a pickle executes that is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def some_pickle(rng: random.Random) -> bytes:
    """A pickle, changed at random, sometimes with a call of ``os.system``."""
    if rng.random() < 0.3:
        inside = {"model": {"w": np.ones(3, np.float32), "x": Executed()}}
        content = pickle.dumps(inside, protocol=rng.randint(0, 5))
        return content if rng.random() < 0.3 else mutated(content, rng)
    if rng.random() < 0.2:
        calls = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nfromfile\n", b"c__main__\nx\n")
        start, end = rng.choice(calls), rng.choice((b"R.", b"\x81.", b"b.", b"}b.", b"."))
        return b"\x80\x04" + start + b"(S'touch " + CANARY.encode() + b"'\nt" + end
    return mutated(checkpoint(".pkl"), rng)


# --- bundles ---


@functools.cache
def bundle_path() -> pathlib.Path:
    """The bundle that inputs are put into; ``use_bundle`` names it."""
    return pathlib.Path(os.environ["TAP_FUZZ_BUNDLE"])


def use_bundle(path: pathlib.Path) -> None:
    """Name the bundle whose files are changed; it stays as it is."""
    os.environ["TAP_FUZZ_BUNDLE"] = str(path)
    bundle_path.cache_clear()


def linked_bundle(folder: pathlib.Path) -> pathlib.Path:
    """Return a bundle whose files are links to those of ``bundle_path``, without its manifest."""
    target = folder / "bundle"
    if not target.exists():
        shutil.copytree(bundle_path(), target, copy_function=os.link)
    (target / "manifest.json").unlink(missing_ok=True)
    return target


def some_manifest(rng: random.Random) -> bytes:
    """The manifest of the bundle, changed at random."""
    values = json.loads((bundle_path() / "manifest.json").read_text("utf-8"))
    if rng.random() < 0.2:
        name = rng.choice(("/dev/zero", "../x", "a\0", "\ud800", "onnx", ".", "x/" * 3000, "a\\b"))
        values["files"][name] = {"size_bytes": rng.choice(NUMBERS), "sha256": "0" * 64}
    if rng.random() < 0.3:
        size = rng.choice(list(values["config"]))
        values["config"][size] = rng.choice((*NUMBERS, values["config"][size] * 2))
    return mutated_json(values, rng)


def read_manifest(path: pathlib.Path) -> None:
    folder = linked_bundle(path.parent)
    shutil.copyfile(path, folder / "manifest.json")
    for command in ("inspect", "plan --device h100 --json"):
        verb, *options = command.split()
        broken = law_broken(invoke(verb, folder, *options))
        assert broken is None, broken
    bundle = Bundle.open(folder, check_hashes=False)
    for name in bundle.manifest.graphs:
        bundle.variant(name).path("text_decoder")


@functools.cache
def graph() -> bytes:
    """The text decoder of the bundle."""
    return (bundle_path() / "onnx/fp32/text_decoder.onnx").read_bytes()


@functools.cache
def small_graph() -> bytes:
    """A graph of a kilobyte with all places for tensors, some of them in other files."""
    inside = onnx.TensorProto(name="a", data_type=1, dims=[2], raw_data=bytes(8))
    outside = onnx.TensorProto(name="b", data_type=1, dims=[2], data_location=1)
    outside.external_data.add(key="location", value="b.bin")
    outside.external_data.add(key="offset", value="0")
    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[inside, outside])
    nodes = [
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner),
        onnx.helper.make_node("Constant", [], ["z"], value=outside),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [inside, outside]))
    model.graph.sparse_initializer.add().values.CopyFrom(outside)
    model.functions.add(name="f", domain="d").node.append(nodes[1])
    return bytes(model.SerializeToString())


def all_locations(message: Any) -> set[str]:
    """The names of other files anywhere in a message that protobuf's own reader has parsed."""
    found: set[str] = set()
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for item in value if isinstance(value, (list, tuple)) or hasattr(value, "add") else [value]:
            if field.message_type.name == "TensorProto":
                found |= {e.value for e in item.external_data if e.key == "location"}
            found |= all_locations(item)
    return found


def read_references(path: pathlib.Path) -> None:
    """Every reference that protobuf's own reader finds is found, or the graph is refused."""
    try:
        found = referred_files(path)
    except ValueError:
        return
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        return
    # The Python package hands out bytes where a text is not UTF-8.
    named = {
        n.decode(errors="replace") if isinstance(n, bytes) else n for n in all_locations(model)
    }
    missed = named - found
    assert not missed, f"missed {missed}"


def read_graph(path: pathlib.Path) -> None:
    spec = Bundle.open(bundle_path(), check_hashes=False).variant("fp32").specs["text_decoder"]
    create_session("onnxruntime", path, spec, threads=1).close()


def read_listed_graph(path: pathlib.Path) -> None:
    """Load a graph from a bundle whose manifest says that this is the right one."""
    from tests.hostile import list_again

    folder = linked_bundle(path.parent)
    shutil.copyfile(bundle_path() / "manifest.json", folder / "manifest.json")
    target = folder / "onnx/fp32/text_decoder.onnx"
    target.unlink()
    shutil.copyfile(path, target)
    list_again(folder, "onnx/fp32/text_decoder.onnx")
    for session in sessions_from_bundle(Bundle.open(folder), RunOn(threads=1)).values():
        session.close()


# --- prompts and other small files ---

STROKES = [[[1.5, 2], [3, 4], [5, 6]], [[7, 8]]]
OWN_PROMPTS = {"a.png": {"boxes": [[0, 0, 9, 9]], "points": [[[1, 2, 1]]], "sketches": STROKES}}


def read_sketch(path: pathlib.Path) -> None:
    Prompts.from_sketches(load_sketch(path)).check(64, 64)


def read_boxes(path: pathlib.Path) -> None:
    BoxFile(path, [])


def read_calibration_prompts(path: pathlib.Path) -> None:
    CalibrationPrompts.from_file(path).for_image(pathlib.Path("a.png"), "0" * 64, 64, 64)


def some_sketch(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated(b"x,y\n1,2\n# a\n3.5 4\n\n5;6\n", rng)
    return mutated_json(rng.choice((STROKES, STROKES[0])), rng)


def read_point(path: pathlib.Path) -> None:
    text = path.read_bytes().decode(errors="replace")
    for parse, make in ((parse_point, Prompts.from_points), (parse_box, Prompts.from_boxes)):
        try:
            make([parse(text)]).check(64, 64)
        except TapError as exc:
            assert str(exc).isprintable()


@functools.cache
def vocabulary_npz(compressed: bool) -> bytes:
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, weights=np.ones((4, 3), np.float32), names=np.array(["a", "b", "c"]))
    return file.getvalue()


RANGES = {
    **{"graph": "image_encoder", "method": "max", "ranges": {"a": 1.0}, "onnx_sha256": "0" * 64},
    **{"data_fingerprint": "0", "num_samples": 1},
}
PLAN = {
    **dict.fromkeys(("graph", "backend", "backend_version", "variant"), "x"),
    **dict.fromkeys(("onnx_sha256", "plan_sha256"), "0" * 64),
    **dict.fromkeys(("minimum_compute_capability", "gpu", "driver", "onnx_data_sha256")),
    **{"compute_capabilities": ["8.7"], "version_compatible": False, "size_bytes": 1},
    **{"profiles": {"images": {"min": [1], "opt": [1], "max": [1]}}, "flags": {}, "options": []},
    **{"build_seconds": 1.0, "layer_precisions": {"fp16": 3}},
}


def some_plan_record(rng: random.Random) -> bytes:
    """A sidecar whose key fits what is left of it, if it is read at all."""
    content = mutated_json(PLAN, rng)
    try:
        key = record_from_json(PlanRecord, json.loads(content)).key
    except (ValueError, TypeError, RecursionError):
        key = "0" * 64
    return content.replace(b"{", b'{"key": "%s", ' % key.encode(), 1)


# --- pictures ---

PICTURES = {
    **{"PNG": {}, "JPEG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "PPM": {}, "TGA": {}, "ICO": {}},
    **{"TIFF": {"compression": "tiff_lzw"}, "JPEG2000": {}, "PCX": {}, "SGI": {}, "DDS": {}},
    **{"ICNS": {}, "PDF": {}, "EPS": {}, "AVIF": {}},
}


@functools.cache
def picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind, **PICTURES[kind])
    return file.getvalue()


def some_picture(rng: random.Random) -> bytes:
    from PIL import features

    missing = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
    kinds = [k for k in PICTURES if k not in missing or features.check(missing[k])]
    return mutated(picture(rng.choice(kinds)), rng)


def read_picture(path: pathlib.Path) -> None:
    for convert in (False, True):
        try:
            load_image(path, convert=convert)
        except TapError as exc:
            assert str(exc).isprintable()


# --- annotations ---

SIDE = 8  # of the picture, pixels
BOXED = {"id": 5, "image_id": 1, "category_id": 2, "bbox": [1, 1, 4.5, 3], "score": 0.5}
ANNOTATIONS = {
    "images": [{"id": 1, "height": SIDE, "width": SIDE, "file_name": "a.png", "coco_url": "x/b"}],
    "categories": [{"id": 2, "name": "a"}],
    "annotations": [
        BOXED | {"id": 5 + i, "area": 9, "iscrowd": i % 2, "segmentation": segmentation}
        for i, segmentation in enumerate(
            (
                [[1, 1, 5, 1, 5, 4.5]],
                {"size": [SIDE, SIDE], "counts": [9, 20, 35]},
                {"size": [SIDE, SIDE], "counts": "9d0S1"},
            )
        )
    ],
}
REGION = {"x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a dog"}
PHRASES = [{"id": 1, "regions": [REGION]}]


def some_annotations(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutated(json.dumps(ANNOTATIONS).encode(), rng)
    return mutated_json(ANNOTATIONS, rng)


def read_annotations(path: pathlib.Path) -> None:
    """Read annotations, then what the protocols read of each: boxes, and masks by C code."""
    (path.parent / "a.png").touch()
    found = Instances.read(path, path.parent, COCO)
    for picture in found.pictures:
        picture.check_size(SIDE, SIDE)
        for entry in found.by_picture()[picture.id]:
            prompts_from_boxes([entry["bbox"]], Frame.for_image(SIDE, SIDE, 64)).check(SIDE, SIDE)
            assert truth_mask(entry, SIDE, SIDE).shape == (SIDE, SIDE)


def read_detections(path: pathlib.Path) -> None:
    whole = path.with_name("annotations.json")
    whole.write_text(json.dumps(ANNOTATIONS))
    (path.parent / "a.png").touch()
    Instances.read(whole, path.parent, COCO).detections(path)


def read_regions(path: pathlib.Path) -> None:
    (path.parent / "1.jpg").touch()
    read_phrases(path, path.parent)


# --- command lines ---

LIGHT = ("run", "inspect", "plan", "verify", "completion")


def some_command_line(rng: random.Random) -> bytes:
    """A command and words for it: options, and values that fit or do not."""
    import click

    verb = rng.choice(main.list_commands(None))
    command = main.get_command(None, verb)
    files = [str(bundle_path()), "PICTURE", "FOLDER", "NOTHING", "/dev/null", "/dev/zero", "", "."]
    values = (*files, "1,2", "1,2,3,4", "nan", "-1", "1e9", "9" * 5000, "é", "\udcff", "--", "a\nb")
    words = []
    for option in rng.sample(command.params, rng.randint(0, min(5, len(command.params)))):
        if isinstance(option, click.Option):
            words.append(rng.choice(option.opts))
            if not option.is_flag or rng.random() < 0.1:
                kind = option.type
                fits = isinstance(kind, click.Choice) and rng.random() < 0.8
                word = str(rng.choice(kind.choices if fits else values))
                words.append(word.replace("full", "short"))  # a whole suite may look like a hang
        else:
            words.append(rng.choice(values))
    # A heavy command that has all it needs would run: it gets what it cannot use.
    words = [verb, rng.choice(files if verb in LIGHT else files[2:]), *words]
    return json.dumps(words).encode()


def read_command_line(path: pathlib.Path) -> None:
    words = json.loads(path.read_text("utf-8"))
    places = {"PICTURE": path.parent / "a.png", "FOLDER": path.parent, "NOTHING": "/nowhere/x"}
    Image.new("RGB", (40, 30)).save(places["PICTURE"])
    broken = law_broken(invoke(*(places.get(word, word) for word in words)))
    assert broken is None, broken


def changed(value: Any) -> Callable[[random.Random], bytes]:
    return functools.partial(mutated_json, value)


def file_of(source: Callable[[], bytes]) -> Callable[[random.Random], bytes]:
    return lambda rng: mutated(source(), rng)


TARGETS = {
    "checkpoint.pkl": Target(make=some_pickle, read=read_checkpoint, suffix=".pkl"),
    "checkpoint.pth": Target(
        make=lambda rng: mutated(checkpoint(rng.choice((".pth", ".old.pth"))), rng),
        read=read_checkpoint,
        suffix=".pth",
        native=True,
    ),
    "checkpoint.safetensors": Target(
        make=file_of(lambda: checkpoint(".safetensors")), read=read_checkpoint, native=True
    ),
    "concepts.npz": Target(
        make=lambda rng: mutated(vocabulary_npz(rng.random() < 0.5), rng),
        read=Vocabulary.load,
        suffix=".npz",
    ),
    "concepts.pkl": Target(make=some_pickle, read=Vocabulary.load, suffix=".pkl"),
    "tokenizer": Target(
        make=file_of(lambda: (bundle_path() / "tokenizer.model").read_bytes()),
        read=Tokenizer,
        native=True,
    ),
    "manifest": Target(make=some_manifest, read=read_manifest),
    "references": Target(make=file_of(small_graph), read=read_references),
    "graph": Target(make=file_of(small_graph), read=read_graph, suffix=".onnx", native=True),
    "text decoder": Target(make=file_of(graph), read=read_listed_graph, native=True),
    "config": Target(make=changed(VARIANTS["tap_demo"].to_dict()), read=config_from_file),
    "plan record": Target(make=some_plan_record, read=PlanRecord.read),
    "sketch": Target(make=some_sketch, read=read_sketch),
    "boxes": Target(make=changed({"a.png": [[0, 0, 9, 9]], "b.png": []}), read=read_boxes),
    "calibration prompts": Target(make=changed(OWN_PROMPTS), read=read_calibration_prompts),
    "calibration cache": Target(
        make=changed({"schema_version": 1, "tables": {"image_encoder": RANGES}}),
        read=load_tables,
    ),
    "exclusions": Target(
        make=changed({"exclude": {"image_encoder": ["blocks.3.mlp"]}}), read=Exclusions.load
    ),
    "points and boxes": Target(make=lambda rng: mutated(b"1,2,1;3.5,4,0", rng), read=read_point),
    "picture": Target(make=some_picture, read=read_picture, native=True),
    "annotations": Target(make=some_annotations, read=read_annotations, native=True),
    "detections": Target(make=changed([BOXED, BOXED]), read=read_detections),
    "region descriptions": Target(make=changed(PHRASES), read=read_regions),
    "command line": Target(make=some_command_line, read=read_command_line),
}
