"""Bundles on the hub: ``hf://`` addresses and ``tap-export push``."""

from __future__ import annotations

import json
import pathlib
import re
import shutil

import pytest
from click.testing import CliRunner

pytest.importorskip("huggingface_hub")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli import main
from tap_deploy.errors import InputError
from tap_deploy.hub_address import HubAddress, is_hub_address
from tests.conftest import digests
from tests.fake_hub import FakeHub, Repository
from tests.hub_runs import COMMAND, HubRuns

ADDRESS = "hf://someone/tap_micro"
PREDICT = """
import pathlib, sys
from tap_deploy import TapPredictor
for address in (sys.argv[1], pathlib.Path(sys.argv[1])):
    with TapPredictor.from_bundle(address) as predictor:
        print(predictor.predict(sys.argv[2], points=[[[9, 9, 1]]]).iou_predictions)
"""


@pytest.fixture
def runs(tmp_path):
    with FakeHub() as hub:
        yield HubRuns(hub, tmp_path / "hf")


@pytest.fixture
def stored(runs, micro_bundle):
    """The micro bundle on the hub, beside a file that has nothing to do with it."""
    root = micro_bundle.path
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    repository = runs.hub.repositories["someone/tap_micro"] = Repository()
    repository.commit({"README.md": b"# Mine", "large.bin": b"x" * 5000} | files)
    return repository


def cached(runs):
    return digests(runs.home / "hub" / "models--someone--tap_micro" / "snapshots")


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf://owner/name", "owner/name", None),
        ("hf:/owner/na.me-1_2@v1", "owner/na.me-1_2", "v1"),  # as pathlib writes it
        ("hf://owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
    ],
)
def test_addresses(text, repository, revision):
    address = HubAddress.parse(text)
    assert address == HubAddress(repository=repository, revision=revision)
    assert str(address) == text.replace("hf:/o", "hf://o")
    assert is_hub_address(text) and is_hub_address(pathlib.Path(text))


@pytest.mark.parametrize("text", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/b @x", "hf://"])
def test_what_is_no_address(text):
    with pytest.raises(InputError, match=r"expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        HubAddress.parse(text)


def test_the_address_of_a_snapshot(tmp_path):
    folder = tmp_path / "models--owner--a--b" / "snapshots" / "0123"
    assert str(HubAddress.of_snapshot(folder)) == "hf://owner/a--b@0123"
    (tmp_path / "link").symlink_to(folder)
    assert HubAddress.of_snapshot(tmp_path / "link") == HubAddress.of_snapshot(folder)
    assert HubAddress.of_snapshot(folder.parent) is None
    assert not is_hub_address("hf") and not is_hub_address("./hf:/a/b")


def test_a_predictor_from_the_hub(runs, stored, photo, micro_bundle):
    local = runs.python(PREDICT, micro_bundle.path, photo)
    found = runs.python(PREDICT, ADDRESS, photo)
    assert found.returncode == 0, found.stderr
    assert found.stdout == local.stdout
    assert all(path.is_symlink() for path in cached(runs))
    loaded = {path.name for path in cached(runs)}
    assert "manifest.json" in loaded and not loaded & {"README.md", "large.bin"}
    asked = len(runs.hub.requests)
    again = runs.python(PREDICT, ADDRESS, photo, HF_HUB_OFFLINE="1")
    assert again.stdout == local.stdout and len(runs.hub.requests) == asked


def test_a_local_bundle_needs_no_hub(micro_bundle, runs):
    code = (
        "import sys; from tap_deploy.bundle.bundle import Bundle; Bundle.open(sys.argv[1])\n"
        "print(*[name for name in sys.modules if 'hub' in name])"
    )
    assert runs.python(code, micro_bundle.path).stdout == "tap_deploy.hub_address\n"


def test_revisions(runs, stored):
    first = stored.branches["main"]
    stored.branches["v1"] = first
    manifest = json.loads(stored.commits[first]["manifest.json"])
    renamed = json.dumps(manifest | {"model": "renamed"}).encode()
    second = stored.commit({"manifest.json": renamed})
    for revision, model in (("@v1", "tap_micro"), ("", "renamed"), (f"@{first}", "tap_micro")):
        found = runs.run("inspect", ADDRESS + revision, "--json")
        assert json.loads(found)["model"] == model
    assert second in runs.run("fetch", ADDRESS, "--json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("inspect", f"{ADDRESS}@v9"),
            r"someone/tap_micro has no revision 'v9'; expected a branch",
        ),
        (
            ("inspect", "hf://someone/else"),
            r"shows no repository someone/else \(Invalid .*\): it does",
        ),
        (("inspect", "hf://someone"), r"'hf://someone' is not the address of a bundle"),
    ],
)
def test_what_is_not_there(runs, stored, words, message):
    assert re.search(message, runs.error(*words))


