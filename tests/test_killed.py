"""Processes that are killed at random moments; ``scripts/soak kills`` does it to all commands."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tap_deploy.storage import unfinished
from tap_deploy.storage.files import atomic_file, atomic_folder
from tap_deploy.storage.folder_lock import LOCK_NAME
from tap_deploy.storage.unfinished import (
    OLD_SUFFIX,
    remove_abandoned,
    temporary_folder,
    unfinished_path,
)

# Forks processes that add variants and replace a folder, and kills each; forking from pytest would
# copy its threads. Prints how many were killed in the middle.
PROGRAM = """
import os, pathlib, random, signal, sys, time
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.storage.files import atomic_folder
from tap_deploy.storage.folder_lock import LOCK_NAME
from tap_deploy.storage.unfinished import remove_abandoned
from tests.test_bundle_update import add_fp16, digests

bundle, folder = Bundle.open(sys.argv[1]), pathlib.Path(sys.argv[2])
random.seed(0)

def change(content):
    add_fp16(Bundle.open(bundle.path, check_hashes=False), content)
    with atomic_folder(folder, force=True, marker="0") as partial:
        for name in "0123":
            (partial / name).write_bytes(content)

started = time.monotonic()
change(b"first")
longest, killed, half = 2 * (time.monotonic() - started), 0, 0
for turn in range(30):
    content = str(turn).encode() * 1000
    child = os.fork()
    if child == 0:
        change(content)
        os._exit(0)
    time.sleep(random.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] != 0
    opened = Bundle.open(bundle.path)  # whole, or without the variant
    if "fp16" in opened.manifest.graphs:
        records = opened.manifest.graphs["fp16"].values()
        found = {(bundle.path / record.file).read_bytes() for record in records}
        assert len(found) == 1, "graphs of two changes"
    else:
        half += 1
    assert len({(folder / name).read_bytes() for name in "0123"}) == 1
