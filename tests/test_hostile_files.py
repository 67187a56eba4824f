"""Attacks with files: each once got through, ended in a traceback, hung or took all memory."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch

from tap_deploy import TapPredictor
from tap_deploy.bench.report import load_report
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_references import referred_files
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.concepts import Vocabulary
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.calibration.table import load_tables
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.errors import BundleError, CheckpointError, InputError, TapError
from tap_deploy.reference.checkpoint import read_checkpoint
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.ort import session as ort_session
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.json_files import MAX_DEPTH, parse_json, read_json
from tap_deploy.storage.regular_files import TEXT_BYTES, open_regular, read_bytes
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.visualize.fonts import font_from_path
from tests.commands import invoke, refused
from tests.hostile import edit_manifest, law_broken, list_again, npy_header, npz_of, patience

TEXT_DECODER = "onnx/fp32/text_decoder.onnx"
POINTS = [[[9, 9, 1]]]


@pytest.fixture
def copy(micro_bundle, tmp_path):
    return pathlib.Path(shutil.copytree(micro_bundle.path, tmp_path / "bundle"))


# --- graphs that refer to files nobody vouches for ---


def with_external_weights(folder, location="w.bin", place="initializer"):
    """Move one weight of the text decoder to a file that the manifest does not list."""
    path = folder / TEXT_DECODER
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    (path.parent / os.path.basename(location)).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if place == "constant":
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, node)
    path.write_bytes(model.SerializeToString())
    list_again(folder, TEXT_DECODER)


@pytest.mark.parametrize("place", ["initializer", "constant"])
@pytest.mark.parametrize("check_hashes", [True, False])
def test_weights_that_the_manifest_does_not_list_are_not_used(copy, place, check_hashes):
    with_external_weights(copy, place=place)
    bundle = Bundle.open(copy, check_hashes=check_hashes)
    with pytest.raises(BundleError, match=r"has data in 'w\.bin'.*lists for it: none"):
        sessions_from_bundle(bundle, RunOn())
    with pytest.raises(BundleError, match=r"has data in 'w\.bin'"):
        bundle.variant("fp32").load("text_decoder")
    refused(invoke("verify", copy), "has data in 'w.bin'")


def test_weights_beside_the_graph_must_be_listed_for_it(copy):
    """The usual name is not enough: the manifest says that this graph has none."""
    with_external_weights(copy, "text_decoder.onnx.data")
    with pytest.raises(BundleError, match=r"data in 'text_decoder\.onnx\.data'"):
        sessions_from_bundle(Bundle.open(copy), RunOn())


def inner_graph(tensor):
    return onnx.helper.make_graph([], "inner", [], [], initializer=[tensor])


@pytest.mark.parametrize("place", ["subgraph", "sparse", "function", "list", "training"])
def test_references_are_found_wherever_a_graph_may_have_tensors(tmp_path, place):
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="elsewhere")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "outer", [], []))
    if place == "subgraph":
        branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner_graph(tensor))
        outer = onnx.helper.make_graph([branch], "middle", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=outer))
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "function":
        node = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
        model.functions.add(name="f", domain="d").node.append(node)
    elif place == "list":
        node = model.graph.node.add(op_type="Custom")
        node.attribute.add(name="a", type=9).tensors.append(tensor)
    else:
        model.training_info.add().algorithm.CopyFrom(inner_graph(tensor))
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    assert referred_files(path) == {"elsewhere"}
    del tensor.external_data[:]
    tensor.external_data.add(key="location")
    path.write_bytes(onnx.helper.make_model(inner_graph(tensor)).SerializeToString())
    assert referred_files(path) == {""}


def test_a_reference_behind_a_tag_that_others_cut_to_32_bits(tmp_path):
    """Protobuf's own reader drops the upper bits of a tag and would see field 7, the graph."""
    tag = (1 << 35) | (7 << 3) | 2
    encoded = bytes((tag >> shift & 0x7F) | 0x80 for shift in range(0, 35, 7)) + b"\x01"
    path = tmp_path / "graph.onnx"
    path.write_bytes(encoded + b"\x00")
    with pytest.raises(ValueError, match="29 bits"):
        referred_files(path)


def test_a_compiled_engine_within_a_graph_is_refused(copy):
    path = copy / TEXT_DECODER
    model = onnx.load(path)
    model.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["x"])
    path.write_bytes(model.SerializeToString())
    list_again(copy, TEXT_DECODER)
    with pytest.raises(BundleError, match="EPContext loads a compiled engine"):
        sessions_from_bundle(Bundle.open(copy), RunOn())


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"\x08", b"\x3b", b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"],
    ids=["empty", "field 0", "no value", "group", "endless number"],
)
def test_what_is_no_graph_is_refused_in_one_line(copy, content):
    (copy / TEXT_DECODER).write_bytes(content)
    list_again(copy, TEXT_DECODER)
    refused(invoke("verify", copy), "text_decoder")


