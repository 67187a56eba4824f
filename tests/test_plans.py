"""Only complete plans of this bundle that have not failed are deserialised."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil

import pytest

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.bundle.plans import (
    all_records,
    cached_record,
    load_plan,
    plan_digests,
    plan_folder,
    plans_passed,
    record_selftest,
    save_plan,
)
from tap_deploy.bundle.precision_record import SelftestMark
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.errors import BundleError

PLAN = b"ftrt, and then some"
ORIN = {"backend": "tensorrt", "backend_version": "10.3.0", "compute_capability": "8.7"}
GRAPH = graphs.TEXT_DECODER


@pytest.fixture
def bundle(micro_bundle, tmp_path):
    folder = tmp_path / "my bundle"
    shutil.copytree(micro_bundle.path, folder)
    return Bundle.open(folder, check_hashes=False)


def record(bundle, **changes):
    file = f"onnx/fp32/{GRAPH}.onnx"
    values = {
        "graph": GRAPH,
        "backend": "tensorrt",
        "backend_version": "10.3.0",
        "compute_capabilities": ("8.7",),
        "minimum_compute_capability": None,
        "version_compatible": False,
        "gpu": "Orin",
        "driver": "540.4.0 (CUDA 12.6)",
        "variant": "fp32",
        "onnx_sha256": bundle.manifest.files[file].sha256,
        "onnx_data_sha256": None,
        "plan_sha256": hashlib.sha256(PLAN).hexdigest(),
        "size_bytes": len(PLAN),
        "profiles": {"position": {"min": (1,), "opt": (1,), "max": (1,)}},
        "flags": {"strongly_typed": True},
        "options": ("--max-prompts", "8"),
        "build_seconds": 1.5,
        "layer_precisions": None,
    }
    return PlanRecord(**values | changes)


def load(bundle, **changes):
    machine = ORIN | {"variant": "fp32", "graph": GRAPH} | changes
    return load_plan(bundle, **machine)


def test_what_was_saved_is_loaded(bundle):
    saved = record(bundle)
    path = save_plan(bundle, PLAN, saved)
    assert path == bundle.path / "engines/tensorrt-10.3.0-sm87-fp32/text_decoder.plan"
    assert path.read_bytes() == PLAN  # raw: other tools read it
    loaded = load(bundle)
    assert (loaded.plan, loaded.record, loaded.path) == (PLAN, saved, path)
    assert load(bundle, compute_capability=None).plan == PLAN
    assert list(all_records(bundle)) == [(path, saved)]


def test_the_sidecar_survives_json(bundle):
    saved = record(bundle, layer_precisions={"fp16": 3}, minimum_compute_capability="8.0")
    path = save_plan(bundle, PLAN, saved).with_suffix(".json")
    assert PlanRecord.read(path) == saved


def test_no_plan_names_the_command(bundle):
    command = r"tap-export build '.*my bundle' --backend tensorrt --precision fp32$"
    with pytest.raises(BundleError, match=rf"no tensorrt engine of text_decoder.*{command}"):
        load(bundle)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"compute_capability": "8.9"}, r"is for GPUs of SM 8\.7, this GPU is 8\.9"),
        ({"backend_version": "10.13.0"}, r"built by tensorrt 10\.3\.0, installed is 10\.13\.0"),
    ],
)
def test_a_plan_for_something_else_is_refused(bundle, machine, reason):
    save_plan(bundle, PLAN, record(bundle))
    command = "--precision fp32 --max-prompts 8 --force$"
    with pytest.raises(BundleError, match=f"{reason}; build it with: .*{command}"):
        load(bundle, **machine)


@pytest.mark.parametrize("field", ["onnx_sha256", "onnx_data_sha256"])
def test_a_plan_of_another_graph_is_refused(bundle, field):
    saved = record(bundle)
    path = save_plan(bundle, PLAN, saved)
    other = dataclasses.replace(saved, **{field: "0" * 64})
    path.with_suffix(".json").write_text(other.to_json(), "utf-8")
    with pytest.raises(BundleError, match=r"built from a different onnx/fp32/text_decoder\.onnx"):
        load(bundle)


def test_a_plan_whose_graph_was_replaced_meanwhile_is_not_stored(bundle):
    before = record(bundle)
    path = save_plan(bundle, PLAN, before)
    replace_graph(bundle.path)
    message = r"graph text_decoder of bundle .* changed while its engine was built"
    with pytest.raises(BundleError, match=message):
        save_plan(bundle, b"newer", before)
    assert path.read_bytes() == PLAN  # and so it is refused
    with pytest.raises(BundleError, match="was built from a different"):
        load(bundle)


def replace_graph(folder):
    """Replace a graph as another process does, with its own Bundle object."""
    other = Bundle.open(folder)
    with bundle_addition(other) as addition:
        (addition.folder / f"onnx/fp32/{GRAPH}.onnx").parent.mkdir(parents=True)
        # The same graph, with a description.
        graph = (folder / f"onnx/fp32/{GRAPH}.onnx").read_bytes() + b"\x32\x03new"
        (addition.folder / f"onnx/fp32/{GRAPH}.onnx").write_bytes(graph)
        addition.graphs["fp32"] = other.manifest.graphs["fp32"]


def test_a_verdict_is_for_the_plans_that_were_tested(bundle):
    folder = save_plan(bundle, PLAN, record(bundle)).parent
    tested = plan_digests(folder)
    newer = hashlib.sha256(b"newer").hexdigest()
    save_plan(bundle, b"newer", record(bundle, plan_sha256=newer))
    for passed in (True, False):
        with pytest.raises(BundleError, match="rebuilt during their self-test; repeat it"):
            record_selftest(folder, SelftestMark(passed=passed, error=None), tested=tested)
    assert plans_passed(folder) is None


def test_a_plan_of_another_name_is_refused(bundle):
    path = save_plan(bundle, PLAN, record(bundle))
    for suffix in (".plan", ".json"):
        path.with_suffix(suffix).rename(path.with_name(f"image_encoder{suffix}"))
    with pytest.raises(BundleError, match=r"is for tensorrt fp32 text_decoder, expected .*image"):
        load(bundle, graph=graphs.IMAGE_ENCODER)


def test_damaged_bytes_never_come_back(bundle):
    path = save_plan(bundle, PLAN, record(bundle))
    path.write_bytes(PLAN[:-1] + b"!")
    with pytest.raises(BundleError, match=r"was changed or damaged: SHA-256 .*build it with"):
        load(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=r"cannot be read: No such file.*build it with"):
        load(bundle)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "is malformed"),
        ('{"key": "x"}', "is malformed"),
        (None, "key does not match"),
    ],
)
def test_a_sidecar_that_lies(bundle, text, reason):
    path = save_plan(bundle, PLAN, record(bundle)).with_suffix(".json")
    text = text or path.read_text("utf-8").replace('"8.7"', '"8.9"')
    path.write_text(text, "utf-8")
    with pytest.raises(BundleError, match=reason):
        load(bundle)


def test_a_failed_selftest_closes_the_door(bundle):
    folder = save_plan(bundle, PLAN, record(bundle)).parent
    assert plans_passed(folder) is None
    tested = plan_digests(folder)
    record_selftest(folder, SelftestMark(passed=True, error=None), tested=tested)
    assert load(bundle).plan == PLAN
    record_selftest(folder, SelftestMark(passed=False, error=None), tested=tested)
    with pytest.raises(BundleError, match="failed their self-test"):
        load(bundle)
    assert load(bundle, allow_failed_selftest=True).plan == PLAN
    save_plan(bundle, PLAN, record(bundle))  # new plans, no verdict yet
    assert plans_passed(folder) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"": {"passed": 1}}', '{"a": {}}'])
def test_a_selftest_that_cannot_be_read_counts_as_failed(bundle, text):
    folder = save_plan(bundle, PLAN, record(bundle)).parent
    (folder / "selftest.json").write_text(text, "utf-8")
    with pytest.raises(BundleError, match="failed their self-test"):
        load(bundle)


@pytest.mark.parametrize(
    ("capabilities", "lowest", "runs", "does_not"),
    [
        (("8.6", "8.9"), None, ["8.6", "8.9"], ["8.7", "12.0"]),
        (("8.6", "8.9", "12.0", "12.1"), "12.1", ["8.6", "12.0", "12.3"], ["8.7", "9.0", "11.0"]),
        (("8.7",), "8.0", ["8.0", "8.7", "9.0", "12.0"], ["7.5"]),
    ],
)
def test_plans_for_several_gpus(bundle, capabilities, lowest, runs, does_not):
    several = {"compute_capabilities": capabilities, "minimum_compute_capability": lowest}
    save_plan(bundle, PLAN, record(bundle, **several))
    for capability in runs:
        assert load(bundle, compute_capability=capability).plan == PLAN
    for capability in does_not:
        with pytest.raises(BundleError, match=f"this GPU is {capability}"):
            load(bundle, compute_capability=capability)


def test_version_compatible_plans_go_forward_within_a_major_version(bundle):
    save_plan(bundle, PLAN, record(bundle, version_compatible=True))
    assert load(bundle, backend_version="10.13.3").plan == PLAN
    for version in ("10.1.0", "11.1.0"):
        with pytest.raises(BundleError, match=f"installed is {version}"):
            load(bundle, backend_version=version)


def test_the_plan_for_just_this_machine_comes_first(bundle):
    everywhere = record(bundle, minimum_compute_capability="8.0")
    old = record(bundle, backend_version="10.1.0", version_compatible=True)
    save_plan(bundle, PLAN, old)
    machine = ORIN | {"variant": "fp32"}
    assert plan_folder(bundle, **machine).name == "tensorrt-10.1.0-sm87-fp32"
    save_plan(bundle, PLAN, everywhere)
    assert plan_folder(bundle, **machine).name == "tensorrt-10.3.0-sm87+-fp32"
    save_plan(bundle, PLAN, record(bundle))
    assert plan_folder(bundle, **machine).name == "tensorrt-10.3.0-sm87-fp32"
    assert plan_folder(bundle, **machine | {"variant": "fp16"}).name == "tensorrt-10.3.0-sm87-fp16"


def test_backends_and_precisions_keep_apart(bundle):
    save_plan(bundle, PLAN, record(bundle))
    for change in ({"backend": "tensorrt_rtx"}, {"variant": "int8"}):
        with pytest.raises(BundleError, match="has no"):
            load(bundle, **change)


def test_the_key_tells_builds_apart(bundle):
    one = record(bundle)
    same = dataclasses.replace(one, plan_sha256="1" * 64, build_seconds=9.0, driver=None)
    assert same.key == one.key
    for change in (
        {"backend_version": "10.13.0"},
        {"compute_capabilities": ("8.9",)},
        {"onnx_sha256": "2" * 64},
        {"flags": {"tf32": True}},
        {"profiles": {}},
        {"variant": "fp16"},
    ):
        assert dataclasses.replace(one, **change).key != one.key


def test_only_a_whole_plan_of_the_key_is_a_cache_hit(bundle):
    one = record(bundle)
    path = save_plan(bundle, PLAN, one)
    assert cached_record(path.parent, GRAPH, one.key) == one
    assert cached_record(path.parent, GRAPH, "other") is None
    assert cached_record(path.parent, graphs.IMAGE_ENCODER, one.key) is None
    path.write_bytes(b"half")
    assert cached_record(path.parent, GRAPH, one.key) is None
