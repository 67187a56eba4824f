"""Time and memory on a device: the arithmetic of the estimate, and what the command shows."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tap_deploy.bundle.precision_record import Int8GraphRecord, PrecisionRecord
from tap_deploy.cli import main
from tap_deploy.config import VARIANTS
from tap_deploy.engines.estimate.devices import DEVICE_PROFILES, GIBIBYTE, device_profile
from tap_deploy.engines.estimate.estimate import (
    EstimateOptions,
    estimate_for_device,
    quantized_nodes,
)
from tap_deploy.engines.estimate.memory import build_estimate, engine_bytes, run_estimate
from tap_deploy.engines.estimate.roofline import FACTORS, moved_bytes, stage_estimate, weight_bytes
from tap_deploy.engines.estimate.work import GraphWork, Kernel, graph_works
from tap_deploy.errors import InputError

DEVICE = dataclasses.replace(
    device_profile("agx-orin"), fp16_tflops=10.0, int8_tops=20.0, gigabytes_per_second=100.0
)


LAUNCHES = 50


def work(*kernels, in_int8=("weighted",), **changes):
    """8 GFLOP, 6 of them with stored weights; 5 million weights; 10 million activations moved."""
    weighted = Kernel(
        name="weighted",
        multiplications=3_000_000_000,
        moved=10_000_000,
        weights=3_000_000,
        other_weights=500_000,
    )
    others = [Kernel(name=f"norm{i}") for i in range(LAUNCHES - 2)]
    attention = Kernel(name="attention", multiplications=1_000_000_000)
    values = {
        "graph": "image_encoder",
        "kernels": kernels or (weighted, attention, *others),
        "in_int8": frozenset(in_int8),
        "constant_elements": 500_000,
        "table_elements": 1_000_000,
        "peak_elements": 1_000_000,
    }
    return GraphWork(**(values | changes))


def factor(name):
    return FACTORS[name].value


def test_the_roofline_of_fp16():
    estimate = stage_estimate("encode", work(), DEVICE, "fp16", calls=2)
    assert estimate.compute_ms == pytest.approx(2 * 0.8)  # 8 GFLOP at 10 TFLOPS
    assert estimate.megabytes == pytest.approx(2 * (8 + 20))
    assert estimate.memory_ms == pytest.approx(2 * 0.28)
    assert estimate.launch_ms == pytest.approx(2 * LAUNCHES * factor("kernel_us") / 1000)
    assert estimate.roofline_ms == estimate.compute_ms
    assert estimate.limited_by == "arithmetic"
    assert estimate.expected_low_ms == pytest.approx(1.6 / factor("best_share_of_peak_fp16"))
    usual = 1.6 / factor("usual_share_of_peak") + 0.56 / factor("usual_share_of_bandwidth")
    assert estimate.expected_high_ms == pytest.approx(usual)


def test_int8_covers_a_part():
    estimate = stage_estimate("encode", work(), DEVICE, "int8")
    assert estimate.compute_ms == pytest.approx(0.3 + 0.2)  # 6 GOP at 20 TOPS, 2 GFLOP at 10
    # It may turn out no faster than FP16.
    fp16 = stage_estimate("encode", work(), DEVICE, "fp16")
    assert estimate.expected_high_ms == pytest.approx(fp16.expected_high_ms, rel=0.05)


def test_fp32_runs_in_tf32():
    estimate = stage_estimate("encode", work(), DEVICE, "fp32")
    assert estimate.compute_ms == pytest.approx(1.6)
    assert estimate.megabytes == pytest.approx(16 + 40)


def test_a_text_step_is_bound_by_bandwidth_or_launches():
    tiny = work(*(Kernel(name=f"n{i}", moved=200_000) for i in range(LAUNCHES)))
    assert stage_estimate("caption", tiny, DEVICE, "fp16").limited_by == "bandwidth"
    fast = dataclasses.replace(DEVICE, gigabytes_per_second=3000.0)
    estimate = stage_estimate("caption", tiny, fast, "fp16")
    assert estimate.limited_by == "launches"
    assert estimate.expected_low_ms == pytest.approx(LAUNCHES * factor("kernel_us") / 1000)


def test_bytes_of_weights():
    assert weight_bytes(work(), "fp32") == 20_000_000
    assert weight_bytes(work(), "fp16") == 10_000_000
    assert weight_bytes(work(), "int8") == 2 * 2_000_000 + 3_000_000
    assert moved_bytes(work(), "int8") == 2 * 1_000_000 + 3_000_000 + 20_000_000
    assert engine_bytes(work(), "fp16") > 10_000_000


def test_dram_adds_up(micro_config):
    works = graph_works(micro_config, prompts=8, points=2, slots=40)
    build = build_estimate(works, DEVICE, "fp16", GIBIBYTE)
    largest = max(weight_bytes(work, "fp16") for work in works.values())
    assert build.items["4 copies of the weights of the largest graph"] == 4 * largest
    assert build.items["workspace"] == GIBIBYTE
    run = run_estimate(works, DEVICE, "fp16", micro_config, 8, 2)
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
    assert not build_estimate(works, small, "fp16", GIBIBYTE).fits


def test_the_system_counts_only_where_memory_is_shared(micro_config):
    works = {"image_encoder": work()}
    on_board = build_estimate(works, DEVICE, "fp16", 0).items
    on_card = build_estimate(works, device_profile("h100"), "fp16", 0).items
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


def estimate_of(config, **options):
    return estimate_for_device("micro", config, DEVICE, EstimateOptions(**options))


def test_more_prompts_than_the_profile_takes_run_in_chunks(micro_config):
    estimate = estimate_of(micro_config, prompts=100, max_prompts=32, tokens=9)
    assert [stage.calls for stage in estimate.stages] == [1, 4, 40]


def test_options_are_checked(micro_config):
    for options, message in (
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"prompts": 0}, "prompts is 0"),
        ({"points": 20}, "points is 20; expected at most max_points, 16"),
    ):
        with pytest.raises(InputError, match=message):
            EstimateOptions(**options)
    with pytest.raises(InputError, match="tokens is 99; expected 1 to 38"):
        estimate_of(micro_config, tokens=99)


def invoke(*args):
    return CliRunner().invoke(main, ["plan", *map(str, args)])


def test_the_command_as_json(micro_bundle):
    result = invoke(micro_bundle.path, "--device", "orin-nano", "--prompts", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["is_estimate"] is True
    assert [stage["graph"] for stage in found["stages"]] == list(found["engine_bytes"])
    total = sum(stage["roofline_ms"] for stage in found["stages"])
    assert found["end_to_end"]["roofline_ms"] == pytest.approx(total)
    for stage in (*found["stages"], found["end_to_end"]):
        assert stage["roofline_ms"] < stage["expected_low_ms"] < stage["expected_high_ms"]
    assert all(factor["source"] for factor in found["factors"].values())
    assert found["device"]["source"]
    assert found["options"]["tokens"] == 38
    assert found["dram"]["run"]["fits"] is True


def test_the_command_for_people(micro_bundle):
    result = invoke(micro_bundle.path, "--device", "thor", "--precision", "int8")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ESTIMATE for tap_micro in int8 on Jetson AGX Thor")
    assert "INT8 covers every stored weight" in result.stdout
    assert "DRAM to build: " in result.stdout
    assert "54 to 62 % of the FP16 peak" in result.stdout


def test_a_model_by_its_name_is_a_model_by_its_bundle(micro_bundle, assets):
    by_bundle = invoke(micro_bundle.path, "--device", "thor")
    by_config = invoke("--model", assets["config"], "--device", "thor")
    assert by_config.exit_code == by_bundle.exit_code == 0, by_config.output
    assert by_config.stdout == by_bundle.stdout


def test_a_build_that_does_not_fit_names_remedies():
    text = invoke("--model", "tap_vit_h", "--device", "orin-nano").stdout
    assert "DOES NOT FIT; add swap, reduce --workspace or --max-prompts, or build on a " in text
    text = invoke("--model", "tap_vit_h", "--device", "orin-nano", "--max-prompts", "4096").stdout
    assert "DOES NOT FIT; reduce --max-prompts\n" in text


def test_a_bundle_with_int8_says_what_it_covers(micro_bundle, tmp_path):
    folder = shutil.copytree(micro_bundle.path, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    nodes = {
        "image_encoder": ["blocks.0.mlp.fc1/MatMul"],
        "prompt_decoder": [],
        "text_decoder": ["text_proj/Gemm"],
    }
    made = {name: {"quantized_nodes": chosen} for name, chosen in nodes.items()}
    manifest["precisions"]["int8"] = {"graphs": made}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    few = invoke(folder, "--device", "thor", "--precision", "int8")
    assert "INT8 covers the quantized layers of the bundle" in few.stdout
    few = json.loads(invoke(folder, "--device", "thor", "--precision", "int8", "--json").stdout)
    fp16 = json.loads(invoke(folder, "--device", "thor", "--json").stdout)
    c = micro_bundle.config
    narrow = {"image_encoder": 4 * c.encoder_dim**2, "text_decoder": c.text_dim * c.vocab_size}
    for name, size in fp16["engine_bytes"].items():
        assert size - few["engine_bytes"][name] == pytest.approx(1.02 * narrow.get(name, 0), abs=2)
    work = 2 * c.grid_size**2 * narrow["image_encoder"]
    device = device_profile("thor")
    saved_ms = 1e3 * work * (1 / device.peak_flops("fp16") - 1 / device.peak_flops("int8"))
    compute = [found["stages"][0]["compute_ms"] for found in (fp16, few)]
    assert compute[0] - compute[1] == pytest.approx(saved_ms)


@pytest.mark.parametrize("variant", ["int8", "int8_fp32"])
def test_graphs_that_a_verdict_made_float_are_not_in_int8(micro_bundle, variant):
    nodes = {"image_encoder": ("blocks.0.mlp.fc1/MatMul",), "text_decoder": ("text_proj/Gemm",)}
    record = PrecisionRecord(
        graphs={name: Int8GraphRecord(quantized_nodes=found) for name, found in nodes.items()},
        mix={"image_encoder": "fp16", "text_decoder": variant},
    )
    manifest = dataclasses.replace(micro_bundle.manifest, precisions={variant: record})
    assert quantized_nodes(manifest, variant) == {"text_decoder": ("text_proj/Gemm",)}
    # A verdict on a CPU says nothing about the engines of a bundle without fp16 graphs.
    expected = nodes if variant == "int8_fp32" else {"text_decoder": ("text_proj/Gemm",)}
    assert quantized_nodes(manifest) == expected


def test_a_bundle_without_int8_says_nothing_of_it(micro_bundle):
    assert quantized_nodes(micro_bundle.manifest) is None


def test_before_any_export_without_onnx_and_torch(tmp_path):
    """The largest published model, on a machine that has the base installation only."""
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from tap_deploy.cli import main; main()"
    )
    command = ["plan", "--model", "tap_vit_h", "--device", "orin-nano", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["stages"][0]["gflop"] == pytest.approx(5516, rel=0.001)
    assert found["engine_bytes"]["image_encoder"] == pytest.approx(2 * 691.7e6, rel=0.03)
    assert not found["dram"]["build"]["fits"]
    assert found["dram"]["run"]["fits"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "toaster", "--model", "tap_vit_b"], "expected one of orin-nano, orin-nx"),
        (["--device", "thor"], "pass either a bundle or --model"),
        (["--device", "thor", "bundle", "--model", "tap_vit_b"], "pass either a bundle or --model"),
        (["--device", "thor", "--model", "tap_vit_x"], "'tap_vit_x' is neither one of tap_vit_b,"),
        (["--device", "thor", "--model", "notes.txt"], "notes.txt cannot be read as JSON"),
        (["--device", "thor", "--model", "size.json"], "config field image_size is '1k'"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("large", "utf-8")
    sizes = VARIANTS["tap_vit_b"].to_dict() | {"image_size": "1k"}
    (tmp_path / "size.json").write_text(json.dumps(sizes), "utf-8")
    result = invoke(*args)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
