"""The trainer: losses fall, runs resume exactly, and the result is a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_standin import NAMES, TINY, StandInScenes, vocabulary

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import CheckpointError, InputError
from tap_deploy.prompts import Prompts
from tap_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from tap_deploy.reference.predictor import ReferencePredictor
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.objective.batches import BatchMaker, batches_from
from tap_deploy.training.objective.caption_classes import caption_classes
from tap_deploy.training.objective.heads import NOTHING
from tap_deploy.training.objective.objective import Objective
from tap_deploy.training.run.initialize import new_model
from tap_deploy.training.run.run import RunOptions, train
from tap_deploy.training.run.run_folder import RunFolder
from tap_deploy.training.run.trainer import Trainer
from tap_deploy.training.run.weight_average import WeightAverage
from tap_deploy.training.scenes.captions import CaptionParts
from tap_deploy.training.words.caption_tokenizer import CaptionEncoder, train_tokenizer

CPU = torch.device("cpu")
QUIET = RunOptions(workers=0, report_every=10, held_out_regions=4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """More threads slow such small models down, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    scenes = StandInScenes()
    texts = [item.caption for seed in range(100) for item in scenes.scene(seed).objects]
    path.write_bytes(train_tokenizer(texts, TINY.model.vocab_size))
    return path


@pytest.fixture(scope="module")
def maker(captions):
    return BatchMaker(TINY, StandInScenes(), CaptionEncoder(captions, 15))


@pytest.fixture(scope="module")
def trained(maker):
    """A run of 40 steps, and its losses."""
    trainer = Trainer(TINY, vocabulary(), CPU)
    terms = [trainer.train_step(maker[step]).terms() for step in range(40)]
    return trainer, [{name: float(value) for name, value in row.items()} for row in terms]


def same_state(first, second):
    one, two = first.objective.state_dict(), second.objective.state_dict()
    averages = [trainer.averaged_model.state_dict() for trainer in (first, second)]
    return all(torch.equal(one[name], two[name]) for name in one) and all(
        torch.equal(averages[0][name], averages[1][name]) for name in averages[0]
    )


def test_a_batch_holds_what_the_scenes_say(maker):
    batch, scene = maker[3], StandInScenes().scene(3 * TINY.pictures_per_step)
    assert batch.images.shape == (4, 64, 64, 3) and batch.images.dtype == torch.uint8
    np.testing.assert_array_equal(batch.images[0].numpy()[..., ::-1], scene.image)
    assert batch.regions_per_picture == 3
    items = {item.name_index: item for item in scene.objects}
    assert set(batch.concepts[:3].tolist()) == set(items)
    for row in range(3):
        item = items[int(batch.concepts[row])]
        assert batch.targets[row].sum() * 16 == item.mask.sum()
        inside = batch.point_coords[row, 0].long()
        assert batch.point_labels[row, 0] == 2 or item.mask[inside[1], inside[0]]
    assert set(batch.cell_classes[0].unique().tolist()) <= {*items, len(NAMES)}
    nothing = batch.cell_classes[0] == len(NAMES)
    assert nothing.any() and (batch.cell_captions[0][:, nothing] == NOTHING).all()
    for index, item in items.items():
        cells = batch.cell_captions[0][:, batch.cell_classes[0] == index]
        assert cells.T.unique(dim=0).tolist() == [list(caption_classes(item.parts))]


