"""``tap-export fetch`` and ``export --fetch``, from a hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import time

import pytest
from click.testing import CliRunner

pytest.importorskip("huggingface_hub")

from tap_deploy.cli import main
from tap_deploy.published_files import CHECKPOINTS, CONCEPTS, MODELS, REPOSITORY
from tests.fake_hub import FakeHub, etag
from tests.hub_runs import COMMAND, PROGRAM, HubRuns

WEIGHTS = "models/tap_vit_b_v1_1.pkl"
TOKENIZER_NOTE = r"note: the tokenizer of the captions comes with the authors' code: pip install"
RETRY = "note: the connection to the model hub failed; trying again"


@pytest.fixture
def runs(tmp_path, assets):
    with FakeHub() as hub:
        found = HubRuns(hub, tmp_path / "hf")
        found.publish(assets)
        yield found


@pytest.fixture
def authors_code(tmp_path, assets):
    """An installation of tokenize_anything that cannot be imported, as without flash-attn."""
    folder = tmp_path / "site" / "tokenize_anything"
    (folder / "modeling").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('no flash_attn')")
    (folder / "modeling" / "text_tokenizer.model").write_bytes(assets["tokenizer"].read_bytes())
    return f"{folder.parent}{os.pathsep}"


def gets(runs, path=WEIGHTS):
    return [h.get("Range") for h in runs.hub.asked("GET", path)]


def test_the_published_files_are_named():
    assert {each.model for each in CHECKPOINTS} == set(MODELS)
    assert len({each.md5_prefix for each in CHECKPOINTS}) == len(CHECKPOINTS) == 5
    old = next(each for each in CHECKPOINTS if each.name == "tap_vit_l_v1_0")
    assert old.paths == ("models/tap_vit_l_v1_0.pkl", "models/tap_vit_l_03f8ec.pkl")


def test_a_second_fetch_downloads_nothing(runs, assets):
    first, second = (json.loads(runs.run("fetch", "tap_vit_b", "--json")) for _ in range(2))
    assert first == second
    assert set(first) == {"checkpoint", "concepts", "md5", "revision"}
    repository = runs.hub.repositories[REPOSITORY]
    assert first["revision"] == repository.branches["main"]
    with open(first["checkpoint"], "rb") as file:
        assert hashlib.md5(file.read()).hexdigest() == first["md5"]
    assert first["checkpoint"].startswith(str(runs.home))
    assert gets(runs) == [None]
    agents = {h.get("user-agent", "") for h in runs.hub.asked("HEAD") + runs.hub.asked("GET")}
    assert agents == {agent for agent in agents if agent.startswith("tap_deploy/0")}
    assert not any("torch" in agent or "agent/" in agent for agent in agents)  # no telemetry


def test_files_are_copied_to_a_folder(runs, tmp_path, assets, authors_code):
    output = tmp_path / "a" / "weights"
    words = ("fetch", "tap_vit_b", "-o", output, "--json")
    found = json.loads(runs.run(*words, PYTHONPATH=authors_code + runs.environment["PYTHONPATH"]))
    names = ("tap_vit_b_v1_1.pkl", "merged_2560.pkl", "tokenizer.model")
    assert [found[key] for key in ("checkpoint", "concepts", "tokenizer")] == [
        str(output / name) for name in names
    ]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    assert not any(path.is_symlink() for path in output.iterdir())
    assert (output / names[0]).read_bytes() == assets["checkpoint"].read_bytes()
    assert (output / names[2]).read_bytes() == assets["tokenizer"].read_bytes()
    asked = len(runs.hub.requests)
    assert "already exists; pass --force" in runs.error(*words)
    assert len(runs.hub.requests) == asked  # refused before the download
    runs.run(*words, "--force")


def test_files_that_are_not_written_may_be_there(runs, tmp_path, authors_code):
    """A tokenizer is copied only where one is installed."""
    output = tmp_path / "weights"
    output.mkdir()
    (output / "tokenizer.model").write_bytes(b"mine")
    words = ("fetch", "tap_vit_b", "-o", output)
    site = authors_code + runs.environment["PYTHONPATH"]
    line = runs.error(*words, PYTHONPATH=site)
    assert line.startswith(f"output {output / 'tokenizer.model'} already exists")
    runs.run(*words)
    assert (output / "tokenizer.model").read_bytes() == b"mine"


def test_text_and_where_the_tokenizer_is(runs):
    with_note = runs.command("fetch", "tap_vit_b")
    assert with_note.returncode == 0
    assert re.match(TOKENIZER_NOTE, with_note.stderr) and "--tokenizer" in with_note.stderr
    lines = [line.split() for line in with_note.stdout.splitlines()]
    assert [words[0] for words in lines] == ["checkpoint", "concepts", "md5", "revision"]


@pytest.fixture
def large(runs):
    """Weights of 22 MB: huggingface_hub writes 10 MB at a time."""
    content = os.urandom(1 << 16) * 340
    runs.published["tap_vit_b"][1] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    runs.hub.repositories[REPOSITORY].commit({WEIGHTS: content})
    return content


def partial_file(runs, content):
    """Where the first part of a content is kept."""
    storage = runs.home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    return storage / "blobs" / f"{etag(content)}.incomplete"


def waited_for(condition):
    """Wait until something holds, at most half a minute; returns whether it does."""
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def fetched(runs):
    return pathlib.Path(json.loads(runs.run("fetch", "tap_vit_b", "--json"))["checkpoint"])


def test_a_broken_download_goes_on(runs, large):
    runs.hub.cuts[WEIGHTS] = [12_000_000, 10_490_000]
    result = runs.command("fetch", "tap_vit_b", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0] == RETRY  # and no progress bar
    assert gets(runs) == [None, "bytes=10485760-", "bytes=20971520-"]


def test_a_download_that_breaks_off_for_good_goes_on_in_the_next_command(runs, large):
    runs.hub.cuts[WEIGHTS] = [12_000_000, *[0] * 20]
    line = runs.error("fetch", "tap_vit_b", notes=(RETRY,))
    assert WEIGHTS in line and line.endswith("run the command again")
    runs.hub.cuts.clear()
    runs.hub.requests.clear()
    assert fetched(runs).read_bytes() == large
    assert gets(runs) == ["bytes=10485760-"]


def test_a_download_that_was_killed_goes_on_in_the_next_command(runs, large):
    partial = partial_file(runs, large)
    runs.hub.stalls[WEIGHTS] = 12_000_000
    with runs.start("fetch", "tap_vit_b") as process:
        assert waited_for(lambda: partial.exists() and partial.stat().st_size == 10 << 20)
        process.kill()
    runs.hub.stalls.clear()
    runs.hub.goes_on.set()
    checkpoint = fetched(runs)
    assert checkpoint.is_symlink() and checkpoint.read_bytes() == large
    assert gets(runs) == [None, "bytes=10485760-"]
    assert list(runs.home.rglob("*.incomplete")) == []
    asked = len(runs.hub.requests)
    runs.run("fetch", "tap_vit_b", HF_HUB_OFFLINE="1")
    assert len(runs.hub.requests) == asked


def test_two_commands_download_a_file_once(runs, large):
    runs.hub.stalls[WEIGHTS] = 12_000_000
    with runs.start("fetch", "tap_vit_b") as first, runs.start("fetch", "tap_vit_b") as second:
        assert waited_for(lambda: len(runs.hub.asked("HEAD", WEIGHTS)) == 4)  # both are to load it
        runs.hub.goes_on.set()
        errors = [process.communicate()[1] for process in (first, second)]
        assert first.returncode == second.returncode == 0, errors
    assert gets(runs) == [None]


@pytest.mark.parametrize("count", [0, 11_000_000, 23_000_000])
def test_a_partial_file_that_is_wrong(runs, large, count):
    """After a power cut, the end may be missing or zeros; one that is too long is not asked for."""
    partial = partial_file(runs, large)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(count))
    if count == 11_000_000:
        assert runs.error("fetch", "tap_vit_b").endswith("fetch it again")
    assert fetched(runs).read_bytes() == large
    assert gets(runs)[-1] is None


def test_a_wrong_file_is_not_kept(runs):
    good = runs.hub.repositories[REPOSITORY].branches["main"]
    content = runs.hub.repositories[REPOSITORY].commits[good][WEIGHTS]
    runs.hub.repositories[REPOSITORY].commit({WEIGHTS: content[:-1] + b"?"})
    for _ in range(2):
        line = runs.error("fetch", "tap_vit_b")
        assert f"expected {runs.published['tap_vit_b'][1][:6]}…" in line
        assert line.endswith("fetch it again")
    assert len(gets(runs)) == 2
    runs.run("fetch", "tap_vit_b", "--revision", good)


def test_the_first_version_under_its_old_name(runs):
    repository = runs.hub.repositories[REPOSITORY]
    content = repository.commits[repository.branches["main"]][WEIGHTS]
    old = f"models/tap_vit_b_{runs.published['tap_vit_b'][1][:6]}.pkl"
    repository.commit({old: content}, "old")
    words = ("fetch", "tap_vit_b", "--version", "1.0")
    assert "has no models/tap_vit_b_v1_0.pkl; check the name" in runs.error(*words)
    concepts = {"concepts/lvis_1203.pkl": b"lvis"}
    repository.commit(concepts, "old")
    found = runs.run(*words, "--revision", "old", "--concepts", "lvis_1203", "--json")
    assert json.loads(found)["checkpoint"].endswith(old)
    repository.commit({"models/tap_vit_b_v1_0.pkl": content} | concepts)
    found = runs.run(*words, "--concepts", "lvis_1203", "--json")
    assert json.loads(found)["checkpoint"].endswith("models/tap_vit_b_v1_0.pkl")


def test_the_first_version_from_the_cache(runs):
    """Its old name, the only one that the repository has, is found without the hub, too."""
    repository = runs.hub.repositories[REPOSITORY]
    content = repository.commits[repository.branches["main"]][WEIGHTS]
    old = f"models/tap_vit_b_{runs.published['tap_vit_b'][1][:6]}.pkl"
    repository.commit({old: content})
    words = ("fetch", "tap_vit_b", "--version", "1.0", "--json")
    assert "v1_0.pkl of BAAI" in runs.error(*words, HF_HUB_OFFLINE="1")
    found = runs.run(*words)
    assert json.loads(found)["checkpoint"].endswith(old)
    asked = len(runs.hub.requests)
    assert runs.run(*words, HF_HUB_OFFLINE="1") == found
    assert runs.run(*words, HF_ENDPOINT="http://127.0.0.1:9") == found
    assert len(runs.hub.requests) == asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tap_vit_b", "--revision", "v9"), r"has no revision 'v9'; expected a branch, a tag or"),
        (("tap_vit_b", "--concepts", "coco_80"), r"has no concepts/coco_80\.pkl at revision \w+; "),
        (("tap_vit_x",), r"unknown model 'tap_vit_x'; expected one of tap_vit_b, "),
        (("hf://owner",), r"'hf://owner' is not the address of a bundle; expected hf://OWNER/NAME"),
        (("hf://a/b", "--revision", "x"), r"pass the revision in the address: hf://a/b@x"),
        (("hf://a/b", "--version", "1.1"), r"--version is for the published models .* a bundle"),
        (("hf://a/b", "--concepts", "coco_80"), r"hf://a/b is a bundle, .* drop --concepts"),
    ],
)
def test_what_is_not_there(runs, words, message):
    assert re.search(message, runs.error("fetch", *words))


def test_a_version_that_was_never_published():
    result = CliRunner().invoke(main, ["fetch", "tap_vit_h", "--version", "1.0"])
    assert "error: tap_vit_h 1.0 was never published; expected one of" in result.stderr


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_private_repository(runs, token):
    runs.hub.repositories[REPOSITORY].private = True
    line = runs.error("fetch", "tap_vit_b", HF_TOKEN=token)
    assert f"shows no repository {REPOSITORY} (" in line and "or you need a token" in line
    runs.run("fetch", "tap_vit_b", HF_TOKEN=runs.hub.reader)


def test_a_missing_and_a_gated_repository(runs):
    runs.hub.repositories[REPOSITORY].gated = True
    assert f"{REPOSITORY} is gated: accept its terms" in runs.error("fetch", "tap_vit_b")
    runs.hub.repositories.clear()
    assert f"shows no repository {REPOSITORY}" in runs.error("fetch", "tap_vit_b")


def test_no_network(runs):
    endpoint = "http://127.0.0.1:9"  # discard: nobody listens
    line = runs.error("fetch", "tap_vit_b", notes=(RETRY,), HF_ENDPOINT=endpoint)
    assert line.startswith(f"{endpoint} does not answer (")
    assert str(runs.home) in line and line.endswith("and HF_ENDPOINT if you set it")
    runs.run("fetch", "tap_vit_b")
    runs.run("fetch", "tap_vit_b", HF_ENDPOINT=endpoint)  # what is in the cache is enough


def test_offline(runs):
    line = runs.error("fetch", "tap_vit_b", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set; unset it" in line and runs.hub.requests == []
    runs.run("fetch", "tap_vit_b")
    asked = len(runs.hub.requests)
    runs.run("fetch", "tap_vit_b", HF_HUB_OFFLINE="1")
    assert len(runs.hub.requests) == asked


def test_a_hub_that_is_down(runs):
    runs.hub.failing = 503
    line = runs.error("fetch", "tap_vit_b", notes=(RETRY,))
    assert "failed with status 503" in line and line.endswith("try again later")


def test_a_cache_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").touch()
    line = runs.error("fetch", "tap_vit_b", HF_HOME=str(tmp_path / "file" / "hf"))
    assert "Not a directory; set HF_HOME to a folder" in line


def test_the_package_is_missing(runs):
    code = "import sys; sys.modules['huggingface_hub'] = None\n"
    result = runs.python(code + COMMAND, "fetch", "tap_vit_b")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: huggingface_hub is not installed; the model hub needs it: "
        'pip install "tap-deploy[hub]"'
    ]


def test_what_the_user_chose_about_telemetry_stays(runs):
    code = (
        "import os; from tap_deploy.hub.calls import *\n"
        "with hub_calls(Subject(repository='a/b')) as hub:\n"
        "    print(hub.constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    assert runs.python(code).stdout == "True\n"
    assert runs.python(code, HF_HUB_DISABLE_TELEMETRY="0").stdout == "False\n"


# An export takes most of a minute; this shows what would be exported.
EXPORT = """
from tap_deploy.cli import export, main

