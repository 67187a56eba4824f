"""Runs commands against the fake hub, in processes of their own: the hub is set by variables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys

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
        command = [sys.executable, "-c", code, *map(str, words)]
        environment = self.environment | variables
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.home.parent
        )

    def run(self, *words: object, **variables: str) -> str:
        """Run a command that works; returns its stdout."""
        result = self.python(COMMAND, *words, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def error(self, *words: object, notes: tuple[str, ...] = (), **variables: str) -> str:
        """Run a command that fails with one line, after these notes; returns the line."""
        result = self.python(COMMAND, *words, **variables)
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
