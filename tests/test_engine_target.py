"""Build targets, profiles, estimates, GPUs, and NVIDIA's own commands."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tap_deploy import graphs
from tap_deploy.config import VARIANTS
from tap_deploy.engines.build.bundle_build import graph_builds
from tap_deploy.engines.build.emit import tool_command
from tap_deploy.engines.build.inspection import precisions_from_json
from tap_deploy.engines.build.profiles import optimization_profile
from tap_deploy.engines.build.target import (
    BuildTarget,
    bytes_from_text,
    compute_capabilities_from_text,
)
from tap_deploy.engines.estimate.memory import available_memory, build_memory_bytes, check_memory
from tap_deploy.errors import InputError
from tap_deploy.machine import gpu as gpu_module
from tap_deploy.machine.gpu import gpu_from_driver, local_gpu
from tap_deploy.machine.host import Host

GIB = 1 << 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of tensorrt, tensorrt_rtx"),
        ({"precision": "bf16"}, "unknown precision"),
        ({"max_prompts": 0}, "max_prompts is 0; expected 1 to 1048576"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        ({"workspace_bytes": 10**15}, "expected 1 to 281474976710656"),
        ({"max_prompts": 10**7}, "max_prompts is 10000000; expected 1 to 1048576"),
        ({"max_images": 10**7}, "max_images is 10000000; expected 1 to 1048576"),
        ({"max_points": 10**7}, "max_points is 10000000; expected 1 to 1048576"),
        ({"opt_level": 6}, "opt_level is 6; expected 0 to 5"),
        ({"hardware_compatible": "turing+"}, "expected one of ampere"),
        ({"compute_capabilities": ("8.6",)}, "does not support --compute-capability"),
        ({"backend": "tensorrt_rtx", "version_compatible": True}, "no --version-compatible"),
        ({"backend": "tensorrt_rtx", "hardware_compatible": "ampere+"}, "no --hardware-compat"),
        ({"backend": "tensorrt_rtx", "timing_cache": pathlib.Path("f")}, "no --timing-cache"),
        (
            {"backend": "tensorrt_rtx", "compute_capabilities": ("86",)},
            "is '86'; expected one like 8.6",
        ),
        (
            {"backend": "tensorrt_rtx", "compute_capabilities": ("current", "8.6")},
            "cannot be combined",
        ),
    ],
)
def test_targets_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        BuildTarget(**settings)


def test_options_build_the_same_again():
    assert BuildTarget().options() == []
    target = BuildTarget(
        backend="tensorrt_rtx", precision="fp32", max_prompts=8, tf32=True,
        compute_capabilities=("8.6", "12.0"), workspace_bytes=1 << 20,
    )  # fmt: skip
    assert shlex.join(target.options()) == (
        "--max-prompts 8 --workspace 1048576 --compute-capability 8.6,12.0 --tf32"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("86,89", ("8.6", "8.9")),
        ("8.6, sm120", ("8.6", "12.0")),
        ("current", ("current",)),
        ("86,8.6", ("8.6",)),
    ],
)
def test_compute_capabilities(text, expected):
    assert compute_capabilities_from_text(text) == expected


@pytest.mark.parametrize("text", ["", "8", "ampere", "86,", "8.60"])
def test_no_compute_capabilities(text):
    with pytest.raises(InputError, match="expected one like 86"):
        compute_capabilities_from_text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1GiB", GIB),
        ("512MiB", GIB // 2),
        ("0.5g", GIB // 2),
        ("1048576", 1 << 20),
        ("64 KB", 65536),
    ],
)
def test_sizes(text, expected):
    assert bytes_from_text(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1TiB", "a lot"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="expected a number with a unit, like 512MiB"):
        bytes_from_text(text)


def test_profiles_cover_every_call_of_the_predictor():
    config = VARIANTS["tap_vit_b"]
    specs = graphs.graph_specs(config)
    target = BuildTarget(max_prompts=64, max_points=16)
    profiles = {n: optimization_profile(s, target, config) for n, s in specs.items()}
    for name, spec in specs.items():
        assert set(profiles[name]) == {tensor.name for tensor in spec.inputs}
    past = profiles[graphs.TEXT_DECODER][graphs.past_names(config)[0]]
    # The whole cache, as CUDA graphs want it, or one that grows.
    assert str(past) == "min 1x8x1x64 opt 16x8x40x64 max 64x8x40x64"
    noise = profiles[graphs.TEXT_DECODER][graphs.GUMBEL_NOISE]
    assert str(noise) == "min 1x1 opt 16x1 max 64x64"
    request = profiles[graphs.PROMPT_DECODER][graphs.MASK_REQUEST]
    assert str(request) == "min 1x1 opt 16x1 max 64x4"
    rows = profiles[graphs.PROMPT_DECODER][graphs.MASK_ROWS]
    assert str(rows) == "min 1 opt 16 max 64"
    assert profiles[graphs.IMAGE_ENCODER][graphs.IMAGES].max == (1, 1024, 1024, 3)
    coords = profiles[graphs.PROMPT_DECODER][graphs.POINT_COORDS]
    assert str(coords) == "min 1x1x2 opt 16x2x2 max 64x16x2"


def test_the_usual_size_is_never_beyond_the_largest():
    config = VARIANTS["tap_vit_b"]
    spec = graphs.graph_specs(config)[graphs.PROMPT_DECODER]
    target = BuildTarget(max_prompts=4, max_points=1)
    coords = optimization_profile(spec, target, config)[graphs.POINT_COORDS]
    assert (coords.min, coords.opt, coords.max) == ((1, 1, 2), (4, 1, 2), (4, 1, 2))


def test_the_forecast_follows_weights_and_workspace():
    assert build_memory_bytes(GIB, workspace_bytes=0) == 4.5 * GIB
    assert build_memory_bytes(GIB, workspace_bytes=2 * GIB) == 6.5 * GIB


def test_free_memory_is_memory_and_swap_but_not_zram(tmp_path):
    meminfo, swaps = tmp_path / "proc/meminfo", tmp_path / "proc/swaps"
    host = Host(root=tmp_path)
    assert available_memory(host) is None
    meminfo.parent.mkdir()
    meminfo.write_text("MemTotal:  8000 kB\nMemAvailable:   3000 kB\nSwapFree:  1900 kB\n")
    assert available_memory(host) == 3000 * 1024
    swaps.write_text(
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/zram0                              partition\t1000\t\t100\t\t5\n"
        "/swapfile                               file\t\t1200\t\t200\t\t-2\n"
    )
    assert available_memory(host) == 4000 * 1024
    meminfo.write_text("MemTotal:  8000 kB\n")
    assert available_memory(host) is None


def test_the_refusal_says_what_to_do():
    check_memory(GIB, None, "fp32")
    check_memory(GIB, GIB, "fp32")
    with pytest.raises(InputError) as refused:
        check_memory(5 * GIB, GIB, "fp32")
    for part in ("5.0 GiB", "1.0 GiB", "fallocate -l 4G", "--precision fp16", "--workspace",
                 "another machine", "--force-memory"):  # fmt: skip
        assert part in str(refused.value)


class FakeDriver:
    """As ``libcuda.so.1`` answers on an Orin; ``status`` is what ``cuInit`` returns."""

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGet(self, device, ordinal):
        return 0

    def cuDeviceGetName(self, name, length, device):
        ctypes.memmove(name, b"Orin\0", 5)
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 12060
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 7, 18: 1}[attribute]
        return 0


def test_the_driver_is_asked_for_the_gpu(monkeypatch):
    monkeypatch.setattr(gpu_module, "_driver_release", lambda: "540.4.0")
    assert dataclasses.asdict(gpu_from_driver(FakeDriver())) == {
        "name": "Orin",
        "compute_capability": "8.7",
        "driver": "540.4.0 (CUDA 12.6)",
        "integrated": True,
    }
    assert gpu_from_driver(FakeDriver(status=100)) is None  # CUDA_ERROR_NO_DEVICE


def test_no_driver_is_no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_module, "_LIBRARY", "libno-such-driver.so.1")
    assert local_gpu() is None


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release", "540.4.0"),
        ("nothing", None),
    ],
)
def test_the_release_of_the_driver(tmp_path, line, release):
    path = tmp_path / "version"
    path.write_text(line)
    assert gpu_module._driver_release(path) == release
    assert gpu_module._driver_release(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no JSON", None),
        ("[]", None),
        ('{"Layers": []}', {}),
        ('{"Layers": ["a", {"Outputs": []}, {"Outputs": ["b"]}]}', {"unknown": 3}),
        ('{"Layers": [{"Outputs": [{"Format/Datatype": "Float"}]}]}', {"fp32": 1}),
        ('{"Layers": [{"Outputs": [{"Format/Datatype": "BFloat16"}]}]}', {"bf16": 1}),
        ('{"Layers": [{"Outputs": [{"DataType": "Half", "Format": "FP32"}]}]}', {"fp16": 1}),
        ('{"Layers": [{"Outputs": [{"DataType": "Int32"}]}]}', {"int32": 1}),
    ],
)
def test_the_inspectors_json(text, expected):
    assert precisions_from_json(text) == expected


I8_TACTIC = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64"
DYNAMIC = "N/A due to dynamic shapes"


@pytest.mark.parametrize(
    ("expected", "reads", "gives", "layer"),
    [
        # A product of int8 is one, whatever it gives.
        ("int8", "Int8", "Half", {"LayerType": "fusion", "TacticName": I8_TACTIC}),
        ("int8", DYNAMIC, DYNAMIC, {"LayerType": "gemm", "TacticName": I8_TACTIC}),
        ("int8", "Int8", "Half", {"LayerType": "gemm"}),
        ("int8", "Int8", "Half", {"LayerType": "CaskConvolution", "TacticName": "0x1f"}),
        ("int8", "Int8", "Int8", {"LayerType": "kgen", "Name": "__myl_FcCastAddErf_myl0_4"}),
        ("int8", "Int8", "Half", {"Metadata": "[ONNX Layer: blocks.0.attn.qkv/MatMul_3]"}),
        # Floats between Q and DQ are floats.
        ("fp32", "Int8", "Float", {"LayerType": "CaskConvolution", "TacticName": "f32f32_tf32f32"}),
        ("fp16", "Int8", "Half", {"LayerType": "gemm", "TacticName": "ampere_h16816gemm_128x64"}),
        ("fp16", "Half", "Int8", {"LayerType": "kgen", "Name": "__myl_CastMulMeanQuantize_myl0_2"}),
        ("fp16", "Int8", "Half", {"LayerType": "kgen", "Name": "__myl_ConvertAddCast_myl0_3"}),
        ("fp16", "Int8", "Half", {"Metadata": "[ONNX Layer: cross_conv.2.conv1/Conv/Mul]"}),
        ("unknown", "Int8", "Int8", {"LayerType": "PointWiseV2"}),
        # A Q or DQ that stands alone computes nothing.
        ("conversion", "Float", "Int8", {"LayerType": "Reformat", "Origin": "QDQ"}),
        ("conversion", "Int8", "Half", {"LayerType": "NoOp", "Origin": "QDQ"}),
    ],
)
@pytest.mark.parametrize("key", ["Format/Datatype", "DataType"])
def test_what_counts_as_int8(key, expected, reads, gives, layer):
    layer = {**layer, "Inputs": [{key: reads}], "Outputs": [{key: gives}]}
    assert precisions_from_json(json.dumps({"Layers": [layer]})) == {expected: 1}


def commands(bundle, tool, target):
    builds = graph_builds(bundle, target)
    texts = {build.graph: tool_command(tool, build, target) for build in builds}
    return {graph: shlex.split(text.replace("\\\n", "")) for graph, text in texts.items()}


def test_trtexec(micro_bundle, tmp_path):
    target = BuildTarget(
        precision="fp32", max_prompts=8, max_points=4, workspace_bytes=GIB // 2, opt_level=5,
        timing_cache=tmp_path / "t.cache", version_compatible=True, hardware_compatible="same-sm",
    )  # fmt: skip
    words = commands(micro_bundle, "trtexec", target)[graphs.PROMPT_DECODER]
    assert words == [
        "trtexec",
        f"--onnx={micro_bundle.variant('fp32').path(graphs.PROMPT_DECODER)}",
        "--saveEngine=prompt_decoder.plan",
        "--stronglyTyped",
        "--minShapes=point_coords:1x1x2,point_labels:1x1,mask_request:1x1,mask_rows:1",
        "--optShapes=point_coords:8x2x2,point_labels:8x2,mask_request:8x1,mask_rows:8",
        "--maxShapes=point_coords:8x4x2,point_labels:8x4,mask_request:8x4,mask_rows:8",
        "--memPoolSize=workspace:512M",
        "--builderOptimizationLevel=5",
        "--profilingVerbosity=detailed",
        "--noTF32",
        f"--timingCacheFile={tmp_path / 't.cache'}",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=sameComputeCapability",
        "--skipInference",
    ]


def test_the_tool_of_rtx(micro_bundle):
    target = BuildTarget(
        backend="tensorrt_rtx", precision="fp32", compute_capabilities=("8.6", "12.0")
    )
    words = commands(micro_bundle, "trtexec", target)[graphs.TEXT_DECODER]
    assert words[0] == "tensorrt_rtx"
    assert "--computeCapabilities=86,120" in words
    assert any(w.startswith("--maxShapes=semantic_tokens:64x64,input_ids:64,") for w in words)
    here = dataclasses.replace(target, compute_capabilities=("current",))
    assert "--useGpu" in commands(micro_bundle, "trtexec", here)[graphs.TEXT_DECODER]


def test_polygraphy(micro_bundle, tmp_path):
    target = BuildTarget(
        precision="fp32", timing_cache=tmp_path / "t.cache", hardware_compatible="ampere+"
    )
    words = commands(micro_bundle, "polygraphy", target)[graphs.TEXT_DECODER]
    text = " ".join(words)
    assert text.startswith("polygraphy convert ")
    shapes = "semantic_tokens:[1,64] input_ids:[1] gumbel_noise:[1,1] past_key_values.0.key:[1,2,1"
    assert f"--trt-min-shapes {shapes}" in text
    for option in (
        "--strongly-typed",
        "--pool-limit workspace:1073741824",
        "--builder-optimization-level 3",
        f"--load-timing-cache {tmp_path}/t.cache --save-timing-cache {tmp_path}/t.cache",
        "--hardware-compatibility-level ampere_plus",
    ):
        assert option in text
    assert "--tf32" not in words
    target = dataclasses.replace(target, tf32=True)
    assert "--tf32" in commands(micro_bundle, "polygraphy", target)[graphs.TEXT_DECODER]


def test_polygraphy_of_rtx(micro_bundle):
    target = BuildTarget(
        backend="tensorrt_rtx", precision="fp32", compute_capabilities=("8.6", "12.0")
    )
    text = " ".join(commands(micro_bundle, "polygraphy", target)[graphs.TEXT_DECODER])
    variables = "POLYGRAPHY_USE_TENSORRT_RTX=1 NVIDIA_TF32_OVERRIDE=0"
    assert text.startswith(f"env {variables} polygraphy convert ")
    assert "--compute-capabilities 8.6 12.0" in text
    target = dataclasses.replace(target, compute_capabilities=("current",), tf32=True)
    text = " ".join(commands(micro_bundle, "polygraphy", target)[graphs.TEXT_DECODER])
    assert text.startswith("env POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert ")
    assert "--use-gpu" in text
    assert "--tf32" in text


def test_polygraphy_itself_builds_for_the_gpus_that_are_asked_for(micro_bundle, tmp_path):
    """No fake: NVIDIA's tool and builder take the command as it is printed; no GPU is needed."""
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module)
    target = BuildTarget(
        backend="tensorrt_rtx", precision="fp32", compute_capabilities=("8.6", "8.9")
    )
    (build,) = (b for b in graph_builds(micro_bundle, target) if b.graph == graphs.TEXT_DECODER)
    result = subprocess.run(
        ["sh", "-c", tool_command("polygraphy", build, target)],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "compute capabilities: [(8, 6), (8, 9)]" in log
    assert "Disabling TF32" in log
    assert (tmp_path / "text_decoder.plan").stat().st_size > 0.9 * build.weights_bytes