def export_model(model, output, *, force):
    name, config = model.named_config()
    _, record, _ = model.load(config)
    print(name, record.file, record.known_as, model.concepts.name, model.tokenizer.name)
    sys.exit()

export.export_model = export_model
main(sys.argv[1:])
"""


def test_export_fetches(runs, tmp_path, authors_code):
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    words = ("export", "--model", "tap_vit_b", "--fetch", "-o", tmp_path / "bundle")
    line = runs.error(*words)
    assert line.startswith("no tokenizer: the tokenizer of the captions comes with")
    assert "pip install" in line and runs.hub.requests == []
    site = authors_code + runs.environment["PYTHONPATH"]
    result = runs.python(PROGRAM + EXPORT, *words, PYTHONPATH=site)
    assert result.stdout == (
        "tap_vit_b tap_vit_b_v1_1.pkl tap_vit_b_v1_1 merged_2560.pkl text_tokenizer.model\n"
    ), result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--checkpoint", "x.pkl"), "drop --checkpoint, or --fetch"),
        (("--synthetic-weights", "0"), "drop --synthetic-weights, or --fetch"),
        (("--mark-synthetic",), "drop --mark-synthetic, or --fetch"),
        (("--model", "tap_demo"), "tap_demo comes with this package; drop --fetch"),
    ],
)
def test_export_fetches_nothing_else(tmp_path, words, message):
    options = ["export", "--model", "tap_vit_b", "--fetch", "-o", str(tmp_path / "bundle"), *words]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2 and message in result.stderr


def test_export_takes_published_concepts_by_name(runs):
    """A file is used as it is; one of the names is fetched."""
    code = PROGRAM + (
        "import pathlib\n"
        "from tap_deploy.cli import model_options\n"
        "model_options.require_export_extra = lambda: None  # nothing is exported\n"
        "for name in ('lvis_1203', 'own.pkl', None):\n"
        "    concepts = None if name is None else pathlib.Path(name)\n"
        "    found = model_options.ModelOptions(model='tap_vit_b', fetch=True, concepts=concepts, "
        "tokenizer=pathlib.Path('t'))\n"
        "    print(found.with_published_files().concepts.name)\n"
    )
    runs.hub.repositories[REPOSITORY].commit({"concepts/lvis_1203.pkl": b"lvis"})
    result = runs.python(code)
    assert result.stdout.split() == ["lvis_1203.pkl", "own.pkl", f"{CONCEPTS[0]}.pkl"], (
        result.stderr
    )
