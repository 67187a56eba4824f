"""What the manifest says of a precision: typed when read, and the same JSON when written."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from tap_deploy.bundle.json_record import record_to_json
from tap_deploy.bundle.manifest import Manifest
from tap_deploy.bundle.plans import SELFTEST_FILE, plans_passed
from tap_deploy.bundle.precision_record import (
    CalibrationRecord,
    Deviation,
    IslandRecord,
    PrecisionRecord,
    SelftestMark,
    SmoothingChoice,
    VerdictMark,
)
from tap_deploy.errors import BundleError

RECORDED = pathlib.Path(__file__).parent / "data" / "manifest.recorded.json"


@pytest.fixture
def values() -> Any:
    return json.loads(RECORDED.read_text("utf-8"))


def written(folder: pathlib.Path, values: Any) -> pathlib.Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(values), "utf-8")
    return path


def test_a_recorded_manifest_is_written_as_it_was_read():
    """Absent fields stay absent, null stays null, and no key moves."""
    assert Manifest.read(RECORDED).to_json() == RECORDED.read_text("utf-8")


def test_fields_are_typed():
    records = Manifest.read(RECORDED).precisions
    fp16, int8 = records["fp16"], records["int8_fp32"]
    assert fp16.fp16_graphs["text_decoder"].islands[0] == IslandRecord(
        node="Where_1", op_type="Where", reason="masking addend", max_abs=3.4028234663852886e38
    )
    assert fp16.fp16_graphs["text_decoder"].weights.overflowing == ("val_19",)
    assert fp16.quantized_nodes == {} == int8.fp16_graphs
    assert fp16.selftest == {
        "onnxruntime-cuda": {
            "": SelftestMark(
                passed=False,
                error="the self-test did not come to its end",
                run="0123456789abcdef",
            )
        }
    }
    assert isinstance(int8.calibration, CalibrationRecord) and int8.calibration.method == "max"
    assert int8.quantized_nodes["text_decoder"] == ("encoder/Gemm", "blocks.0.qkv/Gemm")
    assert int8.excluded == {"image_encoder": ("blocks.0.mlp",)}
    assert isinstance(int8.smoothquant["image_encoder"][0], SmoothingChoice)
    assert isinstance(int8.verdict, VerdictMark) and int8.verdict.judged == "int8_fp32"
    assert int8.mix["prompt_decoder"] == "fp32"
    assert int8.selftest["onnxruntime"]["a machine"].passed is True
    assert records["int8"].golden_deviation["logits"] == Deviation(
        max=None, mean=0.007259974656925636
    )


def test_an_unknown_variant_has_an_empty_record():
    record = Manifest.read(RECORDED).precision_record("fp8")
    assert record == PrecisionRecord()
    assert record_to_json(record) == {}


def test_only_fields_without_a_default_become_null():
    mark = SelftestMark(passed=True, error=None)
    record = PrecisionRecord(selftest={"onnxruntime": {"": mark}})
    written = {"onnxruntime": {"": {"passed": True, "error": None}}}
    assert record_to_json(record) == {"selftest": written}


def test_whole_numbers_may_stand_for_floats(values, tmp_path):
    """Other programs write 32752.0 as 32752."""
    values["precisions"]["fp16"]["overflow_limit"] = 32752
    record = Manifest.read(written(tmp_path, values)).precisions["fp16"]
    assert record.overflow_limit == 32752.0


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("int8",), [], "got '[]' where an object is expected"),
        (("int8", "surprise"), 1, "'surprise'"),
        (("int8", "verdict", "surprise"), 1, "'surprise'"),
        (("int8", "verdict", "passed"), "yes", "passed is 'yes'"),
        (("int8", "verdict"), {"passed": True}, "missing field 'backend' in VerdictMark"),
        (("int8", "calibration", "seed"), True, "seed is 'True'"),
        (("int8", "calibration", "num_samples"), 1.5, "num_samples is '1.5'"),
        (("int8", "excluded", "image_encoder"), "blocks.0", "image_encoder is 'blocks.0'"),
        (("int8", "golden_deviation"), "x", "got 'x' where an object is expected"),
        (("int8", "golden_deviation", "logits", "max"), "a", "max is 'a'"),
        (("int8", "mix"), {"image_encoder": None}, "image_encoder is 'None'"),
        (("int8", "graphs", "text_decoder", "quantized_nodes"), [1], "quantized_nodes is '1'"),
        (("fp16", "graphs", "text_decoder", "casts"), "9", "casts is '9'"),
        (("fp16", "samples"), {}, "samples is '{}'"),
        (("fp32", "selftest", "onnxruntime"), None, "got 'None' where an object is expected"),
    ],
)
def test_what_does_not_fit_is_refused(values, tmp_path, place, value, message):
    target = values["precisions"]
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(BundleError, match=r"manifest\.json is malformed") as caught:
        Manifest.read(written(tmp_path, values))
    assert message in str(caught.value)


def test_a_selftest_of_engines_is_the_same_record(values, tmp_path):
    marks = values["precisions"]["fp32"]["selftest"]["onnxruntime"]
    (tmp_path / SELFTEST_FILE).write_text(json.dumps(marks), "utf-8")
    assert plans_passed(tmp_path) is True
    marks["a machine"]["surprise"] = 1
    (tmp_path / SELFTEST_FILE).write_text(json.dumps(marks), "utf-8")
    assert plans_passed(tmp_path) is False


def test_a_conversion_writes_the_fields_that_were_recorded(fp16_bundle, values):
    recorded = values["precisions"]["fp16"]
    found = record_to_json(fp16_bundle.manifest.precisions["fp16"])
    assert found.keys() == recorded.keys() - {"selftest"}
    assert shape(found["graphs"]) == shape(recorded["graphs"])
    assert shape(found["samples"]) == shape(recorded["samples"])


def shape(value: Any) -> Any:
    """Return keys and types; of a list, those of its last entry."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[-1:]]
    return type(value).__name__
