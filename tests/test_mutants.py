"""``verify`` and ``selftest`` find each fault that changes answers, and name its graph."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli.verify import verify_bundle
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.sessions.run_on import RunOn
from tests.commands import invoke
from tests.kept_files import copy_kept
from tests.mutants import EQUIVALENT, FAULTS, make_demo_bundle, mutated_bundle

# Tolerances are at least this multiple of what rounding does.
MARGIN = 3

ONE_EACH = [next(each for each in FAULTS if each.graph == graph) for graph in GRAPH_NAMES]


def params(mutants, long=False):
    return [
        pytest.param(each, id=str(each), marks=[pytest.mark.slow] if long or each.slow else [])
        for each in mutants
    ]


@pytest.fixture(scope="module")
def demo_bundle(pytestconfig, tmp_path_factory):
    """A bundle of the demo model, whose trained weights have activations as real ones have."""
    folder = tmp_path_factory.mktemp("bundles")
    cache = getattr(pytestconfig, "cache", None)  # there is none with -p no:cacheprovider
    kept = folder if cache is None else cache.mkdir("demo_bundle")
    copy_kept(kept, make_demo_bundle, folder / "tap_demo")
    return Bundle.open(folder / "tap_demo")


def verified(bundle):
    return verify_bundle(bundle, RunOn(threads=1), [bundle.golden()])


def excess(check):
    """By how much a difference exceeds its tolerance: 1 is at the tolerance."""
    mean = check.mean_rel / check.mean_tolerance if check.mean_tolerance else 0
    largest = check.difference / check.tolerance if check.tolerance else check.difference > 0
    return max(mean, largest)


def test_the_bundle_itself_passes(demo_bundle):
    report = verified(demo_bundle)
    assert report.passed
    assert max(map(excess, report.checks)) < 1 / MARGIN


@pytest.mark.parametrize("mutant", params(FAULTS))
def test_verify_finds_a_fault_and_names_its_graph(demo_bundle, tmp_path, mutant):
    bundle = mutated_bundle(demo_bundle, mutant, tmp_path / "bundle")
    try:
        report = verified(bundle)
    except SessionError as exc:  # the graph does not run at all sizes
        assert re.match(rf"graph {mutant.graph}: ", str(exc))
        return
    assert not report.passed
    # Each graph gets the reference's inputs, apart from the chain.
    failed = {check.graph for check in report.checks if not check.passed and not check.is_chained}
    assert failed == {mutant.graph}


@pytest.mark.parametrize("mutant", [*params(ONE_EACH), *params(FAULTS, long=True)])
def test_the_selftest_finds_it_too(demo_bundle, tmp_path, mutant):
    bundle = mutated_bundle(demo_bundle, mutant, tmp_path / "bundle")
    result = invoke("selftest", bundle.path)
    if result.exit_code == 2:  # the graph does not run at all sizes
        assert f"graph {mutant.graph}: " in result.stderr
        return
    assert result.exit_code == 1
    if f"error: graph {mutant.graph}: " in result.stdout:
        return
    assert f"[✗] {mutant.graph} " in result.stdout
    others = {*GRAPH_NAMES} - {mutant.graph}
    assert not any(f"[✗] {graph} " in result.stdout for graph in others)


def test_the_command_fails_on_a_fault(demo_bundle, tmp_path):
    bundle = mutated_bundle(demo_bundle, ONE_EACH[0], tmp_path / "bundle")
    result = invoke("verify", bundle.path)
    assert result.exit_code == 1
    assert "first: image_encoder image_embeddings" in result.stderr


@pytest.mark.parametrize("mutant", params(EQUIVALENT))
def test_a_fault_that_changes_no_answer_stays_within_the_noise(demo_bundle, tmp_path, mutant):
    bundle = mutated_bundle(demo_bundle, mutant, tmp_path / "bundle")
    report = verified(bundle)
    assert report.passed
    assert max(map(excess, report.checks)) < 1 / MARGIN
    assert mutant.equivalent
