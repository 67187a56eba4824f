"""TapPredictor: end to end against golden data, and on fakes."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
from PIL import Image

from tap_deploy import Prompts, TapPredictor, Vocabulary, graphs
from tap_deploy.errors import BundleError, InputError, SessionError
from tap_deploy.image import Frame
from tap_deploy.masks import area_from_rle, mask_from_rle, masks_from_logits, rle_from_mask
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.ort.session import OnnxRuntimeSession

ROWS_OF_IMAGE = (slice(0, 4), slice(4, 8))
TOLERANCE = 1e-4


def rgb(golden, index):
    return np.ascontiguousarray(golden[f"image_bgr_{index}"][..., ::-1])


def golden_masks(golden, index):
    shape = tuple(golden[f"mask_shape_{index}"])
    bits = np.unpackbits(golden[f"mask_bits_{index}"], count=int(np.prod(shape)))
    return bits.reshape(shape).astype(bool)


@pytest.fixture
def fake_predictor(micro_config):
    """Graphs that return zeros, and remember the shapes they were called with."""
    sessions = {name: FakeSession(spec) for name, spec in graphs.graph_specs(micro_config).items()}
    return TapPredictor(sessions, micro_config, memory_limit_bytes=1 << 30), sessions


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "cpu"])
def on_each_backend(request, micro_bundle, tmp_path_factory):
    """A predictor on each backend for CPUs."""
    pytest.importorskip("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with TapPredictor.from_bundle(micro_bundle.path, request.param) as predictor:
            yield predictor


@pytest.mark.parametrize("index", [0, 1])
def test_golden_pictures_end_to_end(on_each_backend, golden, index):
    """From the picture at its original size to masks, names and tokens."""
    predictor = on_each_backend
    rows = ROWS_OF_IMAGE[index]
    regions = predictor.predict(rgb(golden, index), points=golden["points_px"][rows], top_k=3)
    chosen = golden["mask_index"][rows]
    np.testing.assert_array_equal(regions.mask_index, chosen)
    for name in ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings"):
        expected = golden[name][rows][np.arange(4), chosen]
        np.testing.assert_allclose(getattr(regions, name), expected, rtol=0, atol=TOLERANCE)
    assert (regions.masks != golden_masks(golden, index)).mean() <= 1e-4
    names = [[name for name, _ in row] for row in regions.concepts]
    assert names == golden["concept_names"][rows].tolist()
    scores = [[score for _, score in row] for row in regions.concepts]
    np.testing.assert_allclose(scores, golden["concept_scores"][rows], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(regions.caption_ids, stopped(golden["text_tokens"][rows]))
    assert all(isinstance(caption, str) for caption in regions.captions)


def stopped(ids):
    """The golden captions were not stopped at EOS (2); ours are, and padded (499)."""
    ids = ids.copy()
    for row in ids:
        ends = np.flatnonzero(row == 2)
        if len(ends):
            row[ends[0] + 1 :] = 499
    return ids


def test_encode_once_prompt_many(predictor, golden):
    picture = rgb(golden, 0)
    points = golden["points_px"][:4]
    expected = predictor.predict(picture, points=points)
    predictor.set_image(picture)
    encoded = predictor.encode(picture)
    for regions in (
        predictor.predict(points=points),
        predictor.predict(encoded, points=points),
        predictor.predict(Image.fromarray(picture), points=points),
    ):
        np.testing.assert_array_equal(regions.masks, expected.masks)
        np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)


def test_boxes_are_two_labelled_points(predictor, golden):
    picture = rgb(golden, 0)
    boxes = golden["points_px"][[1, 3], :2, :2].reshape(2, 4)
    by_box = predictor.predict(picture, boxes=boxes)
    by_points = predictor.predict(
        picture, points=[[[x0, y0, 2], [x1, y1, 3]] for x0, y0, x1, y1 in boxes.tolist()]
    )
    np.testing.assert_array_equal(by_box.low_res_masks, by_points.low_res_masks)
    assert by_box.mask_index.tolist() == [0, 0]


def test_points_and_boxes_together_prompt_one_region(predictor, golden):
    picture = rgb(golden, 0)
    row = golden["points_px"][3]  # a box, a background point, a foreground point
    together = predictor.predict(
        picture, points=[row[2:].tolist()], boxes=row[None, :2, :2].reshape(1, 4)
    )
    assert len(together) == 1
    np.testing.assert_allclose(
        together.semantic_tokens[0],
        golden["semantic_tokens"][3, golden["mask_index"][3]],
        atol=TOLERANCE,
    )


def test_chunks_give_the_same_as_one_batch(micro_bundle, predictor, golden):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 300, (23, 1, 2)), np.ones((23, 1, 1))], axis=2)
    whole = predictor.predict(rgb(golden, 0), points=points)
    with TapPredictor.from_bundle(micro_bundle.path, memory_limit_bytes=10_000_000) as small:
        calls = []
        parts = small.predict(
            rgb(golden, 0), points=points, on_progress=lambda *call: calls.append(call)
        )
    assert len([call for call in calls if call[0] == "decode prompts"]) > 3
    np.testing.assert_allclose(parts.low_res_masks, whole.low_res_masks, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(parts.caption_ids, whole.caption_ids)
    np.testing.assert_array_equal(parts.mask_index, whole.mask_index)


@pytest.mark.parametrize("limit", [10_000_000, 4_000_000_000])
def test_without_masks_the_rest_is_the_same(on_each_backend, golden, limit):
    predictor = on_each_backend
    points = np.concatenate([golden["points_px"][ROWS_OF_IMAGE[0]]] * 3)
    plain = predictor.predict(rgb(golden, 0), points=points)
    predictor._calls._memory_limit_bytes, before = limit, predictor._calls._memory_limit_bytes
    try:
        bare = predictor.predict(rgb(golden, 0), points=points, masks=False)
    finally:
        predictor._calls._memory_limit_bytes = before
    assert (bare.masks, bare.rles, bare.low_res_masks) == (None, None, None)
    assert bare.captions == plain.captions
    assert [name for [(name, _)] in bare.concepts] == [name for [(name, _)] in plain.concepts]
    np.testing.assert_array_equal(bare.mask_index, plain.mask_index)
    for name in ("iou_predictions", "semantic_tokens", "semantic_embeddings"):
        np.testing.assert_allclose(getattr(bare, name), getattr(plain, name), atol=TOLERANCE)


def test_without_masks_only_one_is_computed(micro_bundle, golden, monkeypatch):
    rows = []
    run = OnnxRuntimeSession.run

    def noted(session, inputs, *rest):
        if graphs.MASK_ROWS in inputs:
            rows.append(inputs[graphs.MASK_ROWS].tolist())
        return run(session, inputs, *rest)

    monkeypatch.setattr(OnnxRuntimeSession, "run", noted)
    points = golden["points_px"][:3]
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        for masks in (True, "rle", False):
            predictor.predict(rgb(golden, 0), points=points, masks=masks, captions=False)
        predictor.warm_up(3)
    assert rows == [[0, 1, 2], [0, 1, 2], [0], [0, 1, 2]]


def test_captions_of_chunks_stay_in_order(micro_bundle, golden, monkeypatch):
    """Three captions a call: each region gets its own, and the chunks are really made."""
    monkeypatch.setattr("tap_deploy.prediction.answers.captions_per_call", lambda *sizes: 3)
    calls = []
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        regions = predictor.predict(
            rgb(golden, 0),
            points=np.concatenate([golden["points_px"][:4]] * 2),
            on_progress=lambda *call: calls.append(call),
        )
    starts = [done for stage, done, _ in calls if stage == "write captions"]
    assert starts == [0, 3, 6]
    expected = np.concatenate([stopped(golden["text_tokens"][:4])] * 2)
    np.testing.assert_array_equal(regions.caption_ids, expected)


@pytest.mark.parametrize("max_new_tokens", [None, 0, 1, 2, 7, 38])
@pytest.mark.parametrize("ending_row", [0, 3, 5])
def test_captions_end_like_those_of_the_reference(
    predictor, micro_model, golden, monkeypatch, max_new_tokens, ending_row
):
    """The golden captions contain no EOS, so another token is used as EOS."""
    torch = pytest.importorskip("torch")
    eos = int(golden["text_tokens"][ending_row, 4])
    monkeypatch.setattr("tap_deploy.sessions.caption_writer.EOS_ID", eos)
    monkeypatch.setattr("tap_deploy.reference.text_decoder.EOS_ID", eos)
    tokens = np.ascontiguousarray(golden["semantic_tokens"][np.arange(8), golden["mask_index"]])
    with torch.inference_mode():
        expected = micro_model.generate(torch.from_numpy(tokens), max_new_tokens).numpy()
    with predictor._pipeline.lane() as lane:
        actual = lane.captioner.generate(tokens, max_new_tokens=max_new_tokens)
    np.testing.assert_array_equal(actual, expected)
    if max_new_tokens is None:
        assert (expected == eos).any()
        assert (expected[ending_row, 5:] == 499).all()


def test_no_regions(predictor, golden, micro_config):
    for empty in (
        predictor.predict(rgb(golden, 0), points=[]),
        predictor.predict(rgb(golden, 0), boxes=np.zeros((0, 4))),
    ):
        assert len(empty) == 0
        assert empty.masks.shape == (0, *golden["image_bgr_0"].shape[:2])
        assert empty.caption_ids.shape == (0, 39)
        assert empty.semantic_tokens.shape == (0, micro_config.image_embed_dim)
        assert empty.concepts == empty.captions == []


def test_parts_that_are_not_asked_for(predictor, golden):
    regions = predictor.predict(rgb(golden, 0), points=[[[9, 9, 1]]], masks=False, captions=False)
    assert regions.masks is None
    assert regions.low_res_masks is None
    assert regions.captions is None
    assert regions.caption_ids.tolist() == [[1] + [499] * 38]
    assert regions.concepts is not None


def test_without_vocabulary_and_tokenizer(fake_predictor):
    predictor, _ = fake_predictor
    regions = predictor.predict(np.zeros((40, 60, 3), np.uint8), points=[[[9, 9, 1]]])
    assert regions.concepts is None
    assert regions.captions is None
    assert regions.caption_ids.shape == (1, 39)


def test_vocabularies_are_swappable(micro_bundle, golden):
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        assert predictor.vocabulary.names == tuple(golden["concept_vocabulary"].tolist())
        picture, points = rgb(golden, 0), [[[9, 9, 1]]]
        weights = np.random.default_rng(0).normal(size=(96, 2)).astype(np.float32)
        other = Vocabulary(weights=weights, names=("this", "that"))
        assert predictor.predict(picture, points, vocabulary=other).concepts[0][0][0] in other.names
        assert predictor.vocabulary.names != other.names
        predictor.vocabulary = other
        assert predictor.predict(picture, points).concepts[0][0][0] in other.names
        narrow = Vocabulary(weights=np.ones((95, 1), np.float32), names=("x",))
        with pytest.raises(InputError, match="95 rows; expected 96"):
            predictor.vocabulary = narrow


def test_draws_are_repeatable(on_each_backend, golden):
    predictor = on_each_backend

    def draw(seed):
        regions = predictor.predict(
            rgb(golden, 0), points=golden["points_px"][:4], temperature=1.0, seed=seed
        )
        return regions.caption_ids.tolist()

    assert draw(3) == draw(3) != draw(4)


def test_draws_do_not_depend_on_batches_of_prompts(predictor, golden, monkeypatch):
    """Captions are generated for all prompts at once, regardless of the decoding batches."""
    options = {"points": golden["points_px"][:4], "temperature": 1.0, "seed": 3}
    expected = predictor.predict(rgb(golden, 0), **options)
    with predictor._pipeline.lane() as lane:
        captioner, tokens = lane.captioner, expected.semantic_tokens
        ids = captioner.generate(tokens, temperature=1.0, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(ids, expected.caption_ids)
    monkeypatch.setattr("tap_deploy.prediction.answers.prompts_per_call", lambda *_: 3)
    regions = predictor.predict(rgb(golden, 0), **options)
    np.testing.assert_array_equal(regions.caption_ids, expected.caption_ids)


def test_max_new_tokens(predictor, golden):
    regions = predictor.predict(rgb(golden, 0), points=[[[9, 9, 1]]], max_new_tokens=4)
    assert (regions.caption_ids[0, 5:] == 499).all()
    assert (regions.caption_ids[0, 1:5] != 499).any()


def test_padding_does_not_need_the_caller(fake_predictor):
    """Ragged rows share one N; a lone point gets its padding point."""
    predictor, sessions = fake_predictor
    picture = np.zeros((40, 60, 3), np.uint8)
    predictor.predict(picture, points=[[[1, 1, 1]]])
    predictor.predict(picture, points=[[[1, 1, 1]], [[1, 1, 1], [2, 2, 1], [3, 3, 0]]])
    shapes = [call["point_coords"] for call in sessions[graphs.PROMPT_DECODER].calls]
    assert shapes == [(1, 2, 2), (2, 4, 2)]


def test_memory_cap_bounds_the_batch(micro_config):
    sessions = {name: FakeSession(spec) for name, spec in graphs.graph_specs(micro_config).items()}
    predictor = TapPredictor(sessions, micro_config, memory_limit_bytes=1)
    points = [[[1, 1, 1]]] * 5
    predictor.predict(np.zeros((40, 60, 3), np.uint8), points=points, max_new_tokens=1)
    shapes = [call["point_coords"] for call in sessions[graphs.PROMPT_DECODER].calls]
    assert shapes == [(1, 2, 2)] * 5


def test_bad_prompts_fail_before_the_encoder_runs(fake_predictor):
    predictor, sessions = fake_predictor
    with pytest.raises(InputError, match="outside the picture"):
        predictor.predict(np.zeros((40, 60, 3), np.uint8), points=[[[61, 1, 1]]])
    assert sessions[graphs.IMAGE_ENCODER].calls == []


PICTURE = np.zeros((40, 60, 3), np.uint8)
POINT = [[[1, 1, 1]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": PICTURE}, "no prompt: pass points, boxes or prompts"),
        ({"points": POINT}, "no image: pass one, or call set_image"),
        ({"image": PICTURE, "points": [[[np.nan, 1, 1]]]}, "NaN"),
        ({"image": PICTURE, "points": [[[1, 41, 1]]]}, "outside the picture"),
        ({"image": PICTURE, "points": [[[1, 1, 7]]]}, "label 7"),
        ({"image": PICTURE, "boxes": [[5, 5, 5, 9]]}, "no area"),
        (
            {"image": PICTURE, "points": POINT, "boxes": [[0, 0, 5, 5]] * 2},
            "1 rows of points and 2",
        ),
        (
            {"image": PICTURE, "points": POINT, "prompts": Prompts.from_boxes([[0, 0, 5, 5]])},
            "prompts were given with points",
        ),
        ({"image": PICTURE, "points": POINT, "top_k": 0}, "top_k is 0"),
        ({"image": PICTURE, "points": POINT, "top_k": 1.5}, r"top_k is 1\.5"),
        ({"image": PICTURE, "points": POINT, "top_k": "3"}, "top_k is '3'"),
        ({"image": PICTURE, "points": POINT, "seed": 1.5}, r"seed is 1\.5"),
        ({"image": PICTURE, "points": POINT, "temperature": None}, "temperature is None"),
        ({"image": PICTURE, "points": POINT, "temperature": 1e-320}, "temperature is 1e-320"),
        ({"image": PICTURE, "points": POINT, "vocabulary": "x.pkl"}, "vocabulary is a str"),
        ({"image": PICTURE, "prompts": [[1, 1, 1]]}, "prompts is a list; expected Prompts"),
        ({"image": PICTURE, "points": POINT, "temperature": -1.0}, "temperature is -1.0"),
        ({"image": PICTURE, "points": POINT, "temperature": float("nan")}, "temperature is nan"),
        ({"image": PICTURE, "points": POINT, "max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"image": PICTURE, "points": POINT, "seed": -1}, "seed is -1"),
        ({"image": np.zeros((0, 60, 3), np.uint8), "points": POINT}, None),
        ({"image": np.zeros((1, 1, 3), np.uint8), "points": POINT}, None),
        ({"image": PICTURE[..., 0], "points": POINT}, None),
        ({"image": PICTURE.astype(np.uint16), "points": POINT}, None),
        ({"image": "nowhere.jpg", "points": POINT}, "nowhere.jpg"),
    ],
)
def test_bad_arguments(fake_predictor, arguments, message):
    predictor, sessions = fake_predictor
    with pytest.raises(InputError, match=message) as caught:
        predictor.predict(**arguments)
    assert "\n" not in str(caught.value)
    assert sessions[graphs.IMAGE_ENCODER].calls == []


def test_unknown_backend_precision_and_threads(micro_bundle):
    with pytest.raises(SessionError, match="unknown backend 'abacus'"):
        TapPredictor.from_bundle(micro_bundle.path, backend="abacus")
    with pytest.raises(BundleError, match="has no precision 'fp16'"):
        TapPredictor.from_bundle(micro_bundle.path, precision="fp16")
    for threads in (0, 100_000, 1.5):
        with pytest.raises(InputError, match=rf"threads is {threads}; expected 1 to"):
            TapPredictor.from_bundle(micro_bundle.path, threads=threads)


def test_closed_predictor_says_so(micro_bundle, golden):
    with TapPredictor.from_bundle(micro_bundle.path, threads=1) as predictor:
        pass
    with pytest.raises(SessionError, match="predictor is closed"):
        predictor.predict(rgb(golden, 0), points=[[[9, 9, 1]]])


def test_a_failed_call_leaves_the_predictor_usable(predictor, golden):
    expected = predictor.predict(rgb(golden, 0), points=[[[9, 9, 1]]])
    with pytest.raises(InputError):
        predictor.predict(rgb(golden, 0), points=[[[9999, 9, 1]]])
    again = predictor.predict(rgb(golden, 0), points=[[[9, 9, 1]]])
    np.testing.assert_array_equal(again.masks, expected.masks)


def test_several_threads(on_each_backend, golden):
    predictor = on_each_backend
    encoded = [predictor.encode(rgb(golden, i)) for i in range(2)]
    points = [golden["points_px"][rows] for rows in ROWS_OF_IMAGE]
    expected = [predictor.predict(encoded[i], points[i]).caption_ids for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(predictor.predict, encoded[i % 2], points[i % 2]) for i in range(8)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result().caption_ids, expected[i % 2])


def test_masks_as_run_lengths(predictor, golden):
    arguments = rgb(golden, 0), golden["points_px"][:4]
    expected, regions = predictor.predict(*arguments), predictor.predict(*arguments, masks="rle")
    assert regions.masks is None
    assert expected.rles is None
    assert regions.rles == [rle_from_mask(mask) for mask in expected.masks]
    assert regions.to_json() == expected.to_json()
    with pytest.raises(InputError, match="masks is 'png'; expected True, False or 'rle'"):
        predictor.predict(*arguments, masks="png")


def test_all_candidates(on_each_backend, golden):
    predictor = on_each_backend
    """The masks of all tokens equal those of the reference; one of them is the answer."""
    rows = ROWS_OF_IMAGE[0]
    picture = rgb(golden, 0)
    regions = predictor.predict(picture, golden["points_px"][rows], candidates=True, masks="rle")
    scores = golden["iou_predictions"][rows]
    np.testing.assert_allclose(regions.candidate_iou_predictions, scores, rtol=0, atol=TOLERANCE)
    frame = Frame.for_image(*picture.shape[:2], predictor.config.image_size)
    for index, logits in enumerate(golden["low_res_masks"][rows]):
        masks = np.stack([mask_from_rle(rle) for rle in regions.candidate_rles[index]])
        assert (masks != masks_from_logits(logits, frame)).mean() <= 1e-4
        assert regions.candidate_rles[index][regions.mask_index[index]] == regions.rle(index)
    assert len({str(rle) for rle in regions.candidate_rles[0]}) == predictor.config.num_mask_tokens
    [first, *_] = regions.to_dict()["regions"]
    assert [one["segmentation"] for one in first["candidates"]] == regions.candidate_rles[0]
    assert [one["area"] for one in first["candidates"]] == [
        area_from_rle(rle) for rle in regions.candidate_rles[0]
    ]
    plain = predictor.predict(picture, golden["points_px"][rows], masks="rle")
    assert plain.candidate_rles is None
    assert "candidates" not in plain.to_dict()["regions"][0]
    np.testing.assert_array_equal(plain.caption_ids, regions.caption_ids)


def test_candidates_come_in_chunks(micro_bundle, predictor, golden):
    points = golden["points_px"][:4]
    expected = predictor.predict(rgb(golden, 0), points, candidates=True, captions=False)
    with TapPredictor.from_bundle(micro_bundle.path, memory_limit_bytes=1) as small:
        found = small.predict(rgb(golden, 0), points, candidates=True, captions=False)
    np.testing.assert_allclose(
        found.candidate_iou_predictions, expected.candidate_iou_predictions, rtol=0, atol=1e-5
    )
    masks, others = (
        np.array([[mask_from_rle(rle) for rle in row] for row in regions.candidate_rles])
        for regions in (found, expected)
    )
    assert (masks != others).mean() < 1e-4


def test_prompts_outside_are_clipped_on_request(predictor, golden, caplog):
    picture = rgb(golden, 0)
    height, width = picture.shape[:2]
    boxes = [[-0.001, -3, 40, 50], [10, 10, width + 0.5, height]]
    with pytest.raises(
        InputError, match=r"top-left corner of its box \(-0.001, -3\).*clip=True \(--clip\) moves"
    ):
        predictor.predict(picture, boxes=boxes)
    regions = predictor.predict(picture, boxes=boxes, clip=True)
    assert caplog.messages == ["image: clipped 2 of 2 prompts to the picture"]
    inside = predictor.predict(picture, boxes=[[0, 0, 40, 50], [10, 10, width, height]], clip=True)
    assert len(caplog.messages) == 1
    np.testing.assert_array_equal(regions.prompts.coords, inside.prompts.coords)
    np.testing.assert_array_equal(regions.masks, inside.masks)
    with pytest.raises(InputError, match=r"region 0: box .* lies outside the picture"):
        predictor.predict(picture, boxes=[[-9, 0, -3, 40]], clip=True)


@pytest.mark.parametrize("call", ["predict", "predict_many"])
def test_masks_that_fill_the_memory_are_refused_before_the_work(fake_predictor, monkeypatch, call):
    """A thousand boxes on twelve megapixels: 12 GB of masks, on a machine with 8 GB free."""
    from tap_deploy import chunks as memory_bounds
    from tap_deploy.machine.memory import Memory

    memory = Memory(total_bytes=16 << 30, available_bytes=8 << 30, swap_bytes=0, zram_bytes=0)
    monkeypatch.setattr(memory_bounds, "memory_of", lambda host: memory)
    predictor, sessions = fake_predictor
    picture = np.zeros((3000, 4000, 3), np.uint8)
    boxes = np.tile([10, 10, 50, 50], (1000, 1))
    with pytest.raises(InputError, match=r"1000 masks of 4000 x 3000 pixels take 12\.0 GB.*'rle'"):
        if call == "predict":
            predictor.predict(picture, boxes=boxes)
        else:
            list(predictor.predict_many([picture], boxes=boxes))
    assert all(session.calls == [] for session in sessions.values())
    assert len(predictor.predict(picture, boxes=boxes, masks="rle", captions=False).rles) == 1000