change(b"last")
remove_abandoned(bundle.path)
remove_abandoned(folder.parent)
expected = {*map(pathlib.Path, bundle.manifest.files), pathlib.Path("manifest.json")}
found = {name for name, digest in digests(bundle.path).items() if digest}
assert found - expected == {pathlib.Path(record.file) for record in records}, found
assert sorted(os.listdir(folder.parent)) == sorted([folder.name, bundle.path.name])
print(killed, half)
"""


def test_changes_that_are_killed(bundle, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(bundle.path), str(tmp_path / "folder")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    killed, _ = map(int, result.stdout.split())
    assert killed >= 8


def abandoned(folder, code):
    """Let a process be killed in the middle of what it writes."""
    program = (
        "import os, pathlib, sys\n"
        "from tap_deploy.storage.files import *\n"
        "from tap_deploy.storage.unfinished import *\n"
        f"folder = pathlib.Path(sys.argv[1])\nwith {code} as partial:\n    os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", program, str(folder)]
    assert subprocess.run(command, env=environment).returncode == -9
    assert len(os.listdir(folder)) == 2


@pytest.mark.parametrize(
    "code",
    ["atomic_file(folder / 'x')", "atomic_folder(folder / 'x', marker='m')", "temporary_folder()"],
)
def test_what_a_killed_process_leaves_is_removed(tmp_path, code):
    abandoned(tmp_path, code)
    with atomic_file(tmp_path / "another"):
        pass
    assert os.listdir(tmp_path) == ["another"]


def test_temporary_folders_too(tmp_path, monkeypatch):
    abandoned(tmp_path, "temporary_folder()")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert sorted(os.listdir(tmp_path)) == [folder.name, f"{folder.name}.lock"]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path) == []


def test_what_somebody_holds_stays(tmp_path):
    """The holder may be in this process, or in another container: nothing depends on its number."""
    with atomic_folder(tmp_path / "held", marker="x") as held:
        (held / "x").touch()
        remove_abandoned(tmp_path)
        assert (held / "x").exists()
    assert os.listdir(tmp_path) == ["held"]


def test_what_cannot_be_removed_is_left_to_the_next_process(tmp_path, monkeypatch):
    """A child of the process may still write there."""
    for suffix in ("", OLD_SUFFIX):
        with monkeypatch.context() as patched, unfinished_path(tmp_path, "x") as path:
            (tmp_path / "x").touch()
            path.with_name(path.name + suffix).mkdir()
            patched.setattr("shutil.rmtree", lambda *args, **options: None)
        left = ["x", path.name + suffix, f"{path.name}.lock"]
        assert sorted(os.listdir(tmp_path)) == sorted(left)
        remove_abandoned(tmp_path)
        assert os.listdir(tmp_path) == ["x"]


def make_old(lock):
    yesterday = time.time() - 25 * 3600
    os.utime(lock, (yesterday, yesterday))


@pytest.mark.parametrize("made_on", ["another host", "a host without boot id", "this host"])
def test_what_another_host_made_stays_for_a_day(tmp_path, monkeypatch, made_on):
    """Its process may live: on some network file systems locks do not reach other hosts."""
    if made_on != "this host":
        monkeypatch.setattr(unfinished, "_boot_id", lambda: made_on.removeprefix("a host without"))
    lock = tmp_path / ".x.partial-12345678.lock"
    (tmp_path / ".x.partial-12345678").touch()
    with lock.open("wb") as file:
        unfinished._sign(file.fileno())
    monkeypatch.undo()
    remove_abandoned(tmp_path)
    assert lock.exists() == (made_on != "this host")
    if lock.exists():
        assert len(os.listdir(tmp_path)) == 2
        make_old(lock)
        remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == []


def test_without_a_boot_id_nothing_is_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "_boot_id", lambda: "")
    (tmp_path / ".x.partial-12345678.lock").touch()
    (tmp_path / ".x.partial-12345678").touch()
    remove_abandoned(tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_a_lock_of_a_process_that_was_killed_before_it_signed_is_removed(tmp_path):
    (tmp_path / ".x.partial-12345678.lock").touch()
    (tmp_path / ".y.partial-12345678.lock").touch()
    (tmp_path / f".y.partial-12345678{OLD_SUFFIX}").mkdir()  # signed in vain: the disk was full
    remove_abandoned(tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_with_a_long_name_is_not_lost(tmp_path):
    """The unfinished path holds only a part of its name, so it cannot be put back."""
    stem = f".{'a' * 200}.partial-12345678"
    (tmp_path / f"{stem}{OLD_SUFFIX}").mkdir()
    (tmp_path / f"{stem}{OLD_SUFFIX}" / "file").touch()
    (tmp_path / stem).mkdir()
    (tmp_path / f"{stem}.lock").touch()
    make_old(tmp_path / f"{stem}.lock")
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"{stem}.lock", f"{stem}{OLD_SUFFIX}"]
    assert (tmp_path / f"{stem}{OLD_SUFFIX}" / "file").exists()


@pytest.mark.parametrize("name", ["x", "a" * 220])
def test_a_folder_is_put_back_at_once_if_its_process_lives(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), unfinished_path(tmp_path, name) as path:
        path.with_name(path.name + OLD_SUFFIX).mkdir()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == [name]


def test_what_is_not_ours_stays(tmp_path):
    names = {".x.partial-12345678", ".x.partial-123.lock", "x.lock", ".git.lock"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / ".link.partial-12345678.lock").touch()
    (tmp_path / ".link.partial-12345678").symlink_to(tmp_path / "precious")
    (tmp_path / ".other.partial-12345678.lock").symlink_to(tmp_path / "x.lock")
    make_old(tmp_path / ".link.partial-12345678.lock")
    remove_abandoned(tmp_path)
    left = {*names, "precious", ".other.partial-12345678.lock"}
    assert set(os.listdir(tmp_path)) == left


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path):
    """Where two folders cannot be exchanged, one is moved away before the other one comes."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    code = (
        "import os; from tap_deploy.storage import files\n"
        "files._exchange = lambda a, b: False\n"
        "rename, calls = os.rename, []\n"
        "def killed(a, b):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "    rename(a, b)\n"
        "os.rename = killed\n"
        "with files.atomic_folder('target', force=True, marker='old') as folder:\n"
        "    (folder / 'new').touch()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -9
    assert not (tmp_path / "target").exists()
    with atomic_file(tmp_path / "another"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["another", "target"]
    # The lock of a folder stays until the next process has held it.
    assert set(os.listdir(tmp_path / "target")) == {"old", LOCK_NAME}


def test_a_lock_that_is_removed_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            remove_lock = next(tmp_path.glob(".*.lock"))
            remove_lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with unfinished_path(tmp_path, "x") as path:
        assert len(calls) == 2
        assert os.listdir(tmp_path) == [f"{path.name}.lock"]
    assert os.listdir(tmp_path) == []


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    (tmp_path / ".x.partial-12345678.lock").touch()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with atomic_file(tmp_path / "file"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".x.partial-12345678.lock", "file"]


def test_long_names(tmp_path):
    for name in ("a" * 255, "ü" * 127, "猫" * 85):
        with atomic_file(tmp_path / name) as partial:
            partial.write_text(name, "utf-8")
        assert (tmp_path / name).read_text("utf-8") == name


def test_a_written_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """After a power cut the name stands for the old file or for the whole new one."""
    calls = []

    def recorded(name, real):
        def call(first, *rest):
            where = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else os.fspath(first)
            calls.append((name, pathlib.Path(where).name.partition(".partial-")[0]))
            return real(first, *rest)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("x", "utf-8")
    top = tmp_path.name
    assert calls == [("fsync", ".file"), ("replace", ".file"), ("fsync", top)]
    calls.clear()
    with atomic_folder(tmp_path / "folder", marker="m") as partial:
        (partial / "a").mkdir()
        (partial / "a" / "m").touch()
    assert calls == [
        ("fsync", "m"),
        ("fsync", "a"),
        ("fsync", ".folder"),
        ("rename", ".folder"),
        ("fsync", top),
    ]
    shutil.rmtree(tmp_path / "folder")
