"""Calibration of the three graphs on real pictures, in bounded memory, with interruptions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from tap_deploy import graphs
from tap_deploy.bundle.graph_files import save_graph, write_model
from tap_deploy.engines.calibration import chain as calibration
from tap_deploy.engines.calibration import state as calibration_state
from tap_deploy.engines.calibration.chain import calibrate
from tap_deploy.engines.calibration.collecting_session import EXPECTED_SIZES, CollectingSession
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.pieces import SegmentedRun, num_values, segments_from_model
from tap_deploy.engines.qdq.chosen_nodes import default_selection, tensors_of_selection
from tap_deploy.errors import InputError
from tap_deploy.image import load_image, model_image
from tap_deploy.predictor import TapPredictor


@pytest.fixture
def images(pictures):
    return CalibrationImages.from_path(pictures)


@pytest.fixture(scope="module")
def fp32(micro_bundle):
    return micro_bundle.variant("fp32")


@pytest.fixture
def small(fp32):
    """Tensors of one block of each graph: enough to see the chain."""
    selected = default_selection(fp32)
    few = {
        name: dataclasses.replace(chosen, nodes=chosen.nodes[:4])
        for name, chosen in selected.items()
    }
    return tensors_of_selection(fp32, few)


def collecting_sessions(variant, tensors, **options):
    return {
        name: CollectingSession(variant, name, tensors.get(name, ()), threads=1, **options)
        for name in variant.specs
    }


def test_the_default_plan_has_all_its_ranges(fp32, ranges):
    for graph, tensors in tensors_of_selection(fp32, default_selection(fp32)).items():
        assert tensors <= ranges[graph].ranges.keys()
        assert ranges[graph].num_samples == 2
    assert set(ranges) == set(graphs.GRAPH_NAMES)


def test_ranges_are_what_the_graph_computes(micro_bundle, fp32, ranges, images):
    """The encoder, run by hand with one more output."""
    name = "gelu"
    model = fp32.load("image_encoder")
    value = next(v for n in model.graph for v in n.outputs if v.name == name)
    model.graph.outputs.append(value)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    largest = 0.0
    for path in images.paths:
        picture, _ = model_image(load_image(path), micro_bundle.config.image_size)
        largest = max(largest, float(np.abs(session.run([name], {"images": picture})[0]).max()))
    assert ranges["image_encoder"].ranges[name] == pytest.approx(largest, rel=1e-5)


def test_looking_changes_nothing(micro_bundle, fp32, predictor, photo, small):
    """Prompts, masks and generated text are those of the fp32 bundle in use."""
    sessions = collecting_sessions(fp32, small)
    with TapPredictor(sessions, micro_bundle.config) as looking:
        found = looking.predict(photo, boxes=[[10, 20, 300, 200], [5, 5, 90, 90]])
    expected = predictor.predict(photo, boxes=[[10, 20, 300, 200], [5, 5, 90, 90]])
    np.testing.assert_array_equal(found.caption_ids, expected.caption_ids)
    np.testing.assert_allclose(found.iou_predictions, expected.iou_predictions, atol=1e-5)
    assert all(h.total > 0 for s in sessions.values() for h in s.histograms.values())


def test_text_ranges_come_from_many_steps(micro_bundle, fp32, small, photo):
    sessions = collecting_sessions(fp32, small)
    with TapPredictor(sessions, micro_bundle.config) as looking:
        regions = looking.predict(photo, points=[[[9, 9, 1]]])
    steps = int((regions.caption_ids[0] != micro_bundle.config.pad_id).sum())
    assert steps > 2
    seen = sessions["text_decoder"].histograms["layer_norm"].total
    assert seen == steps * micro_bundle.config.text_dim


def test_small_pieces_find_the_same(micro_bundle, fp32, small, photo):
    limit = 200_000  # bytes: a few tensors
    whole = collecting_sessions(fp32, small)
    cut = collecting_sessions(fp32, small, limit_bytes=limit)
    for sessions in (whole, cut):
        with TapPredictor(sessions, micro_bundle.config) as looking:
            looking.predict(photo, points=[[[9, 9, 1]]], masks="rle")
    for graph, session in whole.items():
        for name, histogram in session.histograms.items():
            other = cut[graph].histograms[name]
            assert other.total == histogram.total
            assert other.amax == pytest.approx(histogram.amax, rel=1e-5)


def test_an_output_that_a_later_piece_reads_is_returned():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[4] x) => (float[4] y, float[4] z) { y = Neg(x) w = Abs(y) z = Sqrt(w) }
    """
    model = ir.from_onnx_text(text)
    for value in (value for node in model.graph for value in node.outputs):
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([4])
    segments = segments_from_model(model, ["y", "w", "z"], sizes={}, limit_bytes=1)
    x, seen = np.array([1, 4, 9, 16], np.float32), []
    found = SegmentedRun(segments, threads=1).run({"x": x}, lambda name, _: seen.append(name))
    assert seen == ["y", "w", "z"] and found.keys() == {"y", "z"}
    np.testing.assert_array_equal(found["y"], -x)