def test_a_repository_without_a_bundle(runs):
    runs.hub.repositories["someone/large"] = Repository()
    runs.hub.repositories["someone/large"].commit({"weights.bin": b"x" * 5000})
    line = runs.error("inspect", "hf://someone/large")
    assert line.startswith("someone/large has no manifest.json; it is not a bundle")
    assert not runs.hub.asked("GET")


def test_damaged_and_missing_files(runs, stored):
    main = stored.branches["main"]
    stored.commit({"tokenizer.model": stored.commits[main]["tokenizer.model"][:-1] + b"?"})
    assert "tokenizer.model was changed: SHA-256" in runs.error("inspect", ADDRESS)
    del stored.commits[stored.branches["main"]]["tokenizer.model"]
    stored.commit({})
    assert "tokenizer.model is missing" in runs.error("inspect", ADDRESS)


def test_a_manifest_that_leads_elsewhere(runs, stored, tmp_path):
    manifest = json.loads(stored.commits[stored.branches["main"]]["manifest.json"])
    manifest["files"]["../../out"] = {"size_bytes": 1, "sha256": "0" * 64}
    stored.commit({"manifest.json": json.dumps(manifest).encode()})
    assert "outside the bundle" in runs.error("inspect", ADDRESS)
    assert len(runs.hub.asked("GET")) == 1


def test_commands_that_read(runs, stored, photo):
    point = json.loads(runs.run("run", ADDRESS, photo, "--point", "9,9", "--json"))
    assert len(point["regions"]) == 1
    before = cached(runs)
    for command in ("verify", "selftest"):
        result = runs.command(command, ADDRESS)
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if "verdict" in line]
        assert line.startswith(f"warning: the verdict is not kept: {ADDRESS}@")
        assert line.endswith("-o DIR")
    assert cached(runs) == before


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "--precision", "fp16"),
        ("quantize", "--calibration-data", "photos"),
        ("build", "--backend", "tensorrt_rtx"),
        ("verdict", "--evaluation-data", "photos"),
    ],
    ids=lambda words: words[0],
)
def test_commands_that_write(runs, stored, words, tmp_path, photo):
    """They would change what the cache shows to every program."""
    (tmp_path / "photos").mkdir()
    shutil.copy(photo, tmp_path / "photos")
    bundle = json.loads(runs.run("fetch", ADDRESS, "--json"))["bundle"]
    before = cached(runs)
    for given in (ADDRESS, bundle) if words[0] == "convert" else (ADDRESS,):
        line = runs.error(words[0], given, *words[1:])
        commit = stored.branches["main"]
        assert line.startswith(f"{ADDRESS}@{commit} is a copy in the model hub's cache")
        assert line.endswith(f"tap-export fetch {ADDRESS}@{commit} -o DIR")
    assert cached(runs) == before


def test_a_copy_of_ones_own(runs, stored, tmp_path, micro_bundle):
    output = tmp_path / "copies" / "mine"
    assert runs.run("fetch", ADDRESS, "-o", output) == f"bundle      {output}\n"
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert {path.name for path in output.iterdir()} == {
        path.name for path in micro_bundle.path.iterdir()
    }
    assert Bundle.open(output).hub_address is None
    assert "already exists; pass --force" in runs.error("fetch", ADDRESS, "-o", output)
    runs.run("fetch", ADDRESS, "-o", output, "--force")


def test_the_hint_to_verify_can_be_followed(runs, stored, photo, tmp_path):
    result = runs.command(
        "run", ADDRESS, photo, "--point", "9,9", "--require-verified", XDG_CACHE_HOME="x"
    )
    if result.returncode:  # another machine made the kept bundle
        commit = stored.branches["main"]
        hint = f"tap-export fetch {ADDRESS}@{commit} -o DIR && tap-export selftest DIR"
        assert hint in result.stderr


def push(runs, bundle, *words, token=FakeHub.writer):
    return json.loads(runs.run("push", bundle, "me/tap_micro", "--json", *words, HF_TOKEN=token))


def test_what_is_pushed_can_be_used(runs, bundle, photo):
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / "of_this_machine.plan").write_bytes(b"plan")
    found = push(runs, bundle.path)
    repository = runs.hub.repositories["me/tap_micro"]
    commit = repository.branches["main"]
    assert found["bundle"] == f"hf://me/tap_micro@{commit}"
    assert found["url"].endswith(commit)
    names = {*bundle.manifest.files, "manifest.json"}
    assert repository.commits[commit].keys() == names | {".gitattributes"}
    assert found["files"] == len(names) and not repository.private
    assert runs.run("run", found["bundle"], photo, "--point", "9,9")
    uploads = len(runs.hub.asked("PUT"))
    assert uploads > 1
    result = runs.command("push", bundle.path, "me/tap_micro", HF_TOKEN=FakeHub.writer)
    assert result.stdout == f"{found['bundle']}\n"  # nothing has changed: no new commit
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: model hub: No files have been modified")
    assert len(runs.hub.asked("PUT")) == uploads