# --- files that change between their check and their use ---


def text_decoder_that_changes(monkeypatch, change):
    """Call ``change`` once, after the hash of the text decoder was checked and before its use."""
    load, left = ort_session.load_session, [change]

    def changed(path, spec, **options):
        if spec.name == "text_decoder" and left:
            left.pop()(pathlib.Path(path))
        return load(path, spec, **options)

    monkeypatch.setattr(ort_session, "load_session", changed)


def other_weights(path):
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    tensor.raw_data = bytes(len(tensor.raw_data))
    new = path.with_name("new")
    new.write_bytes(model.SerializeToString())
    new.replace(path)


def test_a_graph_replaced_just_before_it_is_loaded(copy, photo, monkeypatch):
    text_decoder_that_changes(monkeypatch, other_weights)
    with (
        TapPredictor.from_bundle(copy) as predictor,
        pytest.raises(BundleError, match=r"text_decoder\.onnx was changed"),
    ):
        predictor.predict(photo, points=POINTS)


def test_a_graph_written_to_just_before_it_is_loaded(copy, photo, monkeypatch):
    def write(path):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))

    text_decoder_that_changes(monkeypatch, write)
    with TapPredictor.from_bundle(copy) as predictor, pytest.raises(BundleError):
        predictor.predict(photo, points=POINTS)


def test_a_graph_that_is_only_touched_meanwhile_is_loaded_again(copy, photo, monkeypatch):
    """``cp -al`` gives every file another link, and so another time."""
    text_decoder_that_changes(monkeypatch, lambda path: os.link(path, path.with_name("link")))
    with TapPredictor.from_bundle(copy) as predictor:
        assert predictor.predict(photo, points=POINTS).captions


def test_a_graph_that_is_replaced_and_put_back(copy, photo, monkeypatch):
    load, left = ort_session.load_session, [True]

    def swapped(path, spec, **options):
        if spec.name != "text_decoder" or not left:
            return load(path, spec, **options)
        left.pop()
        path = pathlib.Path(path)
        os.link(path, path.with_name("old"))
        other_weights(path)
        session = load(path, spec, **options)
        path.with_name("old").replace(path)
        return session

    with TapPredictor.from_bundle(copy) as predictor:
        expected = predictor.predict(photo, points=POINTS).caption_ids
    monkeypatch.setattr(ort_session, "load_session", swapped)
    with TapPredictor.from_bundle(copy) as predictor:
        found = predictor.predict(photo, points=POINTS).caption_ids
    assert not left
    assert np.array_equal(found, expected)


def test_a_graph_without_rest_is_loaded_if_its_content_stays(copy, monkeypatch):
    """On some network file systems the number of a file changes from call to call."""
    load, loads = ort_session.load_session, []

    def restless(path, spec, **options):
        os.utime(path)
        loads.append(spec.name)
        return load(path, spec, **options)

    monkeypatch.setattr(ort_session, "load_session", restless)
    TapPredictor.from_bundle(copy).close()
    assert sorted(loads) == ["image_encoder"] * 2 + ["prompt_decoder"] * 2


def test_concepts_that_change_after_their_check(copy):
    bundle = Bundle.open(copy)
    vocabulary = bundle.vocabulary()
    Vocabulary(weights=vocabulary.weights[:, ::-1].copy(), names=vocabulary.names).save(
        copy / "concepts.npz"
    )
    with pytest.raises(BundleError, match=r"concepts\.npz was changed"):
        bundle.vocabulary()


# --- manifests ---


def resized(**sizes):
    return lambda manifest: manifest["config"].update(sizes)


def listed(name):
    return lambda manifest: manifest["files"].update({name: {"size_bytes": 1, "sha256": "0" * 64}})


