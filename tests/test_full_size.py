"""The published sizes, on synthetic weights: minutes and gigabytes, so run by hand.

    scripts/test -m slow -s

prints the times and peaks that it measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from tap_deploy import Prompts, TapPredictor, Vocabulary, graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli.prompt_options import load_sketch
from tap_deploy.config import VARIANTS
from tap_deploy.engines.estimate.work import graph_works
from tap_deploy.image import load_image, model_image
from tap_deploy.masks import masks_from_logits, select_mask_token

TOLERANCE = 1e-3
GIGABYTE = 1e9

CLI = "from tap_deploy.cli import main; main()"
# Runs a command line and prints its peak memory in bytes; Linux counts ru_maxrss in KiB.
MEASURED = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run([sys.executable, '-c', sys.argv[1], *sys.argv[2:]]).returncode\n"
    "print('PEAK', 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(code)\n"
)


def measured(code, *args):
    """Run Python code in a process of its own; return its output, seconds and peak bytes."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    output, _, peak = result.stdout.rpartition("PEAK ")
    return output, seconds, int(peak)


def export(name, folder):
    args = ("export", "--model", name, "--synthetic-weights", 0, "-o", folder, "--json")
    output, seconds, peak = measured(CLI, *args)
    print(
        f"\n{name}: exported and checked in {seconds:.0f} s, peak memory {peak / GIGABYTE:.1f} GB"
    )
    return json.loads(output), peak


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit_b") / "bundle"
    result, _ = export("tap_vit_b", folder)
    assert result["verification"]["passed"]
    return Bundle.open(folder)


def test_vit_b_verifies_without_torch(vit_b):
    without = "import sys; sys.modules['torch'] = sys.modules['onnx'] = None; "
    output, seconds, peak = measured(without + CLI, "verify", vit_b.path, "--json")
    assert json.loads(output)["passed"]
    print(f"\nverify: {seconds:.0f} s, peak memory {peak / GIGABYTE:.1f} GB")


def test_vit_b_predicts_a_photograph_like_the_reference(vit_b, photo):
    """Every stage within 1e-3 of PyTorch on a real picture, and the same tokens."""
    from tap_deploy.reference.synthetic import synthetic_model

    model = synthetic_model(VARIANTS["tap_vit_b"], 0)
    rgb = load_image(photo)
    prompts = Prompts.concatenate(
        [
            Prompts.from_points([[[285, 160, 1]]]),
            Prompts.from_boxes([[172, 17, 412, 308]]),
            Prompts.from_sketches(load_sketch(photo.parent / "sketch.json")),
        ]
    )
    weights = np.random.default_rng(0).standard_normal((1024, 50)).astype(np.float32)
    concepts = Vocabulary(weights=weights, names=tuple(f"concept {i}" for i in range(50)))
    with TapPredictor.from_bundle(vit_b.path) as predictor:
        encoded = predictor.encode(rgb)
        regions = predictor.predict(encoded, prompts=prompts, vocabulary=concepts, top_k=3)
    images, frame = model_image(rgb, 1024)
    with torch.inference_mode():
        embeddings = model.encode_image(torch.from_numpy(images))
        outputs = model.decode_prompts(
            embeddings,
            torch.from_numpy(prompts.model_coords(frame.scale)),
            torch.from_numpy(prompts.labels),
        )
        selected = select_mask_token(outputs.iou_predictions.numpy(), prompts.labels)
        rows, index = torch.arange(3), torch.from_numpy(selected)
        chosen = {name: value[rows, index] for name, value in outputs._asdict().items()}
        ids = model.generate(chosen["semantic_tokens"]).numpy()
    np.testing.assert_array_equal(regions.mask_index, selected)
    stages = {"image_embeddings": (encoded.image_embeddings, embeddings)}
    stages |= {name: (getattr(regions, name), value) for name, value in chosen.items()}
    for name, (actual, expected) in stages.items():
        difference = float(np.abs(actual - expected.numpy()).max())
        print(f"\n{name}: max abs {difference:.2e}", end="")
        assert difference <= TOLERANCE, name
    expected_names = concepts.top_k(chosen["semantic_embeddings"].numpy(), 3)
    assert [[n for n, _ in row] for row in regions.concepts] == [
        [n for n, _ in row] for row in expected_names
    ]
    masks = masks_from_logits(chosen["low_res_masks"].numpy(), frame)
    assert (masks != regions.masks).mean() <= 1e-4
    np.testing.assert_array_equal(regions.caption_ids, ids)


def test_vit_b_stays_under_its_memory_cap(vit_b, photo):
    """64 prompts under 400 MB: the graph's working memory is bounded, the weights come on top."""
    code = """
import resource, sys, numpy as np
from tap_deploy import TapPredictor
limit = int(sys.argv[3])
predictor = TapPredictor.from_bundle(sys.argv[1], memory_limit_bytes=limit, check_hashes=False)
encoded = predictor.encode(sys.argv[2])
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
points = np.ones((64, 1, 3)) * [[[285, 160, 1]]]
regions = predictor.predict(encoded, points, masks="rle", captions=False)
assert len(regions) == 64
print(peak() - before)
"""
    limit = 400_000_000
    output, _, _ = measured(code, vit_b.path, photo, limit)
    kept = 64 * 4 * (256 * 256 + 1024)  # size of the regions themselves
    print(
        f"\n64 prompts: {int(output) / 1e6:.0f} MB above the encoder's peak, cap {limit / 1e6:.0f}"
    )
    assert int(output) <= 1.25 * limit + 2 * kept


