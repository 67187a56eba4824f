"""The lock of a folder, between real processes, which hand over through pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from tap_deploy.errors import InputError
from tap_deploy.storage import folder_lock
from tap_deploy.storage.files import atomic_folder
from tap_deploy.storage.folder_lock import locked_folder

fcntl = pytest.importorskip("fcntl")

# Takes the lock, prints a line, and then obeys the command that it reads.
HOLDER = """
import os, pathlib, sys
from tap_deploy.storage.folder_lock import locked_folder
with locked_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    exec(sys.stdin.readline())
print("free", flush=True)
"""


@contextlib.contextmanager
def holder(folder, *words):
    command = [sys.executable, "-c", HOLDER, str(folder), *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
            with contextlib.suppress(OSError):  # a line that the process no longer reads
                process.stdin.close()


def end(process, line="pass"):
    """End a holder, which may have ended already."""
    with contextlib.suppress(OSError):
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "QUIET_SECONDS", 0.1)


def test_nothing_is_left(tmp_path):
    with locked_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".tap_deploy.lock"]
    assert list(tmp_path.iterdir()) == []


def test_who_holds_it_is_told_and_then_named_in_the_error(tmp_path, impatient, caplog):
    with holder(tmp_path, "a bundle") as other:
        with pytest.raises(InputError) as caught, locked_folder(tmp_path):
            pytest.fail("two processes hold it")
        host = os.uname().nodename
        who = rf"process {other.pid} on {host} since 2\d\d\d-\S+T\S+ \(-c {tmp_path}\)"
        caught.match(f"^{tmp_path} has been held by {who} for more than 0 s; wait until that")
        (line,) = caplog.messages
        assert line.startswith(f"waiting for {tmp_path}, which is being changed by process")
        end(other)
        assert other.stdout.readline() == "free\n"
    with locked_folder(tmp_path):
        pass


def test_the_next_one_gets_it_when_the_first_is_done(tmp_path, monkeypatch):
    with holder(tmp_path) as other:
        # The first wait is where the other one is let go: it was held until then.
        monkeypatch.setattr(folder_lock.time, "sleep", lambda seconds: end(other))
        with locked_folder(tmp_path):
            assert other.stdout.readline() == "free\n"
            assert os.listdir(tmp_path) == [".tap_deploy.lock"]
    assert os.listdir(tmp_path) == []


def test_a_holder_that_is_killed_leaves_no_lock(tmp_path, impatient):
    with holder(tmp_path) as other:
        other.kill()
        other.wait()
    assert os.listdir(tmp_path) == [".tap_deploy.lock"]  # the file stays, but does not block anyone
    with locked_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_threads_and_bodies_that_raise(tmp_path, impatient):
    with pytest.raises(RuntimeError), locked_folder(tmp_path):
        with pytest.raises(InputError, match=f"held by process {os.getpid()}"):
            locked_folder(tmp_path).__enter__()
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_not_replaced_while_it_is_changed(tmp_path, impatient, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("tap_deploy.storage.files._exchange", lambda a, b: False)
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "marker").touch()
    with holder(target) as other:
        with pytest.raises(InputError, match="has been held by process"):
            replace(target)
        assert sorted(os.listdir(target)) == [".tap_deploy.lock", "marker"]
        end(other)
        assert other.stdout.readline() == "free\n"
    replace(target)
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["bundle"]


def replace(target):
    with atomic_folder(target, force=True, marker="marker") as folder:
        (folder / "new").touch()


def require_locked(folder):
    """Let another process try."""
    program = (
        "import pathlib, sys; from tap_deploy.storage import folder_lock\n"
        "folder_lock.WAIT_SECONDS = 0.0\n"
        "with folder_lock.locked_folder(pathlib.Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError" in result.stderr, result.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, caplog, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for name in ("first", "second"):
        with locked_folder(tmp_path):
            (tmp_path / name).touch()
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path} cannot be locked ([Errno {number}] {os.strerror(number)})")


def test_a_system_without_fcntl(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked_folder(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path, caplog):
    with locked_folder(tmp_path / "nowhere"):
        pass
    assert caplog.messages == []


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path, monkeypatch):
    """The previous holder removes the file after it is opened and before it is locked."""
    flock, calls = fcntl.flock, []

    def late(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".tap_deploy.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked_folder(tmp_path):
        assert len(calls) == 2
        require_locked(tmp_path)


def test_the_lock_of_a_folder_that_took_the_place_is_left_alone(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    with locked_folder(target):
        target.rename(tmp_path / "old")
        target.mkdir()
        (target / ".tap_deploy.lock").touch()
    assert os.listdir(target) == [".tap_deploy.lock"]


def test_what_others_keep_in_a_folder_is_left_alone(tmp_path):
    (tmp_path / ".lock").write_text("of another program", "utf-8")
    with locked_folder(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text("utf-8") == "of another program"


def test_waiting_in_vain_leaves_no_file_open(tmp_path, impatient):
    with holder(tmp_path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(InputError, match="has been held by"), locked_folder(tmp_path):
                pass
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_holder_does_not_tell_its_whole_command_line(tmp_path, impatient):
    with (
        holder(tmp_path, "--token", "secret"),
        pytest.raises(InputError) as refused,
        locked_folder(tmp_path),
    ):
        pass
    assert "secret" not in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_another_user_waits_too(impatient):
    """A user without write permission for the lock file can still hold the lock."""
    program = """
import fcntl, os, pathlib, sys
from tap_deploy.storage import folder_lock
from tap_deploy.errors import InputError
os.setgroups([]); os.setgid(65534); os.setuid(65534)
folder_lock.WAIT_SECONDS = 0.3
try:
    with folder_lock.locked_folder(pathlib.Path(sys.argv[1])):
        print("in")
except InputError as exc:
    print("held by process" if "has been held by process" in str(exc) else exc)
"""
    with tempfile.TemporaryDirectory() as name:  # in reach of everybody, as tmp_path is not
        os.chmod(name, 0o777)
        command = [sys.executable, "-c", program, name]
        with holder(name):
            waiting = subprocess.run(command, capture_output=True, text=True)
        assert (waiting.stdout, waiting.stderr) == ("held by process\n", "")
        left = pathlib.Path(name, folder_lock.LOCK_NAME)  # as by a process that was killed
        left.touch(mode=0o644)
        later = subprocess.run(command, capture_output=True, text=True)
        assert (later.stdout, later.stderr) == ("in\n", "")
