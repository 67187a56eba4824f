"""The PyTorch reference against the golden outputs of the public implementation."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import DEMO, VARIANTS
from tap_deploy.image import Frame, model_image
from tap_deploy.masks import masks_from_logits, select_mask_token
from tap_deploy.prompts import Prompts
from tap_deploy.reference.image_decoder import PromptOutputs
from tap_deploy.reference.model import TapModel

DATA = pathlib.Path(__file__).parent / "data"
TOLERANCE = 1e-4
ROWS_OF_IMAGE = (slice(0, 4), slice(4, 8))


def assert_close(actual, expected):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def outputs(micro_model, golden):
    """Prompt decoder outputs of all eight golden prompts, from the reference's own embeddings."""
    points = torch.from_numpy(golden["points_model"])
    with torch.inference_mode():
        embeddings = micro_model.encode_image(torch.from_numpy(golden["model_image"]))
        parts = [
            micro_model.decode_prompts(
                embeddings[i : i + 1], points[rows][..., :2], points[rows][..., 2].long()
            )
            for i, rows in enumerate(ROWS_OF_IMAGE)
        ]
    return PromptOutputs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def chosen_tokens(outputs, golden):
    return outputs.semantic_tokens[torch.arange(8), torch.from_numpy(golden["mask_index"])]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != DEMO])
def test_state_dict_equals_the_official_one(name):
    expected = json.loads((DATA / f"state_dict.{name}.json").read_text("utf-8"))
    with torch.device("meta"):
        state = TapModel(VARIANTS[name]).state_dict()
    actual = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()}
    assert actual == expected


def test_model_frame(golden):
    for i in range(2):
        rgb = np.ascontiguousarray(golden[f"image_bgr_{i}"][..., ::-1])
        image, frame = model_image(rgb, 512)
        np.testing.assert_array_equal(image[0], golden["model_image"][i])
        assert (frame.scaled_height, frame.scaled_width) == tuple(golden["scaled_hw"][i])
        assert [frame.scale] * 2 == pytest.approx(golden["scale"][i].tolist(), abs=1e-6)


def test_normalized_image(micro_model, golden):
    normalized = micro_model.normalize(torch.from_numpy(golden["model_image"]))
    assert_close(normalized[:, :, ::37, ::41], golden["normalized_sample"])


def test_image_embeddings(micro_model, golden):
    with torch.inference_mode():
        embeddings = micro_model.encode_image(torch.from_numpy(golden["model_image"]))
    assert_close(embeddings, golden["image_embeddings"])


def test_image_position_encoding(micro_model, golden):
    assert_close(micro_model.prompt_encoder.image_position_encoding(), golden["image_pe"])


def test_prompt_coordinates(golden):
    for i, rows in enumerate(ROWS_OF_IMAGE):
        height, width = golden[f"image_bgr_{i}"].shape[:2]
        prompts = Prompts.from_points(golden["points_px"][rows])
        prompts.check(width, height)
        frame = Frame.for_image(height, width, 512)
        assert_close(prompts.model_coords(frame.scale), golden["points_model"][rows][..., :2])
        np.testing.assert_array_equal(prompts.labels, golden["points_model"][rows][..., 2])


def test_sparse_prompt_embeddings(micro_model, golden):
    points = torch.from_numpy(golden["points_model"])
    sparse = micro_model.prompt_encoder(points[..., :2], points[..., 2].long())
    assert_close(sparse.detach(), golden["sparse_prompt_embeddings"])


@pytest.mark.parametrize("name", PromptOutputs._fields)
def test_prompt_decoder_outputs(outputs, golden, name):
    assert_close(getattr(outputs, name), golden[name])


def test_one_embedding_per_prompt_gives_the_same(micro_model, outputs, golden):
    """Sharing the image side saves work and does not change the result."""
    points = torch.from_numpy(golden["points_model"])
    image_of_prompt = torch.arange(8) // 4
    embeddings = torch.from_numpy(golden["image_embeddings"])[image_of_prompt]
    with torch.inference_mode():
        separate = micro_model.decode_prompts(embeddings, points[..., :2], points[..., 2].long())
    for name in PromptOutputs._fields:
        assert_close(getattr(separate, name), getattr(outputs, name).numpy())


def test_mask_selection(outputs, golden):
    labels = golden["points_model"][..., 2].astype(np.int32)
    actual = select_mask_token(outputs.iou_predictions.numpy(), labels)
    np.testing.assert_array_equal(actual, golden["mask_index"])


@pytest.mark.parametrize("image", [0, 1])
def test_full_size_masks(outputs, golden, image):
    rows, shape = ROWS_OF_IMAGE[image], tuple(golden[f"mask_shape_{image}"])
    count = int(np.prod(shape))
    expected = np.unpackbits(golden[f"mask_bits_{image}"], count=count).reshape(shape)
    logits = outputs.low_res_masks[torch.arange(8), torch.from_numpy(golden["mask_index"])]
    frame = Frame.for_image(shape[1], shape[2], 512)
    actual = masks_from_logits(logits[rows].numpy(), frame)
    assert actual.shape == shape
    assert (actual != expected).mean() <= 1e-4


def test_concepts(outputs, golden):
    vocabulary = Vocabulary(
        weights=golden["concept_weights"], names=tuple(golden["concept_vocabulary"].tolist())
    )
    embeddings = outputs.semantic_embeddings.numpy()[np.arange(8), golden["mask_index"]]
    top = vocabulary.top_k(embeddings, 3)
    assert [[name for name, _ in row] for row in top] == golden["concept_names"].tolist()
    assert_close([[score for _, score in row] for row in top], golden["concept_scores"])


def test_greedy_tokens(micro_model, chosen_tokens, golden):
    with torch.inference_mode():
        ids = micro_model.generate(chosen_tokens, stop_at_eos=False)
    np.testing.assert_array_equal(ids.numpy(), golden["text_tokens"])


def test_text_logits(micro_model, chosen_tokens, golden):
    ids = torch.from_numpy(golden["text_tokens"])[:, :-1]
    with torch.inference_mode():
        logits = micro_model.text_decoder(chosen_tokens, ids)
    assert_close(logits[:, :3], golden["text_logits_first3"])
    best = logits.topk(2, dim=-1).values
    assert_close(best[..., 0] - best[..., 1], golden["text_logits_top_margin"])


def test_generation_stops_at_eos(micro_model, chosen_tokens, monkeypatch):
    """Rows that have finished are padded, and the loop ends when all have."""
    with torch.inference_mode():
        free = micro_model.generate(chosen_tokens, stop_at_eos=False)
        eos = int(free[0, 5])
        first = (free == eos).int().argmax(dim=1).where((free == eos).any(dim=1), free.shape[1])
        monkeypatch.setattr("tap_deploy.reference.text_decoder.EOS_ID", eos)
        stopped = micro_model.generate(chosen_tokens)
    for row in range(8):
        end = int(first[row]) + 1
        assert stopped[row, :end].tolist() == free[row, :end].tolist()
        assert (stopped[row, end:] == micro_model.config.pad_id).all()


def test_sampling_follows_the_generator(micro_model, chosen_tokens):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return micro_model.generate(chosen_tokens, 8, temperature=1.0, generator=generator)

    with torch.inference_mode():
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))


def test_max_new_tokens(micro_model, chosen_tokens, golden):
    with torch.inference_mode():
        ids = micro_model.generate(chosen_tokens, 5, stop_at_eos=False).numpy()
    np.testing.assert_array_equal(ids[:, :6], golden["text_tokens"][:, :6])
    assert (ids[:, 6:] == micro_model.config.pad_id).all()