def test_a_batch_tells_the_neighbor_that_a_caption_names(captions):
    class Beside(StandInScenes):
        def scene(self, seed):
            scene = super().scene(seed)
            first, second = scene.objects
            second = dataclasses.replace(second, name="banana")
            parts = CaptionParts(name=first.name, relation="left of", neighbor="banana")
            return dataclasses.replace(
                scene, objects=(dataclasses.replace(first, parts=parts), second)
            )

    batch = BatchMaker(TINY, Beside(), CaptionEncoder(captions, 60))[0]
    for row in range(len(batch.concepts)):
        first, second = Beside().scene(row // TINY.regions_per_picture).objects
        if batch.concepts[row] == first.name_index:
            assert batch.neighbor_names[row] == second.name_index
            assert batch.neighbor_cells[row].sum() * 16**2 == second.mask.sum()
        else:  # its caption gives a place
            assert batch.neighbor_names[row] == len(NAMES)
            assert not batch.neighbor_cells[row].any()


def test_batches_depend_on_seed_and_step_alone(maker, captions):
    other = BatchMaker(
        dataclasses.replace(TINY, seed=1), StandInScenes(), CaptionEncoder(captions, 15)
    )
    fields = [field.name for field in dataclasses.fields(maker[0])]
    assert all(torch.equal(getattr(maker[5], name), getattr(maker[5], name)) for name in fields)
    for changed in (maker[6], other[5]):
        assert not torch.equal(maker[5].images, changed.images)
        assert not torch.equal(maker[5].point_coords, changed.point_coords)


# torch warns of more workers than cores; the test checks their order.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_bring_the_batches_in_order(maker):
    first_step = TINY.steps - 5
    made = list(batches_from(maker, first_step, workers=2))
    assert len(made) == 5
    for step, batch in enumerate(made, first_step):
        assert torch.equal(batch.images, maker[step].images)
        assert torch.equal(batch.caption_ids, maker[step].caption_ids)


def test_losses_fall(trained):
    _, losses = trained
    for name in ("total", "mask", "concept", "caption", "dense"):
        first = np.mean([row[name] for row in losses[:5]])
        last = np.mean([row[name] for row in losses[-5:]])
        assert last < 0.8 * first, (name, first, last)
    assert all(np.isfinite(list(row.values())).all() for row in losses)


def test_every_parameter_but_none_of_the_buffers_is_trained(trained):
    trainer, _ = trained
    begun = Trainer(TINY, vocabulary(), CPU)
    before = dict(begun.objective.named_parameters())
    assert set(before) == set(dict(trainer.objective.named_parameters()))
    unchanged = {
        name
        for name, value in trainer.objective.named_parameters()
        if torch.equal(value, before[name])
        # Of the tokens that answer points only the best one learns, and it may win every time.
        and not re.search(r"mask_pred\.[123]\.", name)
    }
    assert unchanged == set()
    for name in ("prompt_encoder.coord_matrix", "pixel_mean"):
        assert torch.equal(
            trainer.averaged_model.get_buffer(name), begun.averaged_model.get_buffer(name)
        )
    assert trainer.averaged_model.prompt_encoder.coord_matrix.std() > 0.5


def test_the_run_is_the_same_for_the_same_seed_only(maker):
    def run(seed):
        trainer = Trainer(dataclasses.replace(TINY, seed=seed), vocabulary(), CPU)
        for step in range(2):
            trainer.train_step(maker[step])
        return trainer

    first = run(0)
    torch.rand(3)  # other users of torch's random numbers have no say
    assert same_state(first, run(0))
    assert not same_state(first, run(1))


def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(maker, tmp_path):
    whole = Trainer(TINY, vocabulary(), CPU)
    for step in range(6):
        whole.train_step(maker[step])
    begun = Trainer(TINY, vocabulary(), CPU)
    for step in range(3):
        begun.train_step(maker[step])
    begun.save(tmp_path / "state.pt")
    assert not same_state(begun, whole)
    resumed = Trainer(TINY, vocabulary(), CPU)
    resumed.load(tmp_path / "state.pt")
    for batch in batches_from(maker, resumed.step, workers=0):
        resumed.train_step(batch)
        if resumed.step == 6:
            break
    assert same_state(resumed, whole)


def test_states_that_do_not_fit_are_refused(tmp_path):
    trainer = Trainer(TINY, vocabulary(), CPU)
    trainer.save(tmp_path / "state.pt")
    other = Trainer(dataclasses.replace(TINY, seed=1), vocabulary(), CPU)
    with pytest.raises(CheckpointError, match="belongs to another config"):
        other.load(tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        trainer.load(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.load(tmp_path / "missing.pt")
    few = Vocabulary(weights=np.ones((7, 2), np.float32), names=("a", "b"))
    with pytest.raises(InputError, match="have 7 numbers; expected 16"):
        Trainer(TINY, few, CPU)


def test_a_run_may_become_shorter_or_longer(maker, tmp_path):
    begun = Trainer(TINY, vocabulary(), CPU)
    for step in range(8):
        begun.train_step(maker[step])
    begun.save(tmp_path / "state.pt")
    for steps in (8, 16, 90):
        changed = Trainer(dataclasses.replace(TINY, steps=steps), vocabulary(), CPU)
        changed.load(tmp_path / "state.pt")
        assert changed.step == 8 and same_state(changed, begun)
    shorter = Trainer(dataclasses.replace(TINY, steps=16), vocabulary(), CPU)
    shorter.load(tmp_path / "state.pt")
    shorter.train_step(maker[8])
    # The cosine of the new length: 16 steps of which 5 are warm-up.
    expected = TINY.learning_rate * (1 + np.cos(np.pi * 3 / 11)) / 2
    assert shorter.optimizer.learning_rate == pytest.approx(expected)
    too_short = Trainer(dataclasses.replace(TINY, steps=7), vocabulary(), CPU)
    with pytest.raises(CheckpointError, match="has done 8 steps; expected at most 7"):
        too_short.load(tmp_path / "state.pt")


def test_a_loss_that_is_not_a_number_stops_the_run(maker):
    trainer = Trainer(TINY, vocabulary(), CPU)
    with torch.no_grad():
        trainer.objective.model.image_decoder.iou_token.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"loss is nan in step 0; .* lower learning rate"):
        trainer.train_step(maker[0])
    assert trainer.step == 0


def test_the_average_follows_weights_and_batch_statistics():
    model = new_model(TINY.model, 0)
    average = WeightAverage(model)
    norm = "image_encoder.neck.lateral_conv.0.1.running_mean"
    index = "image_encoder.blocks.0.attn.rel_pos_embed.index"
    with torch.no_grad():
        model.image_encoder.patch_embed.proj.bias += 1
        model.get_buffer(norm).add_(1)
    for _ in range(2):
        average.update(decay=0.5)
    bias = average.model.image_encoder.patch_embed.proj.bias
    assert bias.tolist() == [0.75] * TINY.model.encoder_dim
    assert average.model.get_buffer(norm).tolist() == [0.75] * TINY.model.image_embed_dim
    assert torch.equal(average.model.get_buffer(index), model.get_buffer(index))
    assert not average.model.training and not bias.requires_grad


def test_the_averaged_model_works_in_evaluation_mode(trained, maker):
    """Running statistics replace batch statistics; the loss stays equal only if they are right."""
    trainer, losses = trained
    objective = Objective(
        TINY, trainer.averaged_model, trainer.objective.heads, trainer.objective.concepts
    )
    with torch.no_grad():
        total = np.mean(
            [float(objective(maker[step], 39, torch.float32).total) for step in range(40, 45)]
        )
    assert total == pytest.approx(np.mean([row["total"] for row in losses[-5:]]), rel=0.25)


def test_the_reference_subject_answers_like_the_model(trained, captions):
    model, scene = trained[0].averaged_model, StandInScenes(1).scene(0)
    subject = ReferencePredictor(model, vocabulary(), Tokenizer(captions))
    prompts = Prompts.from_boxes([item.box for item in scene.objects])
    regions = subject.predict(scene.image, prompts=prompts)
    pixels = torch.from_numpy(np.ascontiguousarray(scene.image[None, ..., ::-1]))
    with torch.no_grad():
        outputs = model.decode_prompts(
            model.encode_image(pixels),
            torch.from_numpy(prompts.coords),
            torch.from_numpy(prompts.labels),
        )
    assert regions.mask_index.tolist() == [0, 0]
    np.testing.assert_array_equal(regions.low_res_masks, outputs.low_res_masks[:, 0])
    np.testing.assert_array_equal(regions.semantic_tokens, outputs.semantic_tokens[:, 0])
    assert regions.masks.shape == (2, 64, 64)
    assert all(len(concepts) == 5 for concepts in regions.concepts)
    assert all(caption.startswith("a ") for caption in regions.captions)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors", ".pth"])
def test_the_result_survives_every_checkpoint_format(trained, tmp_path, suffix):
    model = trained[0].averaged_model
    save_checkpoint(model, tmp_path / f"tap{suffix}")
    loaded, _ = load_checkpoint(tmp_path / f"tap{suffix}", TINY.model)
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def folder(tmp_path, captions):
    folder = RunFolder(path=tmp_path / "run")
    folder.begin(dataclasses.replace(TINY, steps=4), vocabulary(), captions.read_bytes())
    return folder


def test_a_run_in_pieces_ends_like_a_run_in_one(folder, tmp_path):
    lines = []
    one_step = dataclasses.replace(QUIET, minutes=0)  # the time is up after the first
    for _ in range(4):
        trainer = train(folder, StandInScenes(), StandInScenes(1), one_step, lines.append)
    other = RunFolder(path=tmp_path / "other")
    other.begin(folder.read_config(), vocabulary(), folder.tokenizer.read_bytes())
    whole = train(other, StandInScenes(), StandInScenes(1), QUIET, lines.append)
    assert same_state(trainer, whole)
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4", "4/4"]
    assert "held-out: IoU box" in lines[0] and "s/step" in lines[0]
    records = [json.loads(line) for line in folder.progress.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]["held_out"]) == {"regions", "box", "point"}
    model, _ = load_checkpoint(folder.model, TINY.model)
    assert torch.equal(model.pixel_mean, whole.averaged_model.pixel_mean)
    assert json.loads(folder.model_config.read_text()) == TINY.model.to_dict()


def test_a_run_can_be_asked_to_stop(folder):
    trainer = train(
        folder, StandInScenes(), StandInScenes(1), QUIET, lambda line: None, lambda: True
    )
    assert trainer.step == 1 and folder.state.exists()


def test_folders_are_not_begun_twice_and_not_resumed_without_a_run(folder, tmp_path):
    with pytest.raises(InputError, match="already contains a training run; pass --resume"):
        folder.begin(TINY, vocabulary(), b"")
    with pytest.raises(InputError, match=r"contains no training run .* start one"):
        RunFolder(path=tmp_path / "nothing").read_config()
    assert folder.read_config() == dataclasses.replace(TINY, steps=4)


def test_a_run_can_begin_with_the_weights_of_another(trained, folder, tmp_path, captions, maker):
    save_checkpoint(trained[0].averaged_model, tmp_path / "first.safetensors")
    second = RunFolder(path=tmp_path / "second")
    config = dataclasses.replace(TINY, steps=1, seed=3, learning_rate=1e-9)
    second.begin(config, vocabulary(), captions.read_bytes(), tmp_path / "first.safetensors")
    (tmp_path / "first.safetensors").unlink()  # the run has its own copy
    begun = Trainer(config, vocabulary(), CPU, second.initial_weights)
    assert begun.objective.model.training
    expected = trained[0].averaged_model.state_dict()
    for model in (begun.objective.model, begun.averaged_model):
        assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in begun.objective.model.parameters())
    train(second, StandInScenes(), StandInScenes(1), QUIET, lambda line: None)
    result, _ = load_checkpoint(second.model, TINY.model)
    for name, value in result.named_parameters():  # one step of no length
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    assert not folder.initial_weights.exists()


def test_a_run_does_not_begin_with_the_weights_of_another_model(trained, tmp_path, captions):
    save_checkpoint(trained[0].averaged_model, tmp_path / "first.safetensors")
    run = RunFolder(path=tmp_path / "run")
    other = TrainingConfig(model=dataclasses.replace(TINY.model, text_depth=2))
    with pytest.raises(CheckpointError, match=r"first\.safetensors"):
        run.begin(other, vocabulary(), captions.read_bytes(), tmp_path / "first.safetensors")
    assert not run.path.exists()


def test_bfloat16_trains_too(maker):
    trainer = Trainer(dataclasses.replace(TINY, dtype="bfloat16"), vocabulary(), CPU)
    losses = [float(trainer.train_step(maker[step]).terms()["total"]) for step in range(15)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert all(value.dtype == torch.float32 for value in trainer.objective.parameters())


@pytest.mark.gpu
def test_training_runs_on_a_gpu(maker):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    trainer = Trainer(TINY, vocabulary(), torch.device("cuda"))
    losses = [float(trainer.train_step(maker[step]).terms()["total"]) for step in range(15)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
