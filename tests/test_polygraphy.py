"""Polygraphy, a comparator of NVIDIA's: its verdict on the graphs is that of ``verify``.

Its files and commands are checked with its own tool.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

for name in ("polygraphy", "onnx_graphsurgeon"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)

import onnx
from onnx import numpy_helper
from polygraphy import config
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER

from tap_deploy import graphs
from tap_deploy.bundle.golden import logit_digest
from tap_deploy.precisions import FP32, INT8, variant_for
from tap_deploy.sessions.opening import sessions_from_variant
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.verify.comparison import compare
from tap_deploy.verify.graph_cases import (
    FLOAT_OUTPUTS,
    graph_cases,
    output_bounds,
)
from tap_deploy.verify.graph_check import verify_sessions
from tap_deploy.verify.polygraphy import INPUTS, ONE_INPUT, OUTPUTS, GraphFiles, commands_after
from tap_deploy.verify.selftest import SelftestResult, SelftestSubject
from tap_deploy.verify.tolerances import tolerances_for
from tests.commands import invoke, refused

# For the relative difference, Polygraphy divides by integers that are 0.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{kind} encountered:RuntimeWarning:polygraphy")
    for kind in ("invalid value", "divide by zero")
]

TOOL = pathlib.Path(sys.executable).with_name("polygraphy")
CAPTION_IDS = {graphs.NEXT_IDS: "caption_ids"}  # output -> its name in a report of ``verify``
INITIALIZERS = {
    graphs.IMAGE_ENCODER: "blocks.3.attn.proj.bias",
    graphs.PROMPT_DECODER: "decoder.transformer.blocks.0.mlp.fc2.bias",
    graphs.TEXT_DECODER: "norm.bias",
}


def bias_dropped(model, name):
    change(model, name, np.zeros_like)


def bias_slightly_off(model, name):
    """By as much as fp32 allows, more or less: other outputs stay within the tolerances."""
    change(model, name, lambda bias: bias + 1e-3)


def not_a_number(model, name):
    change(model, name, lambda bias: np.where(np.arange(bias.size) == 3, np.nan, bias))


CHANGES = {
    "unchanged": None,
    "bias dropped": bias_dropped,
    "bias off": bias_slightly_off,
    "nan": not_a_number,
}


def change(model, name, function):
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(function(values).astype(values.dtype), name))


def changed(variant, graph, how, folder):
    """The variant with one graph changed, in a folder of its own."""
    if how is None:
        return variant
    model = onnx.load(variant.path(graph))
    how(model, INITIALIZERS[graph])
    onnx.save(model, folder / "changed.onnx")
    record = dataclasses.replace(variant.records[graph], file="changed.onnx", external_data=False)
    return variant.with_graphs(folder, {graph: record})


def our_opinion(variant, graph, golden, tolerances):
    """Output -> whether ``verify`` passes it."""
    sessions = sessions_from_variant(variant)
    report = verify_sessions(
        sessions, variant.config, [golden], backend="b", precision="p", tolerances=tolerances
    )
    passed = {}
    for check in report.checks:
        if check.graph == graph:
            passed[check.tensor] = passed.get(check.tensor, True) and check.passed
    return passed


def digest(result):
    result[graphs.LOGITS] = logit_digest(result[graphs.LOGITS])
    return result


def second_opinion(variant, graph, golden, tolerances):
    """Output -> whether Polygraphy finds it within the tolerances, in one sample."""
    cases = graph_cases(variant, graph, golden, tolerances)
    feeds = [dict(case.inputs) for case in cases]
    results = Comparator.run([OnnxrtRunner(SessionFromOnnx(str(variant.path(graph))))], feeds)
    if graph == graphs.TEXT_DECODER:
        Comparator.postprocess(results, digest)
    results.add([dict(case.expected) for case in cases], runner_name="PyTorch")
    pair = tuple(name for name, _ in results)
    worst = SimpleCompareFunc(
        check_error_stat="max", rtol=0, atol={"": 0, **output_bounds(graph, golden, tolerances)}
    )
    (accuracy,) = Comparator.compare_accuracy(results, compare_func=worst)
    passed = {}
    for iteration in accuracy[pair]:
        for output, match in iteration.items():
            passed[output] = passed.get(output, True) and bool(match)
    means = {
        output: tolerances[output].mean * float(np.abs(expected_of(golden, output)).mean())
        for output in FLOAT_OUTPUTS[graph]
        if tolerances[output].mean is not None
    }
    if means:
        mean = SimpleCompareFunc(check_error_stat="mean", rtol=0, atol={"": np.inf, **means})
        (averages,) = Comparator.compare_accuracy(results, compare_func=mean, check_average=True)
        for output, match in averages.average_results(pair).items():
            passed[output] = passed[output] and bool(match)
    return passed


def expected_of(golden, output):
    if output == graphs.LOGITS:
        return golden.captions.logit_digests
    return getattr(golden.samples[0], output)


@pytest.fixture(autouse=True)
def quiet():
    assert not config.AUTOINSTALL_DEPS
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("graph", graphs.GRAPH_NAMES)
@pytest.mark.parametrize("precision", [FP32, INT8])
def test_the_verdict_on_each_output_is_that_of_verify(demo_bundle, precision, graph, how, tmp_path):
    name = variant_for(precision, on_cpu=True)
    tolerances = tolerances_for(precision, demo_bundle.manifest.precision_record(name))
    variant = changed(demo_bundle.variant(name), graph, CHANGES[how], tmp_path)
    golden = dataclasses.replace(demo_bundle.golden(), vocabulary=None)
    ours = our_opinion(variant, graph, golden, tolerances)
    apart = [dataclasses.replace(golden, samples=(sample,)) for sample in golden.samples]
    apart = apart if graph == graphs.PROMPT_DECODER else apart[:1]
    theirs = [second_opinion(variant, graph, one, tolerances) for one in apart]
    found = {
        CAPTION_IDS.get(output, output): all(each[output] for each in theirs)
        for output in theirs[0]
    }
    if precision == INT8:  # choices may differ if their scores nearly tie: not Polygraphy's notion
        ours, found = floats_of(graph, ours), floats_of(graph, found)
    assert found == ours
    assert all(ours.values()) or how != "unchanged"
    assert not all(ours.values()) or how in ("unchanged", "bias off") or precision == INT8


def floats_of(graph, passed):
    return {output: passed[output] for output in FLOAT_OUTPUTS[graph]}


def commands_of(text):
    """Comment -> the commands below it."""
    blocks = [block.split("\n", 1) for block in text.removeprefix("# ").split("\n# ")]
    return {title: commands.replace("\\\n", " ").splitlines() for title, commands in blocks}


def start(command, folder):
    """Run a printed command with Polygraphy's tool, in the background."""
    path = os.pathsep.join([str(TOOL.parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(process):
    output, _ = process.communicate()
    return process.returncode, output


@pytest.fixture(scope="module")
def written(demo_bundle, tmp_path_factory):
    """The folder of the files, and what ``inspect`` prints."""
    folder = tmp_path_factory.mktemp("polygraphy")
    result = invoke("inspect", demo_bundle.path, "--polygraphy", folder)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_commands_are_printed_for_every_graph_and_precision(demo_bundle, written):
    folder, text = written
    titles = list(commands_of(text))
    expected = [
        f"{graph} in {variant}"
        for variant in demo_bundle.manifest.graphs
        for graph in graphs.GRAPH_NAMES
        for _ in range(3)
    ]
    assert [title.split(":")[0] for title in titles] == expected
    again = invoke("inspect", demo_bundle.path, "--polygraphy", folder, "--json")
    assert "\n".join(each["commands"] for each in json.loads(again.stdout)) + "\n" == text


def test_the_tool_finds_good_graphs_good_and_names_the_outputs_of_a_broken_one(
    demo_bundle, written, tmp_path
):
    _, text = written
    commands = commands_of(text)
    bad = changed(demo_bundle.variant(FP32), graphs.TEXT_DECODER, bias_dropped, tmp_path)
    processes = {}
    for graph in graphs.GRAPH_NAMES:
        (command,) = commands[f"{graph} in fp32: onnxruntime against PyTorch"]
        processes[graph] = start(command, tmp_path)
    good = str(demo_bundle.variant(FP32).path(graphs.TEXT_DECODER))
    broken = start(command.replace(good, str(bad.path(graphs.TEXT_DECODER))), tmp_path)
    for graph, process in processes.items():
        code, output = outcome(process)
        assert code == 0, output
        assert "Pass Rate: 100.00%" in output
        for name in FLOAT_OUTPUTS[graph]:
            assert f"PASSED | Output: '{name}'" in output
    code, output = outcome(broken)
    assert code == 1
    assert "Mismatched outputs: ['next_ids', 'logits']" in output


def test_the_tool_knows_the_options_for_tensorrt(written, tmp_path):
    """It writes the program that it would run; TensorRT itself needs a GPU."""
    _, text = written
    titles = [title for title in commands_of(text) if "every layer of TensorRT" in title]
    (command,) = commands_of(text)[titles[-1]]
    code, output = outcome(start(f"{command} --gen-script program.py", tmp_path))
    assert code == 0, output
    program = (tmp_path / "program.py").read_text("utf-8")
    compile(program, "program.py", "exec")
    assert "strongly_typed=True" in program
    assert program.count("outputs=constants.MARK_ALL") == 2
    # The profile has the shapes of the input that is loaded.
    (feed,) = load_json(shlex.split(command)[shlex.split(command).index("--load-inputs") + 1])
    for name in (graphs.SEMANTIC_TOKENS, "past_key_values.1.value"):
        assert f".add({name!r}, min={list(feed[name].shape)}" in program


@pytest.mark.slow
def test_debug_reduce_finds_the_node_that_is_wrong(demo_bundle, tmp_path):
    variant, name = demo_bundle.variant(FP32), INITIALIZERS[graphs.PROMPT_DECODER]
    bad = changed(variant, graphs.PROMPT_DECODER, bias_dropped, tmp_path)
    files = GraphFiles.of(demo_bundle, FP32, tmp_path)[1]
    files.write()
    commands = commands_of(files.commands("onnxruntime"))
    *prepare, reduce = commands[list(commands)[2]]
    reduce = reduce.replace(str(variant.path(files.graph)), str(bad.path(files.graph)))
    for command in (*prepare, reduce):
        code, output = outcome(start(command, tmp_path))
        assert code == 0, output
    model = onnx.load(files.folder / "reduced.onnx")
    assert any(name in node.input for node in model.graph.node)
    assert len(model.graph.node) <= 3


@pytest.mark.parametrize(
    ("backend", "runner"),
    [("onnxruntime", "--onnxrt"), ("tensorrt", "--trt"), ("tensorrt_rtx", "--trt")],
)
def test_a_failed_selftest_has_commands_for_the_graph_that_failed(micro_bundle, backend, runner):
    right, wrong = np.zeros(1), np.ones(1)
    checks = (
        compare(graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS, "sample", right, right, 0),
        compare(graphs.PROMPT_DECODER, graphs.LOW_RES_MASKS, "sample", wrong, right, 0),
    )
    run_on = RunOn(backend=backend)
    subject = SelftestSubject(bundle=micro_bundle, run_on=run_on, backend_version="1", device="it")
    result = SelftestResult(subject=subject, checks=checks, seconds={}, error=None, finished_at="")
    _, first, *rest = commands_after(result, pathlib.Path("files")).splitlines()
    assert first == f"tap-export inspect {micro_bundle.path} --polygraphy files"
    commands = commands_of("\n".join(rest))
    assert [title.split()[0] for title in commands] == 3 * [graphs.PROMPT_DECODER]
    *_, reduce = commands[list(commands)[2]]
    assert f"--check polygraphy run polygraphy_debug.onnx {runner} " in reduce
    assert ("POLYGRAPHY_USE_TENSORRT_RTX=1" in reduce) is (backend == "tensorrt_rtx")
    loaded = set(re.findall(r"--load-\w+ (files/\S+)", " ".join(rest)))
    made = {name for name in loaded if "layer" not in name}
    folder = f"files/fp32/{graphs.PROMPT_DECODER}"
    assert made == {f"{folder}/{name}" for name in (INPUTS, OUTPUTS, ONE_INPUT)}


def test_without_polygraphy_the_command_says_how_to_install_it(bundle, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    result = invoke("inspect", bundle.path, "--polygraphy", tmp_path / "new")
    refused(result, 'pip install "tap-deploy[polygraphy]"')