def test_vit_b_has_the_weights_that_the_formulas_give(vit_b):
    works = graph_works(vit_b.config, prompts=1, points=2, slots=40)
    for name, record in vit_b.manifest.graphs["fp32"].items():
        # Both final attentions have the same biases and norm, which are stored once.
        shared = 4 * vit_b.config.image_embed_dim if name == graphs.PROMPT_DECODER else 0
        elements = works[name].weight_elements - shared
        assert 4 * elements == pytest.approx(record.weights_bytes, rel=1e-4)


@pytest.fixture(scope="module")
def vit_b_fp16(vit_b, photo):
    """Converts in a separate process, to measure its peak memory."""
    args = ("convert", vit_b.path, "--precision", "fp16", "--samples", photo, "--json")
    output, seconds, peak = measured(CLI, *args)
    result = json.loads(output)["precisions"]["fp16"]
    print(f"\nfp16: made and checked in {seconds:.0f} s, peak memory {peak / GIGABYTE:.1f} GB")
    for check in result["verification"]["checks"]:
        print(
            f"  {check['graph']} {check['tensor']}: max rel {check['max_rel']:.1e}, "
            f"mean rel {check['mean_rel']:.1e} {check['note']}"
        )
    return Bundle.open(vit_b.path), result, peak


def test_vit_b_in_fp16_is_like_the_reference(vit_b_fp16):
    """Every output, with every value rounded to fp16."""
    bundle, result, peak = vit_b_fp16
    assert result["verification"]["passed"]
    for name in graphs.GRAPH_NAMES:
        sizes = [bundle.manifest.graphs[v][name].weights_bytes for v in ("fp32", "fp16")]
        assert sizes[1] < 0.55 * sizes[0]
    assert peak < 8e9


@pytest.fixture(scope="module")
def vit_b_int8(vit_b_fp16, photo):
    """Quantized on one photograph: enough for ranges, too few for a verdict."""
    path = vit_b_fp16[0].path
    args = ("quantize", path, "--calibration-data", photo, "--no-verdict", "--smoothquant", "off")
    _, seconds, peak = measured(CLI, *args, "--method", "max", "--json")
    print(f"\nint8: made in {seconds:.0f} s, peak memory {peak / GIGABYTE:.1f} GB")
    assert peak < 6e9
    return Bundle.open(path)


def test_vit_b_runs_in_int8_on_a_cpu(vit_b_int8, photo):
    """Synthetic weights have no right answer, but the embeddings must be close to fp32."""
    found = {}
    for precision in ("fp32", "int8"):
        with TapPredictor.from_bundle(vit_b_int8.path, precision=precision) as predictor:
            found[precision] = predictor.predict(photo, boxes=[[172, 17, 412, 308]])
            encoded = predictor.encode(photo).image_embeddings
            found[precision, "embeddings"] = encoded
    noise = found["int8", "embeddings"] - found["fp32", "embeddings"]
    signal = found["fp32", "embeddings"]
    sqnr_db = 10 * np.log10(np.square(signal).mean() / np.square(noise).mean())
    print(f"\nimage embeddings in int8: {sqnr_db:.1f} dB above their noise")
    assert sqnr_db > 20
    assert np.isfinite(found["int8"].low_res_masks).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_vit_b_builds_with_tensorrt_rtx(vit_b_int8, precision):
    """All three graphs, in a process of their own, below the memory that was forecast."""
    pytest.importorskip("tensorrt_rtx")
    bundle = vit_b_int8
    build = ("build", bundle.path, "--backend", "tensorrt_rtx", "--precision", precision)
    build += ("--workspace", "2GiB", "--json")  # needed by the prompt decoder in fp32
    planned, _, _ = measured(CLI, *build, "--dry-run")
    forecast = max(p["memory_forecast_bytes"] for p in json.loads(planned)["builds"])
    output, seconds, peak = measured(CLI, *build, "--force", "--force-memory")
    print(
        f"\n{precision}: TensorRT-RTX engines in {seconds:.1f} s, peak memory "
        f"{peak / GIGABYTE:.2f} GB, forecast {forecast / GIGABYTE:.2f} GB"
    )
    for engine in json.loads(output)["engines"]:
        weights = bundle.manifest.graphs[precision][engine["graph"]].weights_bytes
        print(
            f"{engine['graph']}: {engine['size_bytes'] / 1e6:.0f} MB "
            f"in {engine['build_seconds']:.1f} s"
        )
        assert engine["size_bytes"] > 0.9 * weights
    assert peak <= forecast


def test_vit_h_exports_with_external_data(tmp_path):
    result, peak = export("tap_vit_h", tmp_path / "bundle")
    assert result["verification"]["passed"]
    record = result["graphs"]["fp32"]["image_encoder"]
    assert record["external_data"]
    assert record["weights_bytes"] > 2_600_000_000
    files = Bundle.open(tmp_path / "bundle").manifest.files
    assert files["onnx/fp32/image_encoder.onnx.data"].size_bytes > 2_600_000_000
    assert files["onnx/fp32/image_encoder.onnx"].size_bytes < 10_000_000
    assert peak < 14e9
