"""From pictures to a verdict in the bundle, on the micro model.

Its weights are synthetic: masks, and even more captions, depend on meaningless differences.
So the floors here are not those that a trained model is held to; ``test_wrong_calibration.py``
does that.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import PrecisionRecord, VerdictMark
from tap_deploy.bundle.update import bundle_addition, revise_precision
from tap_deploy.cli import main
from tap_deploy.cli.verdict import report_text
from tap_deploy.cli.verdict_options import EAGER, eager_runtime
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.calibration.table import load_tables
from tap_deploy.engines.fp16.convert import add_fp16
from tap_deploy.engines.int8.add import RANGES_FILE, pictures_calibrated_on
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.engines.int8.budget import AccuracyBudget
from tap_deploy.engines.int8.candidates import CandidateSessions
from tap_deploy.engines.int8.make import judge_on_images, make_int8
from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions, evaluation_images
from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes, default_selection
from tap_deploy.engines.verdict.judge import VerdictOptions
from tap_deploy.engines.verdict.record import EXCLUSIONS_FILE, record_verdict
from tap_deploy.engines.verdict.regions import split_images
from tap_deploy.engines.verdict.speed import SpeedOptions
from tap_deploy.engines.verdict.verdict import Floors
from tap_deploy.errors import BundleError, InputError
from tap_deploy.graphs import GRAPH_NAMES, IMAGE_ENCODER, PROMPT_DECODER
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn

QUICK = SpeedOptions(min_iterations=1, min_seconds=0, warm_up_seconds=0)
LENIENT = Floors(mask_iou=0.95, concept_top1=0, captions_identical=0)
INT8_CPU = "int8_fp32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: pathlib.Path) -> pathlib.Path:
    """Crops of a photograph to calibrate and to judge on, a flat picture, and prompts for all."""
    folder = tmp_path_factory.mktemp("int8")
    picture = Image.open(photo).convert("RGB")
    boxes = {"real": [(0, 0, 300, 300), (150, 50, 450, 350)], "judge": [(60, 20, 400, 360)]}
    prompts = {}
    for name, corners in boxes.items():
        (folder / name).mkdir()
        for index, corner in enumerate(corners):
            picture.crop(corner).save(folder / name / f"{name}{index}.png")
            prompts[f"{name}{index}.png"] = {
                "points": [[[100, 100, 1]], [[200, 180, 1]]],
                "boxes": [[20, 30, 200, 220], [90, 10, 290, 290], [5, 150, 120, 280]],
            }
    (folder / "flat").mkdir()
    Image.new("RGB", (300, 300), (90, 90, 90)).save(folder / "flat" / "flat.png")
    prompts["flat.png"] = {"boxes": [[10, 10, 200, 200]]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


def judged_by(**changes: Any) -> VerdictOptions:
    """Two pictures are enough for most tests here."""
    return VerdictOptions(**{"threads": 1, "min_calibration_pictures": 2} | changes)


def options(folder: pathlib.Path, data: str = "real", **changes: Any) -> Int8Options:
    values: dict[str, Any] = {
        "quantize": QuantizeOptions(
            calibration_data=folder / data,
            prompts_file=folder / "prompts.json",
            method="max",
            cache=folder / f"{data}.cache.json",
            threads=1,
        ),
        "smoothquant": "off",
        "evaluation_data": folder / "judge",
        "verdict": judged_by(floors=LENIENT, speed=QUICK, min_speedup=0),
    }
    return Int8Options(**values | changes)


@pytest.fixture(scope="module")
def quantized(folder: pathlib.Path, micro_bundle: Bundle) -> tuple[Bundle, Any]:
    """The micro bundle with INT8 that was judged, and the result; to be copied, not changed."""
    path = folder / "bundle"
    shutil.copytree(micro_bundle.path, path)
    stages: list[str] = []
    bundle = Bundle.open(path)
    result = make_int8(bundle, options(folder), on_stage=stages.append)
    assert "write int8 graphs" in stages and "run the best mix" in stages
    return bundle, result


def judge(folder: pathlib.Path, bundle: Bundle, how: VerdictOptions) -> Any:
    prompts = CalibrationPrompts.from_file(folder / "prompts.json")
    images = evaluation_images(folder / "judge")
    return judge_on_images(bundle, images, how, prompts=prompts)


def failed_verdict(judged: str) -> VerdictMark:
    return VerdictMark(passed=False, sentence="", backend="another", judged=judged, report="")


def copy_of(bundle: Bundle, target: pathlib.Path) -> Bundle:
    shutil.copytree(bundle.path, target)
    return Bundle.open(target)


def test_the_report_is_in_the_bundle_and_vouched_for(quantized):
    bundle, result = quantized
    opened = Bundle.open(bundle.path)  # hashes every file
    report = json.loads((bundle.path / "reports/verdict-int8_fp32.json").read_text("utf-8"))
    assert {"reports/verdict-int8_fp32.json", "reports/verdict-int8_fp32.html"} <= set(
        opened.manifest.files
    )
    assert report == json.loads(json.dumps(result.report))
    assert report["passed"] is True
    assert result.verdict.mix.regions == 5
    mark = opened.manifest.precisions[INT8_CPU].verdict
    assert mark.passed is True and mark.report == "reports/verdict-int8_fp32.json"
    assert opened.manifest.precisions[INT8_CPU].calibration.method == "max"
    encoder = report["graphs"][IMAGE_ENCODER]
    assert encoder["int8_kernels"]["integer"] >= 4 * 2 * 2  # the four products of every block
    assert set(encoder["latency_ms"]) == {"int8", "float"}
    assert set(report["whole"]["latency_ms"]) == {"int8", "float"}
    assert encoder["float_bytes"] > encoder["int8_bytes"]  # most of it are tables of biases
    assert report["conditions"]["onnxruntime"]


def test_the_record_has_the_fields_of_a_recorded_one(quantized):
    """A manifest that was written before records had types, see ``test_precision_record.py``."""
    text = pathlib.Path(__file__).parent.joinpath("data/manifest.recorded.json").read_text("utf-8")
    recorded = json.loads(text)["precisions"][INT8_CPU]
    found = json.loads(Bundle.open(quantized[0].path).manifest.to_json())["precisions"][INT8_CPU]
    assert found.keys() == recorded.keys() - {"mix", "selftest"}
    for field in ("calibration", "golden_deviation", "verdict"):
        assert found[field].keys() == recorded[field].keys()
    assert found["graphs"].keys() == recorded["graphs"].keys()
    assert found["smoothquant"] == found["excluded"] == {}


def test_graphs_that_do_not_pay_are_replaced_by_the_float_ones(quantized, folder, tmp_path):
    bundle = copy_of(quantized[0], tmp_path / "bundle")
    impossible = judged_by(floors=LENIENT, speed=QUICK, min_speedup=1e9)
    verdict, report = judge(folder, bundle, impossible)
    assert verdict.passed and not any(graph.use_int8 for graph in verdict.graphs.values())
    assert verdict.mix.mask_iou == 1
    opened = Bundle.open(bundle.path)
    for name in GRAPH_NAMES:
        assert opened.variant(INT8_CPU).path(name) == opened.variant("fp32").path(name)
    assert not list((bundle.path / "onnx" / INT8_CPU).glob("*"))
    assert report["mix"] == dict.fromkeys(GRAPH_NAMES, "fp32")
    assert opened.manifest.precisions[INT8_CPU].mix == report["mix"]
    assert "precision int8 uses fp32" in report["sentence"]
    with TapPredictor.from_bundle(bundle.path, precision="int8", threads=1) as predictor:
        assert len(predictor.predict(folder / "judge/judge0.png", boxes=[[9, 9, 99, 99]])) == 1
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)]).stdout
    assert f"  {INT8_CPU}: {report['sentence']}\n" in shown
    assert f"  {INT8_CPU}: image_encoder fp32, prompt_decoder fp32, text_decoder fp32\n" in shown
    again, _ = judge(folder, bundle, impossible)
    assert "earlier verdict" in again.graphs[IMAGE_ENCODER].sentence


def test_pytorch_is_timed_in_the_same_run(quantized, folder, assets, tmp_path):
    bundle = copy_of(quantized[0], tmp_path / "bundle")
    images = evaluation_images(folder / "judge")
    how = judged_by(floors=LENIENT, speed=QUICK, min_speedup=0)
    others = eager_runtime(bundle, assets["checkpoint"], 1)
    _, report = judge_on_images(bundle, images, how, others=others)
    expected = {"int8", "float", EAGER}
    for part in (*report["graphs"].values(), report["whole"]):
        assert set(part["latency_ms"]) == expected
    page = (bundle.path / "reports/verdict-int8_fp32.html").read_text("utf-8")
    assert page.count(f"{EAGER}, median ms") == 1
    lines = report_text(report)
    for name in ("best mix", "fp32", EAGER):
        assert lines.count(f"picture to captions, {name}: ") == 1


def test_a_part_of_the_mix_is_replaced_alone(quantized, folder, tmp_path):
    bundle, result = copy_of(quantized[0], tmp_path / "bundle"), quantized[1]
    graphs = dict(result.verdict.graphs)
    graphs[PROMPT_DECODER] = dataclasses.replace(graphs[PROMPT_DECODER], use_int8=False)
    record_verdict(bundle, dataclasses.replace(result.verdict, graphs=graphs))
    opened = Bundle.open(bundle.path)
    files = {name: record.file for name, record in opened.manifest.graphs[INT8_CPU].items()}
    assert files == {
        "image_encoder": "onnx/int8_fp32/image_encoder.onnx",
        "prompt_decoder": "onnx/fp32/prompt_decoder.onnx",
        "text_decoder": "onnx/int8_fp32/text_decoder.onnx",
    }
    assert not (bundle.path / "onnx/int8_fp32/prompt_decoder.onnx").exists()
    assert not list(bundle.path.glob(".partial*"))


def test_a_failed_verdict_marks_the_bundle_and_leaves_the_graphs(quantized, folder, tmp_path):
    bundle = copy_of(quantized[0], tmp_path / "bundle")
    strict = judged_by(floors=Floors(mask_iou=1.0), speed=None)
    verdict, report = judge(folder, bundle, strict)
    assert not verdict.passed and report["failures"]
    opened = Bundle.open(bundle.path)
    assert opened.manifest.precisions[INT8_CPU].verdict.passed is False
    assert opened.variant(INT8_CPU).path(IMAGE_ENCODER).is_file()
    # It can be judged again, and the mark goes when it passes.
    judge(folder, bundle, options(folder).verdict)
    assert Bundle.open(bundle.path).manifest.precisions[INT8_CPU].verdict.passed is True


@pytest.mark.parametrize("judged", ["int8", INT8_CPU])
def test_a_passed_verdict_lifts_no_failure_of_another_backend(quantized, tmp_path, judged):
    bundle, passed = copy_of(quantized[0], tmp_path / "bundle"), quantized[1].verdict
    known = bundle.manifest.graphs[INT8_CPU]
    with bundle_addition(bundle) as addition:  # as if it had fp16 graphs, too
        addition.graphs["int8"] = dict(known)
        addition.precisions["int8"] = PrecisionRecord(verdict=failed_verdict(judged))
    record_verdict(bundle, passed)
    marks = {name: bundle.manifest.precisions[name].verdict for name in ("int8", INT8_CPU)}
    assert marks[INT8_CPU].passed is True
    # The backend now revokes its earlier verdict on both.
    assert marks["int8"].passed is (judged == INT8_CPU)


def test_a_passed_verdict_hides_no_failure_that_came_meanwhile(quantized, tmp_path):
    bundle, passed = copy_of(quantized[0], tmp_path / "bundle"), quantized[1].verdict
    failed = failed_verdict(INT8_CPU)
    other = Bundle.open(bundle.path)
    revise_precision(other, INT8_CPU, lambda record: dataclasses.replace(record, verdict=failed))
    with pytest.raises(BundleError, match="failed another one meanwhile, on another; nothing was"):
        record_verdict(bundle, passed)
    opened = Bundle.open(bundle.path)
    assert opened.manifest.precisions[INT8_CPU].verdict == failed
    record_verdict(opened, passed)  # judged after that
    assert Bundle.open(bundle.path).manifest.precisions[INT8_CPU].verdict.passed is True


def test_quantizing_again_takes_the_old_reports_away(quantized, folder, tmp_path):
    bundle = copy_of(quantized[0], tmp_path / "bundle")
    again = dataclasses.replace(options(folder).quantize, force=True)
    exclusions = Exclusions(entries={IMAGE_ENCODER: ("blocks.0",)})
    make_int8(bundle, options(folder, quantize=again, exclusions=exclusions, verdict=None))
    assert [f for f in bundle.manifest.files if f.startswith("reports/")] == [EXCLUSIONS_FILE]
    make_int8(bundle, options(folder, quantize=again, verdict=None))
    assert not [f for f in Bundle.open(bundle.path).manifest.files if f.startswith("reports/")]
    assert not list((bundle.path / "reports").iterdir())


def test_a_slip_in_the_exclusions_costs_no_calibration(folder, micro_bundle, monkeypatch):
    monkeypatch.setattr("tap_deploy.engines.int8.make.find_ranges", None)
    slip = Exclusions(entries={IMAGE_ENCODER: ("block.0",)})
    with pytest.raises(InputError, match=r"'block\.0' covers no quantizable node"):
        make_int8(micro_bundle, options(folder, exclusions=slip, verdict=None))


def test_attention_and_residuals_are_quantized_where_asked_for(folder, micro_bundle, tmp_path):
    bundle = copy_of(micro_bundle, tmp_path / "bundle")
    command = ["quantize", str(bundle.path), "--calibration-data", str(folder / "real")]
    command += ["--method", "max", "--no-verdict", "--smoothquant", "off", "--threads", "1"]
    refused = CliRunner().invoke(main, [*command, "--evaluation-data", str(folder / "judge")])
    assert refused.exit_code == 2 and "--no-verdict judges nothing" in refused.stderr
    result = CliRunner().invoke(main, [*command, "--attention", "--residuals", "--json"])
    assert result.exit_code == 0, result.stderr
    found = bundle_nodes(bundle)
    plain = {
        name: set(chosen.nodes)
        for name, chosen in default_selection(bundle.variant("fp32")).items()
    }
    for name in GRAPH_NAMES:
        kinds = {node.rpartition("/")[2].partition("_")[0] for node in found[name] - plain[name]}
        assert plain[name] < found[name] and kinds == {"MatMul", "Add"}
    assert largest_weight_steps(bundle) == 127
    with TapPredictor.from_bundle(bundle.path, precision="int8", threads=1) as predictor:
        assert len(predictor.predict(folder / "judge/judge0.png", boxes=[[9, 9, 99, 99]])) == 1


def test_a_reduced_range_is_what_is_written_and_what_is_tried(folder, micro_bundle, tmp_path):
    bundle = copy_of(micro_bundle, tmp_path / "bundle")
    command = ["quantize", str(bundle.path), "--calibration-data", str(folder / "real")]
    command += ["--method", "max", "--no-verdict", "--smoothquant", "off", "--threads", "1"]
    result = CliRunner().invoke(main, [*command, "--reduce-range", "--json"])
    assert result.exit_code == 0, result.stderr
    assert Bundle.open(bundle.path).manifest.precisions[INT8_CPU].reduce_range is True
    assert largest_weight_steps(bundle) == 64
    bundle = Bundle.open(bundle.path)
    tables, nodes = load_tables(bundle.path / RANGES_FILE), bundle_nodes(bundle)
    images = {"images": micro_bundle.golden().samples[0].images}
    written = sessions_from_bundle(bundle, RunOn(precision="int8", threads=1))[IMAGE_ENCODER]
    tried = CandidateSessions(bundle.variant("fp32"), tables, reduce_range=True, threads=1)
    again = tried(IMAGE_ENCODER, sorted(nodes[IMAGE_ENCODER]))
    expected, found = (s.run(images)["image_embeddings"] for s in (written, again))
    np.testing.assert_array_equal(
        found, expected
    )  # the search must evaluate the graphs that are written


def largest_weight_steps(bundle: Bundle) -> int:
    """Of the int8 weights of all graphs."""
    paths = [Bundle.open(bundle.path).variant(INT8_CPU).path(name) for name in GRAPH_NAMES]
    weights = [
        value.const_value.numpy()
        for path in paths
        for value in ir.load(path).graph.initializers.values()
        if value.name.endswith(".int8")
    ]
    return max(int(np.abs(weight.astype(int)).max()) for weight in weights)


def bundle_nodes(bundle: Bundle) -> dict[str, set[str]]:
    record = Bundle.open(bundle.path).manifest.precisions[INT8_CPU]
    return {name: set(nodes) for name, nodes in record.quantized_nodes.items()}


def test_calibration_on_one_flat_picture_is_caught(folder, micro_bundle, quantized, tmp_path):
    bundle = copy_of(micro_bundle, tmp_path / "bundle")
    command = ["quantize", str(bundle.path), "--calibration-data", str(folder / "flat")]
    command += ["--prompts", str(folder / "prompts.json"), "--evaluation-data"]
    command += [str(folder / "judge"), "--no-speed", "--threads", "1", "--smoothquant", "off"]
    command += ["--min-miou", "0.95", "--min-top1", "0", "--min-captions", "0", "--json"]
    command += ["--min-calibration-pictures", "1"]  # the answers alone must give it away
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.stderr
    assert "fewer than 100 are unreliable" in result.stderr
    assert "INT8 failed its accuracy check; the bundle is marked as failed: " in result.stderr
    report = json.loads(result.stdout)["verdict"]
    good = quantized[1].report
    found, expected = (r["whole"]["everything_int8"] for r in (report, good))
    assert found["mask_iou"] < 0.95 < expected["mask_iou"]
    assert found["sqnr_db"]["image_embeddings"] < expected["sqnr_db"]["image_embeddings"] - 6
    assert Bundle.open(bundle.path).manifest.precisions[INT8_CPU].verdict.passed is False


def test_calibration_on_too_few_pictures_fails_whatever_the_answers(quantized, folder, tmp_path):
    """Calibration on one real picture may suffice for similar pictures."""
    bundle = copy_of(quantized[0], tmp_path / "bundle")
    how = judged_by(floors=LENIENT, speed=None, min_calibration_pictures=3)
    verdict, report = judge(folder, bundle, how)
    assert not verdict.passed
    assert report["failures"] == [
        "calibration pictures: 2, expected at least 3; with fewer, INT8 can pass by chance"
    ]
    assert Bundle.open(bundle.path).manifest.precisions[INT8_CPU].verdict.passed is False


def test_exclusions_are_kept_and_can_be_replayed(quantized, folder, micro_bundle, tmp_path):
    bundle = copy_of(micro_bundle, tmp_path / "bundle")
    exclusions = Exclusions(entries={IMAGE_ENCODER: ("blocks.0", "cross_conv")})
    make_int8(bundle, options(folder, exclusions=exclusions, verdict=None))
    known = Bundle.open(bundle.path).manifest
    nodes = known.precisions[INT8_CPU].quantized_nodes[IMAGE_ENCODER]
    assert nodes and not any(node.startswith(("blocks.0.", "cross_conv.")) for node in nodes)
    assert known.precisions[INT8_CPU].excluded == exclusions.entries
    assert EXCLUSIONS_FILE in known.files
    assert Exclusions.load(bundle.path / EXCLUSIONS_FILE) == exclusions
    assert known.precisions[INT8_CPU].verdict is None


def test_a_budget_excludes_blocks_by_what_they_do_to_the_answers(
    quantized, folder, micro_bundle, tmp_path, monkeypatch
):
    bundle = copy_of(micro_bundle, tmp_path / "bundle")
    selected = default_selection(bundle.variant("fp32"))
    few = tuple(
        n for n in selected[IMAGE_ENCODER].nodes if n.startswith(("blocks.0", "cross_conv"))
    )
    selected = {name: ChosenNodes(graph=name, nodes=()) for name in selected}
    selected[IMAGE_ENCODER] = ChosenNodes(graph=IMAGE_ENCODER, nodes=few)
    monkeypatch.setattr(QuantizeOptions, "selection", lambda self, variant: selected)
    free = make_int8(bundle, options(folder, budget=AccuracyBudget(mask_iou=1), verdict=None))
    assert len(free.mix.exclusions) == 0 and free.mix.within_budget
    budget = AccuracyBudget(mask_iou=0.6 * (1 - free.mix.everything_quantized.mask_iou))
    again = dataclasses.replace(options(folder).quantize, force=True)
    result = make_int8(bundle, options(folder, budget=budget, verdict=None, quantize=again))
    assert result.mix.within_budget
    assert len(result.mix.exclusions) > 0
    assert budget.use(result.mix.agreement) <= 1 < budget.use(result.mix.everything_quantized)
    saved = json.loads((bundle.path / EXCLUSIONS_FILE).read_text("utf-8"))
    assert saved["budget"]["mask_iou"] == budget.mask_iou
    assert {block["block"] for block in saved["ranking"]} == {
        "blocks.0.attn",
        "blocks.0.mlp",
        *(f"cross_conv.{i}" for i in range(4)),
    }
    assert Exclusions.load(bundle.path / EXCLUSIONS_FILE) == result.mix.exclusions


def test_smoothing_goes_into_the_graphs(folder, micro_bundle, tmp_path):
    bundle = copy_of(micro_bundle, tmp_path / "bundle")
    add_fp16(bundle, threads=1)
    smooth = options(folder, smoothquant="on", verdict=None)
    quantize = QuantizeOptions(
        calibration_data=folder / "real",
        prompts_file=folder / "prompts.json",
        method="max",
        threads=1,
    )
    make_int8(bundle, dataclasses.replace(smooth, quantize=quantize))
    gains = {
        variant: ir.load(bundle.variant(variant).path(IMAGE_ENCODER))
        .graph.initializers["blocks.0.norm1.weight"]
        .const_value.numpy()
        for variant in ("fp32", INT8_CPU, "int8")
    }
    assert not np.allclose(gains["fp32"], gains[INT8_CPU])
    np.testing.assert_allclose(gains["int8"], gains[INT8_CPU], rtol=2e-3)  # fp16 digits
    choices = Bundle.open(bundle.path).manifest.precisions[INT8_CPU].smoothquant
    assert choices[IMAGE_ENCODER][0].kept is True


def test_pictures_are_held_back_unless_there_are_others(folder):
    calibration, evaluation = options(folder, evaluation_data=None).images()
    assert len(calibration) == len(evaluation) == 1
    assert not set(calibration.digests) & set(evaluation.digests)
    every, _ = options(folder, evaluation_data=None, verdict=None).images()
    assert set(every.digests) == {*calibration.digests, *evaluation.digests}
    assert split_images(every)[1].digests == evaluation.digests
    with pytest.raises(InputError, match="are calibration pictures"):
        options(folder, evaluation_data=folder / "real").images()


def test_what_was_calibrated_on_never_judges(quantized, folder, tmp_path):
    """Not even in a later call that is not given the calibration pictures."""
    bundle = copy_of(quantized[0], tmp_path / "bundle")
    assert len(pictures_calibrated_on(bundle)) == 2
    command = ["verdict", str(bundle.path), "--no-speed", "--evaluation-data"]
    result = CliRunner().invoke(main, [*command, str(folder / "real")])
    assert result.exit_code == 2 and "all 2 pictures" in result.stderr
    assert "are calibration pictures; pass others" in result.stderr
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps([str(folder / "real/real0.png"), str(folder / "judge/judge0.png")]))
    how = judged_by(floors=LENIENT, speed=None)
    _, report = judge_on_images(
        bundle, evaluation_images(mixed), how, budget=AccuracyBudget(mask_iou=1, caption_tokens=1)
    )
    assert report["data"]["pictures to judge on"] == 1
    assert report["budget"]["sentence"].startswith("budget: kept on ")
    assert 0 < report["budget"]["use"] <= 1


def test_as_many_pictures_judge_as_were_asked_for(folder, tmp_path):
    many = evaluation_images(folder)
    assert len(many) == 4
    assert len(evaluation_images(folder, samples=3)) == 3
    assert len(options(folder, evaluation_samples=1).images()[1]) == 1
    # What was calibrated on takes no place from the others.
    calibrated_on = set(many.digests[:2])
    for seed in range(3):
        rest = evaluation_images(folder, seed, samples=2, calibrated_on=calibrated_on)
        assert set(rest.digests) == set(many.digests[2:])
    with pytest.raises(InputError, match="evaluation_samples is 0"):
        options(folder, evaluation_samples=0)


def test_options_that_contradict_are_refused(folder):
    with pytest.raises(InputError, match="expected only one"):
        options(folder, budget=AccuracyBudget(mask_iou=0.1), exclusions=Exclusions())
    with pytest.raises(InputError, match="smoothquant"):
        options(folder, smoothquant="perhaps")


def test_the_verdict_needs_pictures_and_int8(folder, micro_bundle):
    result = CliRunner().invoke(main, ["verdict", str(micro_bundle.path)])
    assert result.exit_code == 2 and "--evaluation-data" in result.stderr
    command = ["verdict", str(micro_bundle.path), "--evaluation-data", str(folder / "judge")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "has no int8_fp32" in result.stderr