def test_push_to_a_branch_in_private(runs, micro_bundle):
    words = ("--private", "--revision", "v2", "--message", "second")
    found = push(runs, micro_bundle.path, *words)
    repository = runs.hub.repositories["me/tap_micro"]
    assert repository.private
    assert found["bundle"].endswith(repository.branches["v2"])
    assert "manifest.json" not in repository.commits[repository.branches["main"]]
    address = "hf://me/tap_micro@v2"
    assert "shows no repository me/tap_micro" in runs.error("inspect", address)
    assert runs.run("inspect", address, HF_TOKEN=FakeHub.reader)


def test_private_is_never_public(runs, micro_bundle):
    runs.hub.repositories["me/tap_micro"] = Repository()
    runs.hub.repositories["me/tap_micro"].commit({"README.md": b"mine"})
    words = ("push", micro_bundle.path, "me/tap_micro", "--private")
    line = runs.error(*words, HF_TOKEN=FakeHub.writer)
    assert line.startswith("me/tap_micro exists and is public, expected a private one")
    assert not runs.hub.asked("PUT") and not runs.hub.asked("POST", "main")


@pytest.mark.parametrize(("token", "status"), [("", 401), (FakeHub.reader, 403)])
def test_a_token_that_may_not_write(runs, micro_bundle, token, status):
    if token:
        runs.hub.repositories["me/tap_micro"] = Repository()
        runs.hub.repositories["me/tap_micro"].commit({"README.md": b"mine"})
    line = runs.error("push", micro_bundle.path, "me/tap_micro", HF_TOKEN=token)
    assert f"does not let you write to me/tap_micro (status {status}); set HF_TOKEN" in line


def test_files_that_the_repository_ignores(runs, micro_bundle):
    """Its own .gitignore applies to uploads; without a word, a part would be missing."""
    repository = Repository(ignored=("tokenizer.model",))
    runs.hub.repositories["me/tap_micro"] = repository
    repository.commit({".gitignore": b"*.model"})
    line = runs.error("push", micro_bundle.path, "me/tap_micro", HF_TOKEN=FakeHub.writer)
    assert line.startswith("me/tap_micro did not take tokenizer.model: its .gitignore excludes it")


def test_a_changed_bundle_is_not_pushed(runs, bundle):
    with (bundle.path / "tokenizer.model").open("r+b") as file:
        file.write(b"?")
    line = runs.error("push", bundle.path, "me/tap_micro", HF_TOKEN=FakeHub.writer)
    assert "tokenizer.model was changed" in line
    assert runs.hub.requests == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tap_micro", "is not the address of a bundle"),
        ("me/tap/micro", "is not the address of a bundle"),
        ("me/tap_micro@v2", "pass the branch of 'me/tap_micro@v2' with --revision BRANCH"),
    ],
)
def test_names_of_repositories(micro_bundle, name, message):
    result = CliRunner().invoke(main, ["push", str(micro_bundle.path), name])
    assert result.exit_code == 2 and message in result.stderr


def test_names_that_the_hub_does_not_allow(runs, micro_bundle):
    line = runs.error("push", micro_bundle.path, "me/tap--x", HF_TOKEN=FakeHub.writer)
    assert line.startswith("'me/tap--x' is not a repository: ")
    assert runs.hub.requests == []


def test_push_without_network(runs, micro_bundle):
    words = ("push", micro_bundle.path, "me/tap_micro")
    line = runs.error(*words, HF_ENDPOINT="http://127.0.0.1:9")
    assert "broke off" in line and line.endswith("run the command again")
    line = runs.error(*words, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in line


def test_progress_bars_are_for_terminals(runs, micro_bundle):
    """A terminal shows them; a log file does not, see the other tests."""
    code = (
        "import os, pty, sys\n"
        "command = ['-c', os.environ['COMMAND'], *sys.argv[1:]]\n"
        "shell = ['sh', '-c', 'stty rows 24 cols 80; exec \"$@\"', 'sh', sys.executable]\n"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(shell + command)))"
    )
    words = ("push", micro_bundle.path, "me/tap_micro")
    result = runs.python(code, *words, COMMAND=COMMAND, HF_TOKEN=FakeHub.writer)
    assert result.returncode == 0, result.stdout
    assert "image_encoder.onnx: 100%" in result.stdout
