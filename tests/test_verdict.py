"""The verdict: accuracy, then speed; it fails closed; the report gives the reasons."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("jinja2")
from tap_deploy.engines.int8.budget import AccuracyBudget, budget_sentence
from tap_deploy.engines.verdict import kernels
from tap_deploy.engines.verdict.captions import CaptionAgreement
from tap_deploy.engines.verdict.kernels import KernelCount, count_kernels, layers_in_engine
from tap_deploy.engines.verdict.report_html import html_from_report
from tap_deploy.engines.verdict.tally import Agreement, evaluated_on
from tap_deploy.engines.verdict.verdict import (
    FLOAT,
    NOT_KNOWN,
    Floors,
    GraphFacts,
    Verdict,
    graph_verdict,
)
from tap_deploy.errors import InputError
from tap_deploy.graphs import GRAPH_NAMES, IMAGE_ENCODER
from tap_deploy.precisions import INT8
from tap_deploy.timing import Latency
from tests.pages import Page

KERNELS = KernelCount(
    integer=12, float_weights=1, float_activations=4, quantize=9, dequantize=2, op_types={}
)


def agreement(
    mask_iou: float = 0.99, top1: float | None = 0.99, identical: float = 0.98
) -> Agreement:
    captions = CaptionAgreement(
        tokens_equal=identical,
        identical=identical,
        divergences=1,
        median_position=4.0,
        median_margin=0.02,
        largest_margin=0.03,
    )
    return Agreement(
        images=3,
        regions=20,
        mask_iou=mask_iou,
        mask_iou_worst=mask_iou,
        same_mask_token=1,
        concept_top1=top1,
        iou_drift=0.001,
        captions=captions,
        sqnr_db={"low_res_masks": 30.0},
    )


def facts(**changes: Any) -> GraphFacts:
    latency = {
        INT8: Latency.from_seconds([0.010] * 5),
        FLOAT: Latency.from_seconds([0.020] * 5),
        "PyTorch eager fp32": Latency.from_seconds([0.030, 0.050] * 5),
    }
    values: dict[str, Any] = {
        "graph": IMAGE_ENCODER,
        "agreement": agreement(),
        "kernels": KERNELS,
        "int8_bytes": 25,
        "float_bytes": 100,
        "latency": latency,
    }
    return GraphFacts(**values | changes)


def decide(given: GraphFacts, **options: Any) -> Any:
    settings: dict[str, Any] = {"float_name": "FP32", "min_speedup": 1.05}
    return graph_verdict(given, Floors(), **settings | options)


def test_int8_is_used_where_it_is_right_and_quick():
    verdict = decide(facts())
    assert verdict.use_int8 and not verdict.failures
    assert verdict.sentence.startswith("use INT8 for the image_encoder, because it takes 10 ms")
    assert "speedup 2.00" in verdict.sentence
    assert "4.0 times smaller" in verdict.sentence


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (agreement(mask_iou=0.9699), "mean mask IoU is 0.9699, expected at least 0.97"),
        (agreement(top1=0.9), "concept top-1 agreement is 0.9000"),
        (agreement(identical=0.94), "identical captions is 0.9400"),
        (agreement(mask_iou=float("nan")), "mean mask IoU is nan"),
    ],
)
def test_wrong_answers_fail_however_quick(wrong, what):
    verdict = decide(facts(agreement=wrong))
    assert not verdict.use_int8
    assert verdict.sentence.startswith("keep FP32 for the image_encoder, because INT8 changes")
    assert what in verdict.sentence and what in verdict.failures[0]


def test_what_a_bundle_lacks_is_not_held_against_it():
    assert decide(facts(agreement=agreement(top1=None))).use_int8


def test_slow_int8_is_not_used_but_does_not_fail():
    verdict = decide(facts(), min_speedup=2.5, float_name="FP16")
    assert not verdict.use_int8 and not verdict.failures
    assert verdict.sentence.startswith("keep FP16 for the image_encoder, because INT8 is not fast")


def test_without_timings_the_answers_decide():
    verdict = decide(facts(latency={}))
    assert verdict.use_int8 and " ms" not in verdict.sentence


def test_int8_on_paper_only_is_not_used():
    nothing = dataclasses.replace(KERNELS, integer=0)
    assert "INT8 would run without integer kernels" in decide(facts(kernels=nothing)).sentence


def whole(mix: Agreement | None = None, **graphs: GraphFacts) -> Verdict:
    decisions = {
        name: decide(graphs.get(name, facts(graph=name, latency={}))) for name in GRAPH_NAMES
    }
    return Verdict(
        variant="int8_fp32",
        float_variant="fp32",
        backend="onnxruntime",
        floors=Floors(),
        graphs=decisions,
        everything_int8=agreement(),
        mix=agreement() if mix is None else mix,
    )


def test_the_whole_passes_and_names_the_mix():
    slow = {INT8: Latency.from_seconds([2.0]), FLOAT: Latency.from_seconds([1.0])}
    verdict = whole(text_decoder=facts(graph="text_decoder", latency=slow))
    assert verdict.passed
    assert verdict.variants == {
        "image_encoder": "int8_fp32",
        "prompt_decoder": "int8_fp32",
        "text_decoder": "fp32",
    }
    assert "fp32 for text_decoder" in verdict.sentence


def test_the_whole_is_as_large_as_what_is_used():
    slow = {INT8: Latency.from_seconds([2.0]), FLOAT: Latency.from_seconds([1.0])}
    verdict = whole(text_decoder=facts(graph="text_decoder", latency=slow))
    parts = [graph.facts for graph in verdict.graphs.values()]
    text = verdict.graphs["text_decoder"].facts
    expected = sum(part.int8_bytes for part in parts) - text.int8_bytes + text.float_bytes
    values = verdict.to_dict()["whole"]
    assert values["int8_bytes"] == expected < values["float_bytes"]
    assert values["float_bytes"] == sum(part.float_bytes for part in parts)
    assert values["int8_kernels_summary"].endswith("text_decoder: none, it is fp32")


def test_what_was_evaluated_is_counted_in_words():
    assert evaluated_on(8, 1) == "8 regions in 1 picture not used for calibration"
    assert evaluated_on(1, 2) == "1 region in 2 pictures not used for calibration"


def test_the_budget_is_kept_or_exceeded():
    exact = budget_sentence(AccuracyBudget(mask_iou=0.01), agreement(mask_iou=0.995))
    assert exact.startswith("budget: kept on 20 regions") and "50% used" in exact
    missed = budget_sentence(AccuracyBudget(concept_top1=0.01), agreement(top1=0.95))
    assert "EXCEEDED" in missed and "5.00 times" in missed


def test_one_wrong_graph_fails_the_whole():
    wrong = facts(graph="prompt_decoder", agreement=agreement(mask_iou=0.5))
    verdict = whole(prompt_decoder=wrong)
    assert not verdict.passed
    assert verdict.failures == ["prompt_decoder: mean mask IoU is 0.5000, expected at least 0.97"]
    assert verdict.sentence.startswith("FAILED")


def test_graphs_that_are_right_alone_may_be_wrong_together():
    verdict = whole(mix=agreement(mask_iou=0.96))
    assert not verdict.passed
    assert verdict.failures[0].startswith("best mix")


def test_no_regions_is_no_pass():
    assert not whole(mix=dataclasses.replace(agreement(), regions=0)).passed


def test_floors_are_shares():
    with pytest.raises(InputError, match="mask_iou"):
        Floors(mask_iou=97)


def report(verdict: Verdict) -> dict[str, Any]:
    return {
        "model": "<demo> & co",
        "made": {"calibration": {"method": "entropy"}},
        **verdict.to_dict(),
        "data": {"pictures to judge on": 3},
        "conditions": {"cpu": "a CPU"},
        "mixed_precision": {
            "exclude": {"image_encoder": ["blocks.0.mlp"]},
            "ranking": [
                {
                    "graph": "image_encoder",
                    "block": "blocks.0.mlp",
                    "budget_use": 1.5,
                    "mask_iou": 0.98,
                    "concept_top1": None,
                    "caption_tokens": 1.0,
                    "worst_sqnr_db": 20.0,
                }
            ],
        },
        "budget": {"sentence": budget_sentence(AccuracyBudget(mask_iou=0.005), verdict.mix)},
        "smoothquant": {
            "text_decoder": [{"norm": "norm", "error": 1e-4, "smoothed_error": 5e-5, "kept": True}]
        },
    }


def test_the_page_needs_nothing_else_and_says_everything():
    found = report(whole(image_encoder=facts()))
    json.dumps(found, allow_nan=False)
    page = html_from_report(found)
    assert "&lt;demo&gt; &amp; co" in page and "<demo>" not in page
    assert "src=" not in page
    Page(page)
    for part in (
        "use INT8 for the image_encoder",
        "12 of 17 products use integer kernels",
        "PyTorch eager fp32",
        "2.00 x",
        "noisy",
        "blocks.0.mlp",
        "20 regions in 3 pictures not used for calibration",
        "budget: EXCEEDED on 20 regions",
        "image_encoder: 12 of 17 products use integer kernels; prompt_decoder: ",
        "0.9900",
        "0.020",  # the logit margin
    ):
        assert part in page, part
    failed = html_from_report(report(whole(mix=agreement(mask_iou=0.1))))
    assert 'class="verdict failed"' in failed and 'class="verdict passed"' not in failed


def test_kernels_are_not_known_without_a_runtime_that_tells():
    verdict = decide(facts(kernels=None))
    assert verdict.to_dict()["int8_kernels_summary"] == NOT_KNOWN


def test_layers_of_an_engine_are_what_the_inspector_has_told(monkeypatch):
    def record(graph: str, found: dict[str, int] | None, variant: str = "int8") -> Any:
        names = {"backend": "tensorrt", "variant": variant, "graph": graph}
        return None, types.SimpleNamespace(layer_precisions=found, **names)

    records = [
        record("text_decoder", {"int8": 9}),
        record(IMAGE_ENCODER, {"fp16": 4}, "fp16"),
        record(IMAGE_ENCODER, None),  # built where no GPU was
        record(IMAGE_ENCODER, {"fp16": 30, "int8": 50}),
    ]
    monkeypatch.setattr(kernels, "all_records", lambda bundle: records)
    bundle: Any = None
    found = layers_in_engine(bundle, "tensorrt", "int8", IMAGE_ENCODER)
    assert found is not None
    assert found.summary == "50 of 80 layers compute in int8"
    assert decide(facts(kernels=found)).to_dict()["int8_kernels_summary"] == found.summary
    assert layers_in_engine(bundle, "tensorrt", "int8", "prompt_decoder") is None
    assert layers_in_engine(bundle, "tensorrt_rtx", "int8", IMAGE_ENCODER) is None


def test_kernels_are_counted_by_what_they_multiply():
    node = onnx.helper.make_node
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    nodes = [
        node("MatMulIntegerToFloat", ["a", "w"], ["b"], domain="com.microsoft"),
        node("QLinearConv", ["b"], ["c"]),
        node("MatMul", ["c", "w"], ["d"]),
        node("MatMul", ["d", "d"], ["e"]),
        node("DequantizeLinear", ["w", "w"], ["wd"]),
        node("Gemm", ["e", "wd"], ["f"]),
        node("Softmax", ["f"], ["g"]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [weight]))
    count = count_kernels(model)
    assert (count.integer, count.float_weights, count.float_activations) == (2, 2, 1)
    assert count.summary == "2 of 5 products use integer kernels"
    assert count.dequantize == 1 and count.op_types["Softmax"] == 1
