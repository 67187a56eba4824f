"""Output folders that cannot be written: one line, and nothing left behind.

Root can write everywhere, so every case runs in a separate process that drops
its privileges first.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the users of POSIX")

NOBODY = 65534
PACKAGE = pathlib.Path(__file__).parent.parent

# Imports first: the user without rights may not be able to read the installed packages.
PROGRAM = """
import os, pathlib, sys
import tap_deploy.cli.export, tap_deploy.cli.run
from tap_deploy.cli import main
from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.storage.files import atomic_file, atomic_folder, check_folder_output
from tap_deploy.storage.folder_lock import locked_folder
import numpy as np
{imports}

vocabulary = Vocabulary(weights=np.ones((2, 1), np.float32), names=("cup",))
target = pathlib.Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({nobody})
    os.setuid({nobody})
assert not os.access(target.parent, os.W_OK), "the folder can be written after all"
try:
{body}
except InputError as exc:
    print(exc)
else:
    sys.exit("nothing was refused")
"""

BODIES = {
    "a check before the work": """
    check_folder_output(target, force=False, marker="manifest.json")
""",
    "a check before the work, deeper": """
    check_folder_output(target / "a" / "b", force=False, marker="manifest.json")
    """,
    "atomic_file": """
    with atomic_file(target) as partial:
        sys.exit("the body was entered")
""",
    "atomic_folder": """
    with atomic_folder(target, marker="manifest.json") as partial:
        sys.exit("the body was entered")
""",
    "atomic_folder with force": """
    with atomic_folder(target, force=True, marker="manifest.json") as partial:
        sys.exit("the body was entered")
""",
    "atomic_folder below": """
    with atomic_folder(target / "a" / "b", marker="manifest.json") as partial:
        sys.exit("the body was entered")
""",
    "locked_folder": """
    with locked_folder(target.parent), atomic_file(target) as partial:
        sys.exit("the body was entered")
""",
    "Vocabulary.save": """
    vocabulary.save(target.with_suffix(".npz"))
""",
}


@pytest.fixture
def locked():
    """A folder that nobody may write, in a place that everybody may reach (tmp_path is not)."""
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        top.chmod(0o755)
        folder = top / "locked"
        folder.mkdir()
        folder.chmod(0o555)
        yield folder
        assert list(folder.iterdir()) == []
        folder.chmod(0o755)


def run_without_rights(body, target, imports=""):
    program = PROGRAM.format(nobody=NOBODY, body=body, imports=imports)
    command = [sys.executable, "-c", program, str(target)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=PACKAGE, env=env, check=False
    )


@pytest.mark.parametrize("name", BODIES)
def test_a_folder_that_cannot_be_written_is_one_line(locked, name):
    result = run_without_rights(BODIES[name], locked / "output")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"cannot write {locked / 'output'}")
    assert line.endswith("choose a folder that can be written")
    assert "Permission denied" in line


def test_export_into_such_a_folder_is_one_line(locked, micro_config):
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    config = locked.parent / "config.json"
    config.write_text(json.dumps(micro_config.to_dict()), "utf-8")
    # torch imports more of itself when it makes the first model.
    imports = (
        "import tap_deploy.export.bundle_export\n"
        "from tap_deploy.config import TapConfig\n"
        "from tap_deploy.reference.state import meta_model\n"
        "meta_model(TapConfig())"
    )
    args = ["export", "--config", str(config), "--synthetic-weights", "0", "-o"]
    result = run_without_rights(f"    main([*{args}, str(target)])", locked / "output", imports)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: cannot write {locked / 'output'}: Permission denied")


def test_an_overlay_in_such_a_folder_is_refused_before_the_work(locked):
    args = ["run", "no-bundle", "no-picture", "--point", "1,1", "--overlay"]
    result = run_without_rights(f"    main([*{args}, str(target)])", locked / "output.png")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: cannot write {locked / 'output.png'}")