@pytest.mark.parametrize(
    "change",
    [
        listed("a\0b"),
        listed("\ud800"),
        listed("a\nb"),
        listed("\x1b[2J"),
        listed(""),
        listed("."),
        listed("onnx//x"),
        listed("a" * 300),
        listed("é" * 200),
        listed("../x"),
        listed("onnx/../../x"),
        listed("/etc/passwd"),
        listed("..\\x"),
        resized(text_seq_len=1 << 62),
        resized(image_size=1 << 62),
        resized(image_size=10**9 // 128 * 128),
        resized(vocab_size=10**9),
        resized(text_depth=10**9),
        resized(text_seq_len=10**9),
        resized(encoder_dim=10**4000),
    ],
    ids=lambda change: None,
)
def test_hostile_values_of_a_manifest(copy, change):
    edit_manifest(copy, change)
    with patience():
        refused(invoke("inspect", copy), "export it again")


def test_a_key_twice(copy):
    """Programs differ in which of the two they take: one checks, another one uses."""
    path = copy / "manifest.json"
    text = path.read_text("utf-8").replace('"model"', '"model": "other", "model"', 1)
    path.write_text(text, "utf-8")
    refused(invoke("inspect", copy), "holds 'model' twice")


def test_half_a_surrogate_pair(copy):
    edit_manifest(copy, lambda manifest: manifest.update(model="\ud800"))
    refused(invoke("inspect", copy), "surrogate")


def test_a_whole_surrogate_pair_is_a_letter():
    assert parse_json('["\\ud83d\\ude00"]') == ["\N{GRINNING FACE}"]


def test_depth_is_bounded(copy):
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for deep in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(ValueError, match="nested"):
            parse_json("[" * deep + "]" * deep)
    deep = "[" * 900 + "]" * 900
    text = (copy / "manifest.json").read_text("utf-8")
    text = text.replace('"verification": {', f'"verification": {{"deep": {deep}, ', 1)
    (copy / "manifest.json").write_text(text, "utf-8")
    refused(invoke("inspect", copy), "nested")


# --- files that are none ---


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def link_to(target):
    return lambda path: path.symlink_to(target)


SPECIAL = {
    "pipe": os.mkfifo,
    "endless device": link_to("/dev/zero"),
    "empty device": link_to("/dev/null"),
    "folder": os.mkdir,
    "circle": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name", ["manifest.json", TEXT_DECODER, "concepts.npz", "tokenizer.model", "golden/samples.npz"]
)
def test_a_file_of_a_bundle_that_is_none(copy, kind, name):
    (copy / name).unlink()
    SPECIAL[kind](copy / name)
    with patience():
        refused(invoke("inspect", copy), os.path.basename(name))


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "command",
    [
        ("run", "BUNDLE", "PHOTO", "--sketch", "FILE"),
        ("run", "BUNDLE", "PHOTO", "--boxes", "FILE"),
        ("run", "BUNDLE", "PHOTO", "--point", "9,9", "--concepts", "FILE"),
        ("run", "BUNDLE", "PHOTO", "--point", "9,9", "--font", "FILE", "--overlay", "OUT"),
        ("plan", "--device", "h100", "--model", "FILE"),
        ("export", "--config", "FILE", "--checkpoint", "FILE", "-o", "OUT"),
        ("export", "--model", "tap_vit_b", "--checkpoint", "FILE", "-o", "OUT"),
        ("export", "--model", "tap_demo", "-o", "FILE"),
    ],
    ids=lambda command: " ".join((command[0], *(w for w in command if w.startswith("--")))),
)
def test_an_option_with_what_is_no_file(copy, photo, tmp_path, kind, command):
    SPECIAL[kind](tmp_path / "special")
    places = {
        "BUNDLE": copy,
        "PHOTO": photo,
        "FILE": tmp_path / "special",
        "OUT": tmp_path / "out.png",
    }
    with patience():
        result = invoke(*(places.get(word, word) for word in command))
    assert law_broken(result) is None
    assert result.exit_code == 2 and ("special" in result.stderr or kind == "folder")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "read",
    [
        Tokenizer,
        Vocabulary.load,
        font_from_path,
        load_report,
        load_tables,
        Exclusions.load,
        CalibrationPrompts.from_file,
        PlanRecord.read,
        read_checkpoint,
    ],
    ids=lambda read: getattr(read, "__qualname__", None),
)
def test_readers_of_what_is_no_file(tmp_path, kind, read):
    SPECIAL[kind](tmp_path / "special.npz")
    with patience(), pytest.raises(TapError, match=r"special\.npz"):
        read(tmp_path / "special.npz")


@pytest.mark.parametrize("kind", ["endless device", "empty device"])
def test_a_picture_that_is_a_device(copy, tmp_path, kind):
    SPECIAL[kind](tmp_path / "a.png")
    with patience():
        refused(invoke("run", copy, tmp_path / "a.png", "--point", "1,1"), "a.png")


