"""Runs commands against the fake hub, in processes of their own: the hub is set by variables.

huggingface_hub reads them when it is imported, so it is imported anew for each command. All that it
and most commands import besides is in one process already, which forks for each command.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

from tap_deploy.concepts import Vocabulary
from tests.fake_hub import FakeHub, Repository

PROJECT = pathlib.Path(__file__).parent.parent
# No waiting between attempts; the micro model, and its MD5, stand for the published ones.
PROGRAM = """
import json, os, sys, time
time.sleep = lambda seconds: None
from tap_deploy import config, published_files
for model, (values, md5) in json.loads(os.environ["TAP_TEST_PUBLISHED"]).items():
    config.VARIANTS[model] = config.TapConfig.from_dict(values)
    published_files.CHECKPOINTS = tuple(
        published_files.PublishedCheckpoint(model=model, version=version, md5_prefix=md5[:6])
        for version in published_files.VERSIONS
    )
    published_files.KNOWN_MD5_PREFIXES[md5[:6]] = model + "_v1_1"
"""
COMMAND = PROGRAM + "from tap_deploy.cli import main; main(sys.argv[1:])"

# Reads one job a line; answers with its exit code. The loop of a child ends with the job.
FORKS = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.argv = ["-c", *job["words"]]
    exec(job["code"])
    break
"""
SHARED = (
    *("httpcore2", "httpx2", "truststore", "filelock", "tqdm.auto", "yaml", "PIL.PngImagePlugin"),
    *("tap_deploy.predictor", "tap_deploy.sessions.ort.session", "tap_deploy.hub.published"),
    *("tap_deploy.cli", "tap_deploy.cli.fetch", "tap_deploy.cli.inspect", "tap_deploy.cli.run"),
)


@functools.cache
def _forks() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FORKS, *SHARED]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # others would be missing in a fork
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=one_thread, cwd=PROJECT, **pipes)
    atexit.register(process.communicate)
    return process


@dataclasses.dataclass
class HubRuns:
    """A hub, a folder for its cache, and what stands for the published model."""

    hub: FakeHub
    home: pathlib.Path
    published: dict[str, list] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGINGFACE_"))}
        return kept | {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",  # the hub has no such storage
            "PYTHONPATH": str(PROJECT),
            "TAP_TEST_PUBLISHED": json.dumps(self.published),
        }

    def python(self, code: str, *words: object, **variables: str):
        """Run a program in a new process."""
        command = [sys.executable, "-c", code, *map(str, words)]
        environment = self.environment | variables
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.home.parent
        )

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start a command in a new process, and do not wait for it."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", COMMAND, *map(str, words)]
        return subprocess.Popen(command, env=self.environment, cwd=self.home.parent, **pipes)

    def command(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a fork of one process."""
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            job = {
                "code": COMMAND,
                "words": [*map(str, words)],
                "environment": self.environment | variables,
                "folder": str(self.home.parent),
                "stdout": out.name,
                "stderr": err.name,
            }
            process = _forks()
            print(json.dumps(job), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            return subprocess.CompletedProcess(job["words"], code, out.read(), err.read())

    def run(self, *words: object, **variables: str) -> str:
        """Run a command that works; returns its stdout."""
        result = self.command(*words, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def error(self, *words: object, notes: tuple[str, ...] = (), **variables: str) -> str:
        """Run a command that fails with one line, after these notes; returns the line."""
        result = self.command(*words, **variables)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        *others, line = result.stderr.splitlines()
        assert tuple(others) == notes, result.stderr
        assert line.startswith("error: "), line
        return line.removeprefix("error: ")

    def publish(self, assets: dict[str, pathlib.Path]) -> Repository:
        """Publish the micro model as tap_vit_b, its concepts as merged_2560."""
        content = assets["checkpoint"].read_bytes()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        config = json.loads(assets["config"].read_text("utf-8"))
        self.published = {"tap_vit_b": [config, md5]}
        concepts = Vocabulary.load(assets["concepts"])
        repository = self.hub.repositories["BAAI/tokenize-anything"] = Repository()
        repository.commit(
            {
                "models/tap_vit_b_v1_1.pkl": content,
                "concepts/merged_2560.pkl": pickle.dumps([concepts.weights, [*concepts.names]]),
            }
        )
        return repository
