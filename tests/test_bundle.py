"""Opening bundles: complete ones open, all others are rejected with the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial

import pytest

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import SCHEMA_VERSION
from tap_deploy.config import Preprocessing
from tap_deploy.errors import BundleError, InputError
from tap_deploy.storage.files import atomic_file, atomic_folder, sha256_of_file

ENCODER = "onnx/fp32/image_encoder.onnx"


@pytest.fixture
def copy(micro_bundle, tmp_path):
    return shutil.copytree(micro_bundle.path, tmp_path / "bundle")


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_manifest_says_everything(micro_bundle, micro_config):
    manifest = json.loads((micro_bundle.path / "manifest.json").read_text("utf-8"))
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert manifest["config"] == micro_config.to_dict()
    assert manifest["preprocessing"] == Preprocessing().to_dict()
    assert manifest["preprocessing"]["color_order"] == "BGR"
    assert manifest["preprocessing"]["point_labels"]["box_left_top"] == 2
    assert manifest["verification"]["passed"] is True
    assert len(manifest["verification"]["checks"]) == 72
    assert {"torch", "onnx", "onnxruntime", "tap-deploy"} <= set(manifest["tools"])
    graph = manifest["graphs"]["fp32"]["text_decoder"]
    assert graph["inputs"][4] == "past_key_values.0.key float32 [P, 2, T, 64]"


def test_every_file_is_listed_with_its_hash(micro_bundle):
    found = {
        path.relative_to(micro_bundle.path).as_posix()
        for path in micro_bundle.path.rglob("*")
        if path.is_file()
    }
    listed = micro_bundle.manifest.files
    assert set(listed) == found - {"manifest.json"}
    for name, record in listed.items():
        assert record.sha256 == sha256_of_file(micro_bundle.path / name)


def test_whole_bundle_opens(copy):
    bundle = Bundle.open(copy)
    assert bundle.vocabulary() is not None
    assert bundle.tokenizer() is not None
    assert bundle.variant("fp32").path("image_encoder") == copy / ENCODER


def test_changed_byte(copy):
    file = copy / ENCODER
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{ENCODER} was changed: SHA-256"):
        Bundle.open(copy)
    Bundle.open(copy, check_hashes=False)


def test_truncated_file(copy):
    os.truncate(copy / ENCODER, 1000)
    with pytest.raises(BundleError, match=rf"{ENCODER} has 1000 bytes, expected"):
        Bundle.open(copy, check_hashes=False)


def test_missing_file(copy):
    (copy / "tokenizer.model").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.model is missing"):
        Bundle.open(copy)


@pytest.mark.parametrize("version", [0, 1, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, "1", None])
def test_other_schema(copy, version):
    edit_manifest(copy, schema_version=version)
    expected = f"has schema version {version}; this program reads {SCHEMA_VERSION}"
    with pytest.raises(BundleError, match=expected):
        Bundle.open(copy)


def test_an_older_bundle_comes_with_the_command_that_makes_it_anew(copy):
    edit_manifest(copy, schema_version=1, model="tap_vit_b")
    command = (
        f"tap-export export --model tap_vit_b --checkpoint tap_micro.pkl --concepts "
        f"{copy}/concepts.npz --tokenizer {copy}/tokenizer.model -o {copy}-{SCHEMA_VERSION}"
    )
    with pytest.raises(BundleError, match=re.escape(command)):
        Bundle.open(copy)
    edit_manifest(copy, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(BundleError, match="install a newer release"):
        Bundle.open(copy)


def test_malformed_manifests(copy):
    edit_manifest(copy, config={"image_size": 512})
    with pytest.raises(BundleError, match="malformed: config fields: unknown none, missing"):
        Bundle.open(copy)
    edit_manifest(copy, surprise=1)
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(copy)
    (copy / "manifest.json").write_text("[1, 2", "utf-8")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        Bundle.open(copy)
    (copy / "manifest.json").write_text("[1, 2]", "utf-8")
    with pytest.raises(BundleError, match="schema version None"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"verification": None},
        {"tools": {"torch": 2}},
        {"model": 7},
        {"checkpoint": {"file": "x"}},
        {"checkpoint": "x"},
        {"graphs": []},
        {"graphs": {"fp32": {"image_encoder": {"file": 3}}}},
        {"files": {"tokenizer.model": {"size_bytes": "9", "sha256": "0"}}},
        {"files": {"tokenizer.model": {"size_bytes": True, "sha256": "0"}}},
    ],
)
def test_values_of_wrong_types(copy, changes):
    edit_manifest(copy, **changes)
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(copy)


def test_deep_manifest(copy):
    (copy / "manifest.json").write_text("[" * 100_000, "utf-8")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        Bundle.open(copy)


def test_rules_may_be_worded_anew(copy):
    contract = Preprocessing().to_dict() | {"resize": "the same in other words"}
    edit_manifest(copy, preprocessing=contract)
    Bundle.open(copy)


def test_unreadable_names(copy):
    edit_manifest(copy, files={"x" * 300: {"size_bytes": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match="not a valid file name"):
        Bundle.open(copy)


def test_external_data_must_be_listed(copy):
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["graphs"]["fp32"]["image_encoder"]["external_data"] = True
    edit_manifest(copy, graphs=manifest["graphs"])
    with pytest.raises(BundleError, match=r"does not list onnx/fp32/image_encoder\.onnx\.data"):
        Bundle.open(copy).variant("fp32")


def test_a_variant_has_the_files_of_its_graphs(copy):
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    weights = copy / f"{ENCODER}.data"
    weights.write_bytes(b"weights")
    digest = sha256_of_file(weights)
    manifest["graphs"]["fp32"]["image_encoder"]["external_data"] = True
    manifest["files"][f"{ENCODER}.data"] = {"size_bytes": 7, "sha256": digest}
    edit_manifest(copy, graphs=manifest["graphs"], files=manifest["files"])
    fp32 = Bundle.open(copy).variant("fp32")
    assert fp32.files("image_encoder") == (copy / ENCODER, weights)
    assert fp32.digests("image_encoder") == (sha256_of_file(copy / ENCODER), digest)
    assert fp32.size_bytes("image_encoder") == (copy / ENCODER).stat().st_size + 7
    assert fp32.files("text_decoder") == (copy / "onnx/fp32/text_decoder.onnx",)


def test_a_variant_has_all_graphs(copy):
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    del manifest["graphs"]["fp32"]["text_decoder"]
    edit_manifest(copy, graphs=manifest["graphs"])
    with pytest.raises(BundleError, match="lists no fp32 text_decoder; export it again"):
        Bundle.open(copy).variant("fp32")


def test_a_parsed_graph_belongs_to_the_caller(micro_bundle):
    pytest.importorskip("onnx_ir")
    fp32 = micro_bundle.variant("fp32")
    fp32.load("text_decoder").graph.initializers.clear()
    assert fp32.load("text_decoder").graph.initializers


def test_messages_are_one_line(tmp_path):
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "two\nlines")
    assert "two lines" in str(caught.value)


def test_foreign_preprocessing_is_refused(copy):
    contract = Preprocessing().to_dict() | {"color_order": "RGB"}
    edit_manifest(copy, preprocessing=contract)
    with pytest.raises(BundleError, match="preprocessing differs"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passed": False}, "did not pass its verification"),
        ({"passed": "yes"}, "passed is 'yes'"),
        ({"passed": None}, "passed is 'None'"),
        ({"checks": True}, "checks is 'True'"),
        ({"checks": [1]}, "got '1' where an object is expected"),
        ({"surprise": 1}, "unknown field 'surprise'"),
    ],
)
def test_unverified_bundle_is_refused(copy, changes, message):
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    edit_manifest(copy, verification=manifest["verification"] | changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "onnx/../../secret"])
def test_files_outside_are_refused(copy, name):
    edit_manifest(copy, files={name: {"size_bytes": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(copy)


def test_unlisted_graph_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    del manifest["files"][ENCODER]
    edit_manifest(copy, files=manifest["files"])
    with pytest.raises(BundleError, match=r"does not list onnx/fp32/image_encoder\.onnx"):
        Bundle.open(copy).variant("fp32")


def test_absent_precision(micro_bundle):
    with pytest.raises(BundleError, match=r"has no precision 'int8'; it has fp32"):
        micro_bundle.variant("int8")


def test_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: manifest\.json is missing"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nowhere")


def write_bundle(folder, content):
    (folder / "manifest.json").write_text(content, "utf-8")


def content(folder):
    return (folder / "manifest.json").read_text("utf-8")


def replaced(target, new, fail=None):
    with atomic_folder(target, force=True, marker="manifest.json") as folder:
        write_bundle(folder, new)
        if fail is not None:
            raise fail


@pytest.fixture
def target(tmp_path):
    with atomic_folder(tmp_path / "out", marker="manifest.json") as folder:
        write_bundle(folder, "old")
        assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def only(target):
    """Assert that no hidden files are left next to the target."""
    return [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("fail", [RuntimeError(), KeyboardInterrupt()])
def test_a_failed_replacement_leaves_the_old_one(target, fail):
    with pytest.raises(type(fail)):
        replaced(target, "new", fail)
    assert content(target) == "old"
    assert only(target)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_move_brings_the_old_one_back(target, monkeypatch, error):
    """If two names cannot be swapped atomically, the second of two moves may fail."""
    rename, moves = os.rename, []

    def failing_rename(source, destination):
        moves.append(source)
        if len(moves) == 2:
            raise error
        rename(source, destination)

    monkeypatch.setattr("tap_deploy.storage.files._exchange", lambda a, b: False)
    monkeypatch.setattr("tap_deploy.storage.files.os.rename", failing_rename)
    with pytest.raises((InputError, KeyboardInterrupt)):
        replaced(target, "new")
    assert len(moves) == 3
    assert content(target) == "old"
    assert only(target)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_signal_right_after_a_move_loses_nothing(target, monkeypatch, calls):
    rename, moves = os.rename, []

    def interrupted(source, destination):
        rename(source, destination)
        moves.append(source)
        if len(moves) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr("tap_deploy.storage.files._exchange", lambda a, b: False)
    monkeypatch.setattr("tap_deploy.storage.files.os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replaced(target, "new")
    assert content(target) == {1: "old", 2: "new"}[calls]
    assert only(target)


def test_the_result_of_a_rejected_load_is_closed(copy):
    bundle, made = Bundle.open(copy), []
    name = "tokenizer.model"

    class Loaded:
        is_closed = False

        def close(self):
            self.is_closed = True

    def load():
        made.append(Loaded())
        if len(made) == 1:
            shutil.copy(copy / name, copy / "again")
            os.replace(copy / "again", copy / name)
        return made[-1]

    assert bundle.loaded((name,), load) is made[1]
    assert [each.is_closed for each in made] == [True, False]

    def spoil():
        (copy / name).write_bytes(b"another")
        made.append(Loaded())
        return made[-1]

    with pytest.raises(BundleError, match="has 7 bytes"):
        bundle.loaded((name,), spoil)
    assert made[-1].is_closed


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_when_complete(target, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("tap_deploy.storage.files._exchange", lambda a, b: False)
    replaced(target, "new")
    assert content(target) == "new"
    assert only(target)


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out"
    expected = pytest.raises(InputError, match="cannot write")
    with expected, atomic_folder(target, marker="manifest.json") as folder:
        write_bundle(folder, "new")
        target.mkdir()
        (target / "precious").write_text("1", "utf-8")
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert only(target)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_replaces_nothing_but_bundles(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("precious", "utf-8")
    else:
        target.mkdir()
        (target / "precious").write_text("1", "utf-8")
    with pytest.raises(InputError, match=r"is not a folder with manifest\.json"):
        replaced(target, "new")
    assert target.exists()


def test_force_takes_an_empty_folder_and_follows_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replaced(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


def test_atomic_file_keeps_the_old_one_on_error(tmp_path):
    target = tmp_path / "file"
    target.write_text("old", "utf-8")
    with pytest.raises(RuntimeError), atomic_file(target) as part:
        part.write_text("new", "utf-8")
        raise RuntimeError
    assert target.read_text("utf-8") == "old"
    with atomic_file(target) as part:
        part.write_text("new", "utf-8")
    assert target.read_text("utf-8") == "new"
    assert target.stat().st_mode & 0o044
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", [atomic_file, partial(atomic_folder, marker="m")])
def test_unwritable_output(tmp_path, writer):
    """A file in place of a folder stops even root."""
    (tmp_path / "file").write_text("", "utf-8")
    expected = pytest.raises(InputError, match=r"cannot write .*; choose a folder")
    with expected, writer(tmp_path / "file" / "out"):
        pass
