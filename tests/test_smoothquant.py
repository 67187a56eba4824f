"""SmoothQuant leaves the fp32 graph as it is, and moves outliers where int8 holds them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.smoothing.channels import measure_channels
from tap_deploy.engines.smoothing.smoothed_variant import ON, smoothed_variant
from tap_deploy.engines.smoothing.smoothquant import (
    MIN_GAIN,
    Smoothing,
    choose_smoothings,
    fold,
    quantization_error,
    smoothing_factors,
    smoothing_points,
)
from tap_deploy.errors import InputError
from tap_deploy.graphs import IMAGE_ENCODER, PROMPT_DECODER, TEXT_DECODER
from tap_deploy.sessions.opening import create_session, sessions_from_variant
from tap_deploy.storage.files import sha256_of_file

ROWS = 64


def encoder(micro_bundle: Bundle) -> ir.Model:
    return micro_bundle.variant("fp32").load(IMAGE_ENCODER)


def test_points_are_norms_that_only_products_read(micro_bundle):
    names = [str(point.norm.name) for point in smoothing_points(encoder(micro_bundle))]
    depth = micro_bundle.config.encoder_depth
    # The last norm goes into a convolution and a shortcut: nothing to fold into.
    assert names == [f"blocks.{i}.norm{k}/LayerNormalization" for i in range(depth) for k in (1, 2)]
    text = ir.load(micro_bundle.variant("fp32").path(TEXT_DECODER))
    assert len(smoothing_points(text)) == 2 * micro_bundle.config.text_depth + 1
    prompts = ir.load(micro_bundle.variant("fp32").path(PROMPT_DECODER))
    assert smoothing_points(prompts) == []  # post-norm: the residual stream reads every norm


@pytest.mark.parametrize("graph", [IMAGE_ENCODER, TEXT_DECODER])
def test_folding_changes_no_fp32_output(micro_bundle, tmp_path, graph):
    path = micro_bundle.variant("fp32").path(graph)
    model, rng = ir.load(path), np.random.default_rng(0)
    for point in smoothing_points(model):
        channels = point.weights().shape[0]
        factors = rng.uniform(0.05, 20, channels).astype(np.float32)
        fold(model, point.smoothing(factors))
    ir.save(model, tmp_path / "smooth.onnx")
    spec = micro_bundle.variant("fp32").specs[graph]
    feeds = {}
    for tensor in spec.inputs:
        shape = [axis if isinstance(axis, int) else 1 for axis in tensor.shape]
        high = 2 if tensor.dtype == "int32" else 255
        feeds[tensor.name] = (rng.random(shape) * high).astype(tensor.dtype)
    before = create_session("onnxruntime", path, spec, threads=1).run(feeds)
    after = create_session("onnxruntime", tmp_path / "smooth.onnx", spec, threads=1).run(feeds)
    for tensor in spec.outputs:
        scale = np.abs(before[tensor.name]).max()
        assert np.abs(after[tensor.name] - before[tensor.name]).max() <= 1e-5 * scale


def test_outlier_channels_lose_most_of_their_noise(micro_bundle):
    point = smoothing_points(encoder(micro_bundle))[0]
    weights = point.weights()
    maxima = np.ones(len(weights), np.float32)
    maxima[5] = 100
    factors = smoothing_factors(point, maxima)
    assert factors[5] == pytest.approx(
        10 * np.median(factors) * _weight_ratio(weights, 5), rel=1e-3
    )
    rows = np.random.default_rng(0).uniform(-1, 1, (ROWS, len(weights))).astype(np.float32)
    rows[:, 5] *= 100
    plain = quantization_error(rows, weights, maxima, np.ones_like(factors))
    assert quantization_error(rows, weights, maxima, factors) < 0.5 * plain


def _weight_ratio(weights: np.ndarray, channel: int) -> float:
    """Return the influence of the weights on the factor of a channel, relative to the median."""
    peaks = np.abs(weights).max(axis=1)
    return float(np.sqrt(np.median(peaks) / peaks[channel]))


def test_alpha_decides_who_carries_the_outlier(micro_bundle):
    point = smoothing_points(encoder(micro_bundle))[0]
    maxima = np.linspace(1, 30, len(point.weights()))
    evened = maxima / smoothing_factors(point, maxima, alpha=1)
    assert evened.std() < 1e-3 * evened.mean()  # all in the weights
    weights = point.weights() * smoothing_factors(point, maxima, alpha=0)[:, None]
    peaks = np.abs(weights).max(axis=1)
    assert peaks.std() < 1e-3 * peaks.mean()  # all in the activations


def test_dead_channels_are_left_alone(micro_bundle):
    point = smoothing_points(encoder(micro_bundle))[0]
    maxima = np.ones(len(point.weights()), np.float32)
    maxima[[0, 7]] = 0
    factors = smoothing_factors(point, maxima)
    assert factors[[0, 7]].tolist() == [1, 1]
    assert np.isfinite(factors).all() and (factors > 0).all()


def test_smoothing_is_kept_only_where_rows_that_were_held_back_gain(micro_bundle):
    model = encoder(micro_bundle)
    points = smoothing_points(model)
    rng, channels = np.random.default_rng(1), len(points[0].weights())
    flat = rng.uniform(-1, 1, (ROWS, channels)).astype(np.float32)
    spiky = flat.copy()
    spiky[:, 9] *= 80
    # The first point has an outlier. The second has none; ranges that claim one mislead it.
    rows = {points[0].tensor: spiky, points[1].tensor: flat}
    misled = np.ones(channels, np.float32)
    misled[:-1] = 1e-3
    maxima = {points[0].tensor: np.abs(spiky).max(axis=0), points[1].tensor: misled}
    before = [point.weights().copy() for point in points[:2]]
    smoothings, choices = choose_smoothings(model, maxima, rows)
    for smoothing in smoothings:
        fold(model, smoothing)
    assert [choice.kept for choice in choices] == [True, False]
    assert choices[0].smoothed_error < (1 - MIN_GAIN) * choices[0].error
    assert not np.array_equal(points[0].weights(), before[0])
    assert np.array_equal(points[1].weights(), before[1])
    forced, _ = choose_smoothings(encoder(micro_bundle), maxima, rows, always=True)
    assert len(forced) == 2


def test_wrong_ranges_and_alpha_are_refused(micro_bundle):
    point = smoothing_points(encoder(micro_bundle))[0]
    with pytest.raises(InputError, match="alpha is"):
        smoothing_factors(point, np.ones(len(point.weights())), alpha=1.5)
    with pytest.raises(InputError, match="channel maxima"):
        smoothing_factors(point, np.ones(3))
    with pytest.raises(InputError, match="channel maxima"):
        smoothing_factors(point, np.full(len(point.weights()), np.nan))


def test_the_same_can_be_done_to_a_graph_of_halves(micro_bundle):
    model = encoder(micro_bundle)
    point = smoothing_points(model)[0]
    for value in (*point.norm.inputs[1:], point.products[0].inputs[1]):
        half = value.const_value.numpy().astype(np.float16)
        value.const_value = ir.tensor(half, name=value.name)
    factors = np.full(len(point.weights()), 4, np.float32)
    before = point.weights()
    fold(model, point.smoothing(factors))
    assert point.weights().dtype == np.float16
    assert np.array_equal(point.weights(), 4 * before)
    with pytest.raises(InputError, match="no node 'nowhere'"):
        fold(model, Smoothing(norm="nowhere", products=(), factors=factors))


def test_the_chain_measures_every_point_with_rows_of_other_pictures(micro_bundle, photo, tmp_path):
    from PIL import Image

    picture = Image.open(photo).convert("RGB")
    for index in range(2):
        picture.rotate(90 * index).save(tmp_path / f"{index}.png")
    images = CalibrationImages.from_path(tmp_path)
    seen: list[tuple[int, int]] = []
    found = measure_channels(
        micro_bundle.variant("fp32"),
        images,
        threads=1,
        on_progress=lambda *progress: seen.append(progress),
    )
    assert seen == [(0, 2), (1, 2)]
    points = smoothing_points(encoder(micro_bundle))
    assert set(found[IMAGE_ENCODER].maxima) == {point.tensor for point in points}
    assert len(found[TEXT_DECODER].maxima) == 2 * micro_bundle.config.text_depth + 1
    assert not found[PROMPT_DECODER].maxima
    for name, maxima in found[IMAGE_ENCODER].maxima.items():
        rows = found[IMAGE_ENCODER].rows[name]
        assert maxima.shape == rows.shape[1:] and len(rows) > 1
    # With one picture there is none to hold back, and nothing to go by.
    alone = measure_channels(micro_bundle.variant("fp32"), images.first(1), threads=1)
    assert not alone[IMAGE_ENCODER].maxima


@pytest.mark.parametrize("beside", [False, True])
def test_smoothed_graphs_are_recorded_as_they_are(micro_bundle, pictures, monkeypatch, beside):
    """Sizes and hashes are those of the smoothed files; the third graph is the bundle's."""
    if beside:
        monkeypatch.setattr("tap_deploy.bundle.graph_files.EXTERNAL_DATA_BYTES", 0)
    fp32, images = micro_bundle.variant("fp32"), CalibrationImages.from_path(pictures)
    with smoothed_variant(fp32, images, ON, threads=1) as smoothed:
        found = smoothed.variant
        assert set(smoothed.smoothings) == {IMAGE_ENCODER, TEXT_DECODER}
        assert found.file_records[PROMPT_DECODER] == fp32.file_records[PROMPT_DECODER]
        for graph in smoothed.smoothings:
            assert found.digests(graph) != fp32.digests(graph)
            assert len(found.files(graph)) == 1 + beside
            for path, record in found.file_records[graph].items():
                assert record.size_bytes == path.stat().st_size
                assert record.sha256 == sha256_of_file(path)
            assert found.records[graph].num_nodes == len(found.load(graph).graph)
        for session in sessions_from_variant(found, threads=1).values():
            session.close()
        folder = found.path(IMAGE_ENCODER).parent
    assert not folder.exists()


def test_smoothing_the_same_gives_the_same_files(micro_bundle, pictures):
    """A calibration cache identifies graphs by their hashes."""
    fp32, images = micro_bundle.variant("fp32"), CalibrationImages.from_path(pictures)
    digests = []
    for _ in range(2):
        with smoothed_variant(fp32, images, ON, threads=1) as smoothed:
            digests.append([smoothed.variant.digests(graph) for graph in fp32.specs])
    assert digests[0] == digests[1]