def test_pieces_stay_below_the_limit(fp32):
    limit = 3_000_000
    model = fp32.load("image_encoder")
    sizes = {v.name: 4 * num_values(v, EXPECTED_SIZES) for n in model.graph for v in n.outputs}
    tensors = tensors_of_selection(fp32, default_selection(fp32))["image_encoder"]
    segments = list(segments_from_model(model, tensors, sizes=EXPECTED_SIZES, limit_bytes=limit))
    assert len(segments) > 3
    for segment in segments:
        assert len(segment.taps) == 1 or sum(sizes[name] for name in segment.taps) <= limit
    assert {name for segment in segments for name in segment.taps} == tensors
    nodes = [node.name for segment in segments for node in segment.model.graph]
    assert sorted(nodes) == sorted(node.name for node in model.graph)  # each is run once


def test_weights_beside_the_graph_are_found(fp32, small, tmp_path):
    record = dataclasses.replace(fp32.records["text_decoder"], file="t.onnx", external_data=True)
    write_model(fp32.load("text_decoder"), tmp_path / "t.onnx", beside=True)
    beside = fp32.with_graphs(tmp_path, {"text_decoder": record})
    assert beside.files("text_decoder") == (tmp_path / "t.onnx", tmp_path / "t.onnx.data")
    CollectingSession(beside, "text_decoder", small["text_decoder"], threads=1).close()


def test_unknown_tensor(fp32):
    with pytest.raises(InputError, match="no tensor 'nothing'"):
        collecting_sessions(fp32, {"text_decoder": {"nothing"}})


def test_broken_weights_are_found(images, fp32, small, monkeypatch):
    add = calibration.MagnitudeHistogram.add

    def poisoned(self, values):
        add(self, values * np.float32(np.nan))

    monkeypatch.setattr(calibration.MagnitudeHistogram, "add", poisoned)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        calibrate(fp32, images, tensors=small, samples=1, threads=1)


def test_an_interrupted_calibration_goes_on(fp32, small, images, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_state, "SAVE_INTERVAL_SECONDS", 0.0)
    options = {"method": "max", "tensors": small, "threads": 1}
    cache = tmp_path / "cache.json"
    seen = []

    def interrupt(done, total):
        seen.append(done)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(fp32, images, cache=cache, on_progress=interrupt, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json.state.npz"]
    seen.clear()
    resumed = calibrate(
        fp32,
        images,
        cache=cache,
        on_progress=lambda done, total: seen.append(done),
        **options,
    )
    assert seen == [1, 2]  # the first picture was not looked at again
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    whole = calibrate(fp32, images, **options)
    assert resumed == whole
    monkeypatch.setattr(calibration, "collect", None)  # a cache that fits needs no run
    assert calibrate(fp32, images, cache=cache, **options) == whole
    assert calibrate(fp32, images, cache=cache, force=True, **options) == whole
    with pytest.raises(InputError, match="stale: image_encoder has method max, expected mse"):
        calibrate(fp32, images, cache=cache, **(options | {"method": "mse"}))
    with pytest.raises(InputError, match="stale: image_encoder has data_fingerprint"):
        calibrate(fp32, images, cache=cache, samples=1, **options)


@pytest.mark.parametrize("force", [False, True])
def test_only_a_cache_is_replaced_by_one(fp32, images, tmp_path, force):
    """Any other existing file is rejected, and a folder is rejected before the work starts."""
    precious = tmp_path / "settings.json"
    for text in ('{"precious": 1}', "no JSON"):
        precious.write_text(text, "utf-8")
        with pytest.raises(InputError, match=r"calibration cache .*settings\.json .*another file"):
            calibrate(fp32, images, tensors={}, cache=precious, force=force)
        assert precious.read_text("utf-8") == text
    monitor = []
    for folder in (tmp_path, tmp_path / "nowhere" / "cache.json"):
        with pytest.raises(InputError, match="cannot write"):
            calibrate(
                fp32,
                images,
                tensors={},
                cache=folder,
                force=force,
                on_progress=lambda done, total: monitor.append(done),
            )
    assert monitor == []


def test_a_state_of_other_pictures_is_not_taken(fp32, small, images, tmp_path):
    state = calibration_state.CalibrationState(path=tmp_path / "state", identity="one")
    sessions = collecting_sessions(fp32, small)
    histograms = {name: session.histograms for name, session in sessions.items()}
    histograms["text_decoder"]["layer_norm"].add(np.ones(3, np.float32))
    state.save(histograms, 7, always=True)
    assert dataclasses.replace(state, identity="two").restore(histograms) == 0
    fresh = {n: s.histograms for n, s in collecting_sessions(fp32, small).items()}
    assert dataclasses.replace(state, identity="one").restore(fresh) == 7
    assert fresh["text_decoder"]["layer_norm"].total == 3
    (tmp_path / "state").write_bytes(b"half a file")
    assert state.restore(fresh) == 0


def test_another_graph_makes_the_cache_stale(fp32, small, images, tmp_path):
    cache = tmp_path / "cache.json"
    options = {"samples": 1, "tensors": small, "threads": 1, "method": "max", "cache": cache}
    calibrate(fp32, images, **options)
    model = fp32.load("text_decoder")
    model.producer_name = "somebody"
    record = save_graph(model, fp32.specs["text_decoder"], tmp_path, "text_decoder.onnx")
    other = fp32.with_graphs(tmp_path, {"text_decoder": record})
    with pytest.raises(InputError, match="stale: text_decoder has onnx_sha256"):
        calibrate(other, images, **options)
    forced = calibrate(other, images, force=True, **options)
    assert calibrate(other, images, **options) == forced