def test_pipes_in_folders_of_pictures_are_passed_over(copy, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    os.mkfifo(folder / "a.png")
    with patience():
        refused(invoke("run", copy, folder, "--point", "1,1"), "contains no pictures")


def test_a_device_is_not_opened(tmp_path, monkeypatch):
    """Opening some devices has an effect: a watchdog restarts the machine."""
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(OSError, match="expected a regular file"):
        open_regular(tmp_path / "device")


def test_a_file_that_becomes_a_pipe(tmp_path, fifo, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    plain = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda _: plain)
    with patience(), pytest.raises(OSError, match="expected a regular file"):
        open_regular(fifo)


def test_a_key_that_is_twice_among_many_is_found_in_time():
    """Comparing each key with all others took hours."""
    text = json.dumps({str(number): 0 for number in range(300_000)})[:-1] + ', "299999": 0}'
    with patience(), pytest.raises(ValueError, match="an object holds '299999' twice"):
        parse_json(text)


def test_the_limit_of_a_json_file(tmp_path):
    (tmp_path / "file").write_text("[1, 2]", "utf-8")
    assert read_json(tmp_path / "file", 6) == [1, 2]
    with pytest.raises(OSError, match="at most 5"):
        read_json(tmp_path / "file", 5)


def test_sizes_are_known_before_reading(copy, photo, tmp_path):
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(TEXT_BYTES + 1)  # takes no space on the disk
    refused(invoke("run", copy, photo, "--sketch", large), f"it has {TEXT_BYTES + 1} bytes")
    refused(invoke("plan", "--device", "h100", "--model", large), "bytes; expected at most")
    with pytest.raises(OSError, match="at most 3"):
        read_bytes("/proc/self/status", 3)  # of which the system says that it is empty


# --- archives that unpack to more than a memory holds ---


def zeros(count):
    return bytes(count)


def test_an_archive_that_unpacks_to_gigabytes(copy, photo, tmp_path):
    """Less than 200 kB of file, a header and 192 MB of zeros; 19 MB made 4 GB."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("weights.npy", "w", force_zip64=True) as member:
            member.write(npy_header("<f4", (64, 1 << 19)))
            for _ in range(1 << 3):
                member.write(zeros(1 << 24))
        archive.writestr("names.npy", npy_header("<U32", (1 << 19,)) + zeros(1 << 26))
    assert path.stat().st_size < 2e5
    refused(invoke("run", copy, photo, "--point", "9,9", "--concepts", path), "unpack to")


@pytest.mark.parametrize(
    ("descr", "shape", "data"),
    [
        ("<f4", (1 << 20, 1 << 20), b""),
        ("<f4", (64, 1 << 40), zeros(64)),
        ("<f4", (-1, 4), zeros(16)),
        ("<U0", (1 << 60,), b""),
        ("|O", (1,), b"cos\nsystem\n"),
        ("<f4", (2, 2), zeros(17)),
        ("|V4294967296", (1,), b""),
    ],
)
def test_an_array_whose_header_lies(tmp_path, descr, shape, data):
    lying = npy_header(descr, shape) + data
    good = npy_header("<f4", (2, 2)) + np.ones(4, "<f4").tobytes()
    names = npy_header("<U1", (2,)) + "ab".encode("utf-32-le")
    for weights, labels in ((lying, names), (good, lying)):
        path = npz_of(tmp_path / "lying.npz", weights=weights, names=labels)
        with patience(), pytest.raises(InputError, match=r"cannot be read|names"):
            Vocabulary.load(path)
    npz_of(path, weights=good, names=names)
    assert Vocabulary.load(path).names == ("a", "b")


def test_more_names_than_weights_make_no_list(tmp_path):
    names = npy_header("<U1", (1 << 23,)) + zeros(1 << 25)
    weights = npy_header("<f4", (2, 2)) + np.ones(4, "<f4").tobytes()
    path = npz_of(tmp_path / "names.npz", weights=weights, names=names)
    with pytest.raises(InputError, match="8388608 names for weights"):
        Vocabulary.load(path)


def test_records_of_a_torch_file_that_overlap(tmp_path):
    """Each record is read for its checksum: many over the same bytes take hours."""
    path = tmp_path / "overlap.pth"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start, entries = archive.start_dir, archive.infolist()
    entry = content[start:].split(b"PK\x01\x02")[1 + len(entries) // 2]
    directory = (b"PK\x01\x02" + entry) * 2000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2000, 2000, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + end)
    with patience(), pytest.raises(CheckpointError, match="not a complete torch file"):
        read_checkpoint(path)


@pytest.mark.parametrize("length", [1 << 62, 1 << 30, 100_000_001])
def test_a_safetensors_header_without_end(tmp_path, length):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a"')
    with patience(), pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_checkpoint(path)


def test_sizes_of_a_config_are_bounded_and_the_published_ones_fit():
    from tap_deploy.config import MAX_SIZES, VARIANTS, TapConfig

    fields = set(TapConfig().to_dict())
    assert set(MAX_SIZES) == fields
    for config in VARIANTS.values():
        assert all(2 * size <= MAX_SIZES[name] for name, size in config.to_dict().items())
    for name in fields:
        with pytest.raises(InputError, match=f"{name} is .*at most"):
            TapConfig(**{name: 1 << 62})
    assert json.dumps(TapConfig().to_dict())
