"""Time and memory on a device: the arithmetic of the estimate, and what the command shows."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from click.testing import CliRunner

pytest.importorskip("onnxscript")

from tap_deploy.cli import main
from tap_deploy.engines.device_profiles import DEVICE_PROFILES, GIBIBYTE, device_profile
from tap_deploy.engines.dram import build_budget, engine_bytes, run_budget
from tap_deploy.engines.estimate import PlanOptions, plan_for_device
from tap_deploy.engines.products import Product
from tap_deploy.engines.roofline import FACTORS, moved_bytes, stage_estimate, weight_bytes
from tap_deploy.engines.work import GraphWork
from tap_deploy.errors import InputError

DEVICE = dataclasses.replace(
    device_profile("agx-orin"), fp16_tflops=10.0, int8_tops=20.0, gigabytes_per_second=100.0
)


def work(**changes):
    values = {
        "graph": "image_encoder",
        "sizes": {"B": 1},
        "products": (
            Product(node="weighted", flops=6_000_000_000, weight="w", is_quantized=False),
            Product(node="attention", flops=2_000_000_000, weight=None, is_quantized=False),
        ),
        "weight_elements": 5_000_000,
        "product_weight_elements": 3_000_000,
        "read_weight_elements": 4_000_000,
        "traffic_elements": 10_000_000,
        "peak_elements": 1_000_000,
        "kernels": 50,
    }
    return GraphWork(**(values | changes))


def factor(name):
    return FACTORS[name].value


def test_the_roofline_of_fp16():
    estimate = stage_estimate("encode", work(), DEVICE, "fp16", calls=2)
    assert estimate.compute_ms == pytest.approx(2 * 0.8)  # 8 GFLOP at 10 TFLOPS
    assert estimate.megabytes == pytest.approx(2 * (8 + 20))
    assert estimate.memory_ms == pytest.approx(2 * 0.28)
    assert estimate.launch_ms == pytest.approx(2 * 50 * factor("kernel_us") / 1000)
    assert estimate.roofline_ms == estimate.compute_ms
    assert estimate.limited_by == "arithmetic"
    assert estimate.expected_low_ms == pytest.approx(1.6 / factor("best_share_of_peak_fp16"))
    usual = 1.6 / factor("usual_share_of_peak") + 0.56 / factor("usual_share_of_bandwidth")
    assert estimate.expected_high_ms == pytest.approx(usual)


def test_int8_covers_stored_weights_only():
    estimate = stage_estimate("encode", work(), DEVICE, "int8")
    assert estimate.compute_ms == pytest.approx(0.3 + 0.2)  # 6 GOP at 20 TOPS, 2 GFLOP at 10
    # It may turn out no faster than FP16.
    fp16 = stage_estimate("encode", work(), DEVICE, "fp16")
    assert estimate.expected_high_ms == pytest.approx(fp16.expected_high_ms, rel=0.05)


def test_int8_covers_what_the_graph_says():
    products = (
        Product(node="quantized", flops=1_000_000_000, weight="w", is_quantized=True),
        Product(node="left alone", flops=7_000_000_000, weight="v", is_quantized=False),
    )
    estimate = stage_estimate("encode", work(products=products), DEVICE, "int8")
    assert estimate.compute_ms == pytest.approx(0.05 + 0.7)


def test_fp32_runs_in_tf32():
    estimate = stage_estimate("encode", work(), DEVICE, "fp32")
    assert estimate.compute_ms == pytest.approx(1.6)
    assert estimate.megabytes == pytest.approx(16 + 40)


def test_a_text_step_is_bound_by_bandwidth_or_launches():
    tiny = work(products=(Product(node="n", flops=1000, weight="w", is_quantized=False),))
    assert stage_estimate("caption", tiny, DEVICE, "fp16").limited_by == "bandwidth"
    fast = dataclasses.replace(DEVICE, gigabytes_per_second=3000.0)
    estimate = stage_estimate("caption", tiny, fast, "fp16")
    assert estimate.limited_by == "launches"
    assert estimate.expected_low_ms == pytest.approx(50 * factor("kernel_us") / 1000)


def test_bytes_of_weights():
    assert weight_bytes(work(), "fp32") == 20_000_000
    assert weight_bytes(work(), "fp16") == 10_000_000
    assert weight_bytes(work(), "int8") == 2 * 2_000_000 + 3_000_000
    assert moved_bytes(work(), "int8") == 2 * 1_000_000 + 3_000_000 + 20_000_000
    assert engine_bytes(work(), "fp16") > 10_000_000


def test_dram_adds_up(micro_config):
    works = {
        "image_encoder": work(weight_elements=50_000_000),
        "prompt_decoder": work(graph="prompt_decoder", sizes={"P": 8, "N": 2, "M": 1}),
        "text_decoder": work(graph="text_decoder", sizes={"P": 8, "T": 40, "K": 1}),
    }
    build = build_budget(works, DEVICE, "fp16", GIBIBYTE)
    largest = weight_bytes(works["image_encoder"], "fp16")
    assert build.items["4 copies of the weights of the largest graph"] == 4 * largest
    assert build.items["workspace"] == GIBIBYTE
    run = run_budget(works, DEVICE, "fp16", micro_config, 8)
    assert (
        run.items["KV cache, 8 prompts"] == 2 * 40 * 2 * 2 * 8 * 128
    )  # bytes, T, layers, KV, P, D
    side = micro_config.grid_size
    embeddings = 2 * micro_config.image_embed_dim * side**2
    masks = 2 * 8 * (4 * side) ** 2
    assert run.items["inputs and outputs"] > 2 * embeddings + masks
    assert run.total_bytes == sum(run.items.values())
    assert build.fits and run.fits
    small = dataclasses.replace(DEVICE, memory_bytes=GIBIBYTE)
    assert not build_budget(works, small, "fp16", GIBIBYTE).fits


def test_the_system_counts_only_where_memory_is_shared(micro_config):
    works = {"image_encoder": work()}
    on_board = build_budget(works, DEVICE, "fp16", 0).items
    on_card = build_budget(works, device_profile("h100"), "fp16", 0).items
    assert set(on_board) - set(on_card) == {"operating system (assumed)"}


def test_devices():
    for name in ("orin-nano", "orin-nx", "agx-orin", "thor", "h100", "a100", "rtx4090"):
        profile = device_profile(name)
        assert profile.source
        assert profile.peak_flops("fp32") < profile.peak_flops("fp16") < profile.peak_flops("int8")
    assert [p.compute_capability for p in DEVICE_PROFILES.values() if p.memory_is_shared] == [
        "8.7",
        "8.7",
        "8.7",
        "11.0",
    ]
    with pytest.raises(InputError, match="unknown device 'abacus'; expected one of orin-nano"):
        device_profile("abacus")


def test_more_prompts_than_the_profile_takes_run_in_chunks(micro_bundle):
    plan = plan_for_device(micro_bundle, DEVICE, PlanOptions(prompts=100, max_prompts=32, tokens=9))
    assert [stage.calls for stage in plan.stages] == [1, 4, 40]


def test_options_are_checked(micro_bundle):
    for options, message in (
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"prompts": 0}, "prompts is 0"),
        ({"points": 20}, "points is 20; expected at most max_points, 16"),
    ):
        with pytest.raises(InputError, match=message):
            PlanOptions(**options)
    with pytest.raises(InputError, match="tokens is 99; expected 1 to 38"):
        plan_for_device(micro_bundle, DEVICE, PlanOptions(tokens=99))


def invoke(*args):
    return CliRunner().invoke(main, ["plan", *map(str, args)])


def test_the_command_as_json(micro_bundle):
    result = invoke(micro_bundle.path, "--device", "orin-nano", "--prompts", 4, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["is_estimate"] is True
    assert [stage["graph"] for stage in plan["stages"]] == list(plan["engine_bytes"])
    total = sum(stage["roofline_ms"] for stage in plan["stages"])
    assert plan["end_to_end"]["roofline_ms"] == pytest.approx(total)
    for stage in (*plan["stages"], plan["end_to_end"]):
        assert stage["roofline_ms"] < stage["expected_low_ms"] < stage["expected_high_ms"]
    assert all(factor["source"] for factor in plan["factors"].values())
    assert plan["device"]["source"]
    assert plan["options"]["tokens"] == 38
    assert plan["dram"]["run"]["fits"] is True


def test_the_command_for_people(micro_bundle):
    result = invoke(micro_bundle.path, "--device", "thor", "--precision", "int8")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ESTIMATE for tap_micro in int8 on Jetson AGX Thor")
    assert "counted from the fp32 graphs" in result.stdout
    assert "DRAM to build: " in result.stdout
    assert "54 to 62 % of the FP16 peak" in result.stdout


def test_a_device_that_is_not_known(micro_bundle):
    result = invoke(micro_bundle.path, "--device", "toaster")
    assert result.exit_code == 2
    assert "expected one of orin-nano, orin-nx, agx-orin, thor" in result.stderr


def test_without_onnx_the_extra_is_named(micro_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = invoke(micro_bundle.path, "--device", "thor")
    assert result.exit_code == 2
    assert 'pip install "tap-deploy[quantize]"' in result.stderr
