"""A full disk: one line, what was there is as it was, and nothing is left behind.

``test_bundle_update.py`` lets every single call of the system fail, which needs no disk.
"""

from __future__ import annotations

import shutil

import pytest

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.plans import all_records, save_plan
from tap_deploy.cli import samples as samples_module
from tap_deploy.errors import InputError
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import atomic_file, atomic_folder
from tests.commands import invoke, refused
from tests.small_disk import needs_mount, room_left, small_disk
from tests.test_bundle_update import add_fp16, digests
from tests.test_plans import PLAN, record

pytestmark = needs_mount

PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 24 << 20) as folder:
        yield folder


@pytest.fixture
def full_bundle(micro_bundle, disk):
    """A bundle on the disk, with fp16 graphs that are no more than some bytes."""
    bundle = Bundle.open(shutil.copytree(micro_bundle.path, disk / "bundle"))
    add_fp16(bundle, b"old" * PAGE)
    return bundle


def test_an_addition_fits_or_changes_nothing(full_bundle, disk):
    """There may be room for its graphs, or some of them, but not for the manifest."""
    before, fitted = digests(full_bundle.path), []
    for pages in range(0, 64, 2):
        with room_left(disk, pages * PAGE):
            try:
                add_fp16(full_bundle, b"new" * PAGE)
            except InputError as exc:
                assert str(exc).startswith(f"cannot write {full_bundle.path}")
                assert "No space left on device" in str(exc)
                assert digests(full_bundle.path) == before
                Bundle.open(full_bundle.path)
            else:
                fitted.append(pages)
                add = digests(full_bundle.path)
                assert add.keys() == before.keys() and add != before
                break
    assert fitted and fitted[0] > 9  # three graphs of three pages, and the manifests


def test_convert(micro_bundle, disk):
    pytest.importorskip("onnx_ir")
    bundle = shutil.copytree(micro_bundle.path, disk / "bundle")
    before = digests(bundle)
    for size in (8 * PAGE, 500_000):
        with room_left(disk, size):
            result = invoke("convert", bundle, "--precision", "fp16")
        refused(result, "No space left on device")
        assert digests(bundle) == before


def test_a_folder_that_is_replaced(disk):
    folder = disk / "folder"
    with atomic_folder(folder, marker="marker") as partial:
        (partial / "marker").write_bytes(b"old")
    with room_left(disk, 2 * PAGE):
        for existing in (True, False):
            target = folder if existing else disk / "a" / "new"
            with (
                pytest.raises(InputError, match="No space left on device"),
                atomic_folder(target, force=existing, marker="marker") as partial,
            ):
                (partial / "marker").write_bytes(b"new" * PAGE)
    assert {str(path): digest is None for path, digest in digests(disk).items()} == {
        "folder": True,
        "folder/marker": False,
    }
    assert (folder / "marker").read_bytes() == b"old"


def test_an_engine(full_bundle, disk):
    """The folder of the first one goes again; an engine that is there stays."""
    before = digests(full_bundle.path)
    saved = record(full_bundle)
    with room_left(disk, PAGE), pytest.raises(InputError, match="No space left on device"):
        save_plan(full_bundle, PLAN * PAGE, saved)
    assert digests(full_bundle.path) == before
    save_plan(full_bundle, PLAN, saved)
    before = digests(full_bundle.path)
    with room_left(disk, 2 * PAGE), pytest.raises(InputError, match="No space left on device"):
        save_plan(full_bundle, PLAN * PAGE, saved)
    assert digests(full_bundle.path) == before
    assert [found for _, found in all_records(full_bundle)] == [saved]


def test_results_of_pictures(micro_bundle, disk, pictures):
    with room_left(disk, 0):
        result = invoke(
            "run", micro_bundle.path, pictures, "--point", "9,9", "-o", disk / "a" / "b"
        )
    refused(result, "No space left on device")
    assert list(disk.iterdir()) == []


def test_overlays_of_samples(micro_bundle, disk, monkeypatch):
    monkeypatch.setattr(samples_module, "sample_answers", lambda sample, regions: [])
    with room_left(disk, 0), pytest.raises(InputError, match="No space left on device"):
        samples_module.answers_to_samples(str(micro_bundle.path), RunOn(), disk / "a" / "b")
    assert list(disk.iterdir()) == []


@pytest.fixture
def one_thread():
    """More threads slow such small models down, most of all on a busy machine."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training(disk, one_thread):
    from training_standin import TINY, StandInScenes, vocabulary

    from tap_deploy.training.run.run import RunOptions, train
    from tap_deploy.training.run.run_folder import RunFolder
    from tap_deploy.training.words.caption_tokenizer import train_tokenizer

    texts = [item.caption for seed in range(100) for item in StandInScenes().scene(seed).objects]
    begun = TINY, vocabulary(), train_tokenizer(texts, TINY.model.vocab_size)
    folder = RunFolder(path=disk / "a" / "run")
    with room_left(disk, 0), pytest.raises(InputError, match="No space left on device"):
        folder.begin(*begun)
    assert list(disk.iterdir()) == []
    folder.begin(*begun)
    before = digests(folder.path)
    for pages in (8, 100):
        with room_left(disk, pages * PAGE), pytest.raises(InputError) as refusal:
            train(
                folder,
                StandInScenes(),
                StandInScenes(1),
                RunOptions(workers=0, report_every=1, held_out_regions=2, minutes=0),
                say=print,
            )
        assert "No space left on device" in str(refusal.value)
        assert digests(folder.path) == before


def test_a_file(disk):
    full = pytest.raises(InputError, match="No space left on device")
    with room_left(disk, 0), full, atomic_file(disk / "file") as partial:
        partial.write_bytes(b"some")
    assert list(disk.iterdir()) == []
