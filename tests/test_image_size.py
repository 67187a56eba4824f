"""Export at another image size than that of the weights, and what a bundle of that size does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import invoke, refused
from PIL import Image
from training_standin import StandInScenes

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import CheckpointError, InputError
from tap_deploy.graphs import graph_specs
from tap_deploy.predictor import TapPredictor
from tap_deploy.reference.checkpoint import load_checkpoint
from tap_deploy.reference.image_size import POSITIONS, at_image_size, resized_positions
from tap_deploy.sessions.opening import create_session

HALF, DOUBLE = 256, 1024  # of the micro model, 512
BOXES = [[20, 30, 200, 180]]


@pytest.fixture(scope="module")
def half(assets, tmp_path_factory):
    """A bundle of the micro model at half its size, made by the command."""
    output = tmp_path_factory.mktemp("half") / "bundle"
    files = [(f"--{name}", path) for name, path in assets.items()]
    options = [word for pair in files for word in pair]
    result = invoke("export", *options, "--image-size", HALF, "-o", output)
    assert result.exit_code == 0, result.output
    assert f"image size  {HALF}, weights for 512 with interpolated" in result.stdout
    return Bundle.open(output)


def test_a_table_is_interpolated_like_a_picture():
    """Each channel of the table is a picture of the grid; Pillow uses the same filter."""
    rng = np.random.default_rng(0)
    for grid, new_grid in ((4, 2), (2, 4), (6, 4), (32, 16)):
        maps = rng.standard_normal((3, grid, grid)).astype(np.float32)
        pictures = [Image.fromarray(m).resize((new_grid, new_grid), Image.BICUBIC) for m in maps]
        table = torch.from_numpy(maps.reshape(3, -1).T.copy())
        found = resized_positions(table, grid, new_grid)
        expected = np.stack([np.asarray(p).ravel() for p in pictures], axis=1)
        assert found.shape == (new_grid**2, 3) and found.is_contiguous()
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_a_table_worked_out_by_hand():
    """Column 3 of 8 is 1. The cubic kernel (a = -1/2), twice as wide, weighs cells by distance."""
    table = (torch.arange(64) % 8 == 3).float()[:, None]
    near, far, beyond, last = 0.8671875, 0.2265625, -0.0703125, -0.0234375  # 1/4, 3/4, 5/4, 7/4
    border = 2 * near + far + beyond + last  # cells outside the table have no weight
    inner = 2 * (near + far + beyond + last) - last
    row = [beyond / border, near / inner, far / inner, last / border]
    found = resized_positions(table, 8, 4)[:, 0].unflatten(0, (4, 4))
    np.testing.assert_allclose(found.numpy(), [row] * 4, atol=1e-6)


@pytest.mark.parametrize("image_size", [HALF, DOUBLE])
def test_only_the_positions_change(micro_model, image_size):
    resized = at_image_size(micro_model, image_size)
    before, after = micro_model.state_dict(), resized.state_dict()
    assert after.keys() == before.keys()
    assert after.pop(POSITIONS).shape == ((image_size // 16) ** 2, before.pop(POSITIONS).shape[1])
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in after)
    assert resized.config.to_dict() == micro_model.config.to_dict() | {"image_size": image_size}
    assert not resized.training


def test_the_same_size_changes_nothing(micro_model, assets, micro_config):
    assert at_image_size(micro_model, 512) is micro_model
    plain, _ = load_checkpoint(assets["checkpoint"], micro_config)
    same, _ = load_checkpoint(assets["checkpoint"], micro_config, image_size=512)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])


@pytest.mark.parametrize("image_size", [0, 128, 500, 513, -256])
def test_a_size_that_is_no_multiple_of_a_window_is_refused(micro_config, image_size):
    with pytest.raises(
        InputError, match=rf"image size is {image_size}; expected a multiple of 256"
    ):
        micro_config.at_image_size(image_size)


def test_the_manifest_has_both_sizes(half, micro_config):
    manifest = half.manifest
    assert (manifest.config.image_size, manifest.checkpoint.image_size) == (HALF, 512)
    assert manifest.weights_config == micro_config
    assert manifest.graphs["fp32"]["image_encoder"].inputs == (
        f"images uint8 [B, {HALF}, {HALF}, 3]",
    )
    assert half.golden().samples[0].images.shape[1:3] == (HALF, HALF)


def test_a_bundle_at_the_size_of_its_weights_says_nothing(micro_bundle):
    manifest = micro_bundle.manifest
    assert "image_size" not in json.loads(manifest.to_json())["checkpoint"]
    assert manifest.weights_config == manifest.config


def test_the_bundle_verifies_against_the_checkpoint(half, assets):
    result = invoke("verify", half.path, "--checkpoint", assets["checkpoint"])
    assert result.exit_code == 0, result.output
    assert "PASSED: 72 comparisons" in result.stdout


def test_selftest_passes(half):
    result = invoke("selftest", half.path)
    assert result.exit_code == 0, result.output


def test_run_equals_the_reference(half, assets, photo):
    """A picture goes through the whole program as through the interpolated PyTorch model."""
    from tap_deploy.image import load_image
    from tap_deploy.prompts import Prompts
    from tap_deploy.reference.predictor import ReferencePredictor

    result = invoke("run", half.path, photo, "--box", "20,30,200,180", "--json")
    assert result.exit_code == 0, result.output
    model, _ = load_checkpoint(assets["checkpoint"], half.manifest.weights_config, image_size=HALF)
    expected = ReferencePredictor(model, half.vocabulary(), half.tokenizer()).predict(
        load_image(photo), prompts=Prompts.from_boxes(BOXES), top_k=1
    )
    [region] = json.loads(result.stdout)["regions"]
    assert region["caption"] == expected.captions[0]
    assert region["iou_prediction"] == pytest.approx(float(expected.iou_predictions[0]), abs=1e-3)
    assert expected.low_res_masks.shape[-1] == HALF // 4


def test_the_encoder_at_double_size_equals_the_reference(micro_model, tmp_path):
    from tap_deploy.export.exporter import export_graph
    from tap_deploy.export.image_encoder import ImageEncoderGraph

    model = at_image_size(micro_model, DOUBLE)
    spec = graph_specs(model.config)["image_encoder"]
    export_graph(ImageEncoderGraph(model), spec, model.config, tmp_path, "encoder.onnx")
    images = np.random.default_rng(0).integers(0, 256, (1, DOUBLE, DOUBLE, 3), np.uint8)
    with create_session("onnxruntime", tmp_path / "encoder.onnx", spec) as session:
        found = session.run({"images": images})["image_embeddings"]
    expected = model.encode_image(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_eval_demo_scores_on_scenes_of_the_size_of_the_weights(half, assets, monkeypatch):
    """So that the scores of all sizes are those of the same pictures."""
    sizes = []

    def scenes(split, image_size):
        sizes.append(image_size)
        return StandInScenes()

    monkeypatch.setattr("tap_deploy.training.scenes.scenes.SceneGenerator", scenes)
    options = ("--checkpoint", assets["checkpoint"], "--regions", 2, "--json")
    result = invoke("eval", "demo", half.path, *options)
    assert result.exit_code == 0, result.output
    assert sizes == [512]
    pytorch, bundle = json.loads(result.stdout).values()
    assert bundle["box"] == pytest.approx(pytorch["box"], abs=0.002)


def test_embeddings_of_another_size_are_refused(half, predictor, photo):
    with TapPredictor.from_bundle(half.path) as smaller:
        encoded = predictor.encode(photo)
        with pytest.raises(InputError, match="encoded at image size 512; expected 256; encode it"):
            smaller.predict(encoded, boxes=BOXES)
        with pytest.raises(InputError, match="encoded at image size 256; expected 512; encode it"):
            predictor.predict(smaller.encode(photo), boxes=BOXES)


def test_a_checkpoint_of_another_size_is_refused(half, micro_model, tmp_path):
    """``--image-size`` interpolates from the size of the config, never from a guessed one."""
    from tap_deploy.reference.checkpoint import save_checkpoint

    save_checkpoint(at_image_size(micro_model, HALF), tmp_path / "half.pkl")
    result = invoke("verify", half.path, "--checkpoint", tmp_path / "half.pkl")
    refused(result, "image_encoder.pos_embed.weight is [256, 64], expected [1024, 64]")
    with pytest.raises(CheckpointError, match="1 misshapen"):
        load_checkpoint(tmp_path / "half.pkl", micro_model.config, image_size=HALF)


def test_the_command_refuses_a_wrong_size(assets, tmp_path):
    options = ("--config", assets["config"], "--checkpoint", assets["checkpoint"])
    result = invoke("export", *options, "--image-size", 384, "-o", tmp_path / "b")
    refused(result, "image size is 384; expected a multiple of 256 pixels")
    assert not (tmp_path / "b").exists()
