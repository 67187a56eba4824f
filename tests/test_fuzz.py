"""A few random inputs of each target: the short form of ``scripts/soak fuzz``."""

from __future__ import annotations

import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS, use_bundle
from tests.hostile import patience

EXAMPLES = {"manifest": 20, "text decoder": 10, "command line": 40, "picture": 60, "graph": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_inputs_are_taken_or_refused_in_one_line(
    name, micro_bundle, tmp_path_factory, monkeypatch
):
    target, folder = TARGETS[name], tmp_path_factory.mktemp("fuzz")
    own = tmp_path_factory.mktemp("bundle") / "tap_micro"  # commands write marks into it
    use_bundle(shutil.copytree(micro_bundle.path, own))
    monkeypatch.chdir(folder)

    # One number makes one input: hypothesis chooses the same ones in every run.
    @settings(
        derandomize=True,
        max_examples=EXAMPLES.get(name, 100),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def run(seed):
        with patience():
            target.check(target.make(random.Random(seed)), folder)

    run()
