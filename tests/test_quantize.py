"""int8 in a bundle: from the command line to graphs that run and that a builder compiles."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import PrecisionRecord
from tap_deploy.cli import main
from tap_deploy.engines.calibration.table import load_tables
from tap_deploy.engines.int8 import add as quantize
from tap_deploy.engines.int8 import make as int8
from tap_deploy.engines.int8.add import few_images_warning
from tap_deploy.engines.int8.make import make_int8
from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
from tap_deploy.engines.smoothing.smoothed_variant import OFF
from tap_deploy.errors import BundleError, InputError, SessionError
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.opening import sessions_from_variant
from tap_deploy.verify.comparison import compare
from tap_deploy.verify.graph_check import verify_sessions
from tap_deploy.verify.tolerances import FP32_LARGEST, tolerances_for


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def copy_of(bundle, folder):
    shutil.copytree(bundle.path, folder / "bundle")
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="module")
def quantized(micro_bundle, pictures, tmp_path_factory):
    """A bundle with fp16 and both int8 variants, made by the command; and what it printed."""
    from tap_deploy.engines.fp16.convert import add_fp16

    bundle = copy_of(micro_bundle, tmp_path_factory.mktemp("quantized"))
    add_fp16(bundle, threads=1)
    options = ("--calibration-data", pictures, "--threads", 1, "--samples", 1, "--no-verdict")
    printed = run("quantize", bundle.path, *options, "--json")
    return Bundle.open(bundle.path), printed


def test_the_command(quantized):
    bundle, (code, out, err) = quantized
    assert (code, err) == (0, f"warning: {few_images_warning(1)}\n")
    summary = json.loads(out)
    assert set(summary["graphs"]) == {"int8", "int8_fp32"}
    assert summary["calibration"]["method"] == "mse"
    assert summary["calibration"]["num_samples"] == 1
    for variant, found in summary["graphs"].items():
        for name, graph in found.items():
            nodes = bundle.manifest.precisions[variant].quantized_nodes[name]
            assert graph["quantized_nodes"] == len(nodes) > 0
            assert graph["weights_bytes"] < graph["fp32_weights_bytes"]
            assert bundle.variant(variant).path(name) == bundle.path / graph["file"]
    tables = load_tables(bundle.path / summary["calibration"]["ranges"])
    assert set(tables) == set(graphs.GRAPH_NAMES)
    assert "calibration/ranges.json" in bundle.manifest.files


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_an_nvidia_builder_compiles_int8_over_fp16(quantized, rtx_plan, name):
    bundle, _ = quantized
    path = bundle.variant("int8").path(name)
    assert rtx_plan(path, bundle.variant("int8").specs[name])
    model = ir.load(path)
    scales = {n.inputs[1].dtype for n in model.graph if n.op_type == "QuantizeLinear"}
    assert scales == {ir.DataType.FLOAT16}
    record = bundle.manifest.graphs["int8"][name]
    assert (record.opset, record.ir_version) == (20, 10)
    half = bundle.manifest.graphs["fp16"][name].weights_bytes
    assert record.weights_bytes < half


def test_what_engines_get_computes_what_was_measured(quantized):
    """Q/DQ over fp16, run by onnxruntime as it is: no engine is needed to look at the numbers."""
    bundle, _ = quantized
    known = bundle.manifest.precisions["int8"]
    sessions = sessions_from_variant(bundle.variant("int8"), threads=1)
    report = verify_sessions(
        sessions,
        bundle.config,
        [bundle.golden()],
        backend="onnxruntime",
        precision="int8",
        tolerances=tolerances_for("int8", known),
    )
    for session in sessions.values():
        session.close()
    assert report.passed, report


def test_it_runs(quantized, predictor, photo):
    """Random weights say little about accuracy, but the results must be close."""
    bundle, _ = quantized
    points = [[[x, y, 1]] for x in (90, 300, 500) for y in (90, 300)]
    with TapPredictor.from_bundle(bundle.path, precision="int8", threads=1) as int8:
        found = int8.predict(photo, points=points)
    expected = predictor.predict(photo, points=points)
    same = (found.masks == expected.masks).mean()
    assert 0.9 < same < 1
    np.testing.assert_allclose(found.iou_predictions, expected.iou_predictions, atol=0.2)


def without_verdict(pictures, **changes):
    """Minimal int8 options: one picture, no SmoothQuant, no verdict."""
    values = {"calibration_data": pictures, "method": "max", "samples": 1, "threads": 1}
    return Int8Options(quantize=QuantizeOptions(**values | changes), smoothquant=OFF, verdict=None)


def test_int8_is_replaced_by_force_only(quantized, pictures, tmp_path):
    bundle = copy_of(quantized[0], tmp_path)
    with pytest.raises(InputError, match="has int8 and int8_fp32; pass --force"):
        make_int8(bundle, without_verdict(pictures))
    assert Bundle.open(bundle.path).manifest == quantized[0].manifest
    make_int8(bundle, without_verdict(pictures, force=True))
    known = Bundle.open(bundle.path).manifest.precisions
    assert {known[name].calibration.method for name in ("int8", "int8_fp32")} == {"max"}


def test_a_failure_leaves_the_bundle_as_it_was(micro_bundle, pictures, tmp_path, monkeypatch):
    bundle = copy_of(micro_bundle, tmp_path)
    before = bundle.manifest
    save, saved = quantize.save_graph, []

    def failing(*arguments):
        saved.append(save(*arguments))
        if len(saved) == 2:
            raise SessionError("no more")
        return saved[-1]

    monkeypatch.setattr(quantize, "save_graph", failing)
    with pytest.raises(SessionError):
        make_int8(bundle, without_verdict(pictures))
    assert Bundle.open(bundle.path).manifest == before


def test_without_pictures_it_refuses(micro_bundle, tmp_path):
    code, _, err = run("quantize", micro_bundle.path)
    assert code == 2
    assert "int8 needs real calibration pictures" in err
    code, _, err = run("quantize", micro_bundle.path, "--calibration-data", tmp_path)
    assert code == 2
    assert "contains no pictures" in err
    assert "int8_fp32" not in Bundle.open(micro_bundle.path).manifest.graphs


def test_export_makes_int8_as_well(assets, micro_bundle, pictures, tmp_path, monkeypatch):
    """The export itself, which has tests of its own, is replaced by a copy."""
    from tap_deploy.export import bundle_export
    from tap_deploy.verify.comparison import Report

    def exported(model, output, **options):
        bundle = Bundle.open(shutil.copytree(micro_bundle.path, output))
        report = Report(checks=(), backend="onnxruntime", precision="fp32")
        return bundle_export.ExportedBundle(bundle=bundle, report=report)

    monkeypatch.setattr(bundle_export, "export_bundle", exported)
    arguments = ["export", "--synthetic-weights", "0", "--config", assets["config"]]
    arguments += ["-o", tmp_path / "bundle", "--precision", "int8"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "int8 needs real calibration pictures" in err
    assert not (tmp_path / "bundle").exists()
    code, out, err = run(*arguments, "--calibration-data", pictures / "a.png")
    assert code == 0, err
    assert "int8 ranges by mse on 1 picture" in out
    assert "int8_fp32" in Bundle.open(tmp_path / "bundle").manifest.graphs


def test_options():
    for changes, message in [
        ({"method": "best"}, "unknown method 'best'"),
        ({"samples": 0}, "samples is 0"),
        ({"calibration_data": None}, "real calibration pictures"),
    ]:
        with pytest.raises(InputError, match=message):
            QuantizeOptions(**({"calibration_data": "x"} | changes))


@pytest.mark.parametrize(("count", "warned"), [(99, [few_images_warning(99)]), (100, [])])
def test_a_hundred_pictures_need_no_warning(micro_bundle, pictures, monkeypatch, count, warned):
    class Calibrating(Exception):
        """The warning comes before the long part of the work, which is skipped here."""

    def calibrate(*arguments, **options):
        raise Calibrating

    monkeypatch.setattr(int8, "find_ranges", calibrate)
    options, warnings = without_verdict(pictures, samples=500), []
    two = options.quantize.images()
    images = dataclasses.replace(
        two, paths=(two.paths * 50)[:count], digests=(two.digests * 50)[:count]
    )
    with pytest.raises(Calibrating):
        make_int8(micro_bundle, options, images=(images, None), on_warning=warnings.append)
    assert warnings == warned


def test_int8_is_verified_against_what_its_graphs_were_measured_to_be(quantized, tmp_path):
    bundle = copy_of(quantized[0], tmp_path)
    measured = bundle.manifest.precisions["int8_fp32"].golden_deviation
    assert measured == bundle.manifest.precisions["int8"].golden_deviation
    embeddings = measured["image_embeddings"]
    assert 0 < embeddings.mean < embeddings.max
    assert embeddings.max > FP32_LARGEST  # fp32's bounds would have refused it
    options = ("--precision", "int8", "--threads", 1)
    code, out, err = run("verify", bundle.path, *options)
    assert code == 0, out + err
    code, out, err = run("selftest", bundle.path, *options)
    assert code == 0, out + err


def test_a_machine_that_computes_int8_wrongly_is_found(quantized):
    """Noise of three times the int8 deviation, as from a wrong scale, is not int8 accuracy."""
    bundle = quantized[0]
    sample = bundle.golden().samples[0]
    known = bundle.manifest.precisions["int8"]
    bounds = tolerances_for("int8", known)
    deviation = known.golden_deviation["image_embeddings"]
    expected = sample.image_embeddings
    noise = np.random.default_rng(0).choice([-1.0, 1.0], expected.shape) * np.abs(expected).mean()
    for factor, passes in ((1, True), (3, False)):
        wrong = expected + factor * deviation.mean * noise
        check = compare("g", "t", "s", wrong, expected, bounds["image_embeddings"])
        assert check.passed is passes, str(check)


def test_int8_without_a_reference_is_refused(quantized):
    with pytest.raises(BundleError, match=r"quantize BUNDLE .* --force"):
        tolerances_for("int8", PrecisionRecord())
    record = quantized[0].manifest.precisions["int8"]
    some = {n: d for n, d in record.golden_deviation.items() if n != "logits"}
    with pytest.raises(BundleError, match=r"quantize BUNDLE .* --force"):
        tolerances_for("int8", dataclasses.replace(record, golden_deviation=some))


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("field", ["max", "mean"])
def test_a_deviation_that_is_not_finite_passes_nothing(quantized, field, value):
    record = quantized[0].manifest.precisions["int8"]
    logits = dataclasses.replace(record.golden_deviation["logits"], **{field: value})
    deviation = record.golden_deviation | {"logits": logits}
    with pytest.raises(BundleError, match="no deviations of its int8 graphs"):
        tolerances_for("int8", dataclasses.replace(record, golden_deviation=deviation))


def test_verify_int8_of_a_bundle_without_it(micro_bundle):
    code, _, err = run("verify", micro_bundle.path, "--precision", "int8")
    assert code == 2
    assert "tap-export quantize" in err
