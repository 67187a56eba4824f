"""Terms of the objective, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.objective.caption_classes import CLASS_COUNTS, caption_classes
from tap_deploy.training.objective.heads import (
    NOTHING,
    DenseHead,
    NeighborHead,
    cell_owners,
    coverage,
    outline_maps,
)
from tap_deploy.training.objective.losses import (
    ConceptSpace,
    answering_tokens,
    caption_loss,
    iou_loss,
    mask_ious,
    mask_losses,
)
from tap_deploy.training.scenes.captions import CaptionParts
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES

FIRST_CLASSES = [sum(CLASS_COUNTS[:i]) for i in range(len(CLASS_COUNTS))]


def logit(probability):
    return math.log(probability / (1 - probability))


def test_token_0_answers_boxes_and_the_others_points():
    labels = torch.tensor([[2, 3, 1], [1, 4, 4], [0, 1, 4]])
    expected = [[True, False, False, False], *[[False, True, True, True]] * 2]
    assert answering_tokens(labels, 4).tolist() == expected


def test_mask_loss_of_two_pixels_by_hand():
    """p = 0.8 on the object, 0.4 beside it."""
    logits = torch.tensor([[[[logit(0.8), logit(0.4)]]]])
    focal = (0.2**2 * -math.log(0.8) + 0.4**2 * -math.log(0.6)) / 2
    dice = 1 - (2 * 0.8 + 1) / (0.8 + 0.4 + 1 + 1)
    loss = mask_losses(logits, torch.tensor([[[1.0, 0.0]]]))
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(20 * focal + dice, rel=1e-5)


def test_mask_loss_tells_the_masks_of_a_region_apart():
    target = torch.zeros(2, 4, 4)
    target[:, :2] = 1
    good, bad = target * 20 - 10, 10 - target * 20
    losses = mask_losses(torch.stack([bad, good, bad], dim=1), target)
    assert losses.argmin(dim=1).tolist() == [1, 1]
    assert (losses[:, 1] < 0.01).all() and (losses[:, 0] > 100).all()


def test_a_pixel_covered_in_part_is_best_answered_by_that_part():
    """Otherwise the edge, where the logits cross 0, would not lie at the edge of the object."""
    target = torch.full((1, 1, 1), 0.25)
    probability = torch.tensor([0.05, 0.15, 0.25, 0.35, 0.5])
    logits = probability.logit().reshape(1, 5, 1, 1)
    focal = mask_losses(logits, target) - mask_losses_dice(probability, 0.25)
    assert focal.argmin().item() == 2
    assert focal[0, 2].item() == pytest.approx(0, abs=1e-6)


def mask_losses_dice(p, y):
    return 1 - (2 * p * y + 1) / (p + y + 1)


def test_mask_iou_by_hand():
    targets = torch.tensor([[[1.0, 0.6], [0.4, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    logits = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]], [[[-1.0, -1.0], [-1.0, -1.0]]]])
    assert mask_ious(logits, targets).tolist() == [[pytest.approx(1 / 3)], [1.0]]


def test_iou_loss_counts_only_tokens_that_may_answer():
    predictions = torch.tensor([[0.5, 9.0], [9.0, 0.2]])
    answering = torch.tensor([[True, False], [False, True]])
    loss = iou_loss(predictions, torch.tensor([[0.7, 0.0], [0.0, 0.5]]), answering)
    assert loss.item() == pytest.approx((0.2**2 + 0.3**2) / 2)


@pytest.fixture
def space():
    """Two concepts at 60 degrees, logit scale 2."""
    units = np.array([[1.0, 0.5], [0.0, math.sqrt(0.75)]])
    return ConceptSpace(Vocabulary(weights=(2 * units).astype(np.float32), names=("a", "b")))


def test_concept_targets_follow_from_how_alike_the_concepts_are(space):
    likely = math.exp(2) / (math.exp(2) + math.exp(1))
    np.testing.assert_allclose(
        space.targets, [[likely, 1 - likely], [1 - likely, likely]], rtol=1e-6
    )


def test_concept_loss_by_hand(space):
    """An embedding at a right angle to a: cosines 0 and sqrt(0.75)."""
    found = math.exp(2 * math.sqrt(0.75)) / (1 + math.exp(2 * math.sqrt(0.75)))
    a = math.exp(2) / (math.exp(2) + math.exp(1))
    expected = a * math.log(a / (1 - found)) + (1 - a) * math.log((1 - a) / found)
    embedding = torch.tensor([[0.0, 3.0]])  # its length does not matter
    assert space.loss(embedding, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-5)


def test_concept_loss_is_zero_for_the_vector_of_the_concept(space):
    assert space.loss(space.weights.T * 7, torch.tensor([0, 1])).item() < 1e-6


def test_concept_probabilities_are_those_of_the_runtime(space):
    embeddings = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    vocabulary = Vocabulary(weights=space.weights.numpy(), names=("a", "b"))
    ours = space.log_probabilities(torch.from_numpy(embeddings)).exp()
    np.testing.assert_allclose(ours, vocabulary.scores(embeddings), rtol=1e-5)


def test_caption_loss_is_blind_to_padding():
    """BOS 1, token 3, EOS 2, padding 4: only two tokens count."""
    ids = torch.tensor([[1, 3, 2, 4]])
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 3] = math.log(4)  # probability 4 / 8
    logits[0, 2] = torch.tensor([9.0, -9.0, 3.0, 0.0, 1.0])
    expected = (-math.log(4 / 8) - math.log(1 / 5)) / 2
    assert caption_loss(logits, ids, pad_id=4).item() == pytest.approx(expected, rel=1e-6)


def test_the_text_decoder_can_be_trained(micro_config):
    """Gradients of all layers reach the semantic token, and agree with finite differences."""
    from tap_deploy.reference.text_decoder import TextDecoder

    torch.manual_seed(0)
    decoder = TextDecoder(micro_config).double()
    token = torch.randn(1, micro_config.image_embed_dim, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 7, 9]])
    direction = torch.randn_like(token)

    def loss(x):
        return caption_loss(decoder(x, ids[:, :-1]), ids, micro_config.pad_id)

    (gradient,) = torch.autograd.grad(loss(token), token)
    with torch.no_grad():
        step = 1e-6 * direction
        slope = (loss(token + step) - loss(token - step)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    assert abs(slope.item()) > 1e-4


def test_cells_belong_to_what_covers_most_of_them():
    left, corner = np.zeros((2, 8, 8), bool)
    left[:, :3] = True  # half of the second column of cells
    corner[0:2, 4:8] = True
    found = cell_owners([left, corner], grid=4)
    assert found.tolist() == [[0, -1, 1, 1], *[[0, -1, -1, -1]] * 3]  # by half is not most
    assert cell_owners([], grid=2).tolist() == [[-1, -1], [-1, -1]]


def test_classes_of_a_caption():
    """Every part has its own number of classes, and 0 means absent."""
    plain = CaptionParts(name="apple", place="at the top left")
    assert caption_classes(plain) == (0, 0, 0, 0)
    told = CaptionParts(
        size="large", color="white", name="apple", relation="below", neighbor=OBJECT_NAMES[-1]
    )
    assert caption_classes(told) == tuple(count - 1 for count in CLASS_COUNTS)


def test_coverage_by_hand():
    mask = np.zeros((4, 4), bool)
    mask[0, :3] = True
    assert coverage(mask, 2).tolist() == [[0.5, 0.25], [0, 0]]


def test_outlines_run_around_objects_and_between_them():
    left, right = np.zeros((2, 4, 8), bool)
    left[:, :3], right[:, 3:6] = True, True
    objects, mixed = outline_maps([np.tile(left, (2, 1)), np.tile(right, (2, 1))], 4)
    assert objects.tolist() == [[1, 1, 1, 0]] * 4
    assert mixed.tolist() == [[0, 0.5, 0, 0]] * 4
    assert outline_maps([], 4).tolist() == np.zeros((2, 4, 4)).tolist()


def test_dense_loss_falls_to_zero_for_sure_cells():
    head = DenseHead(3, 2)
    with torch.no_grad():
        head.classify.weight.copy_(30 * torch.eye(3).reshape(3, 3, 1, 1))
        head.classify.bias.zero_()
        head.outline.weight.fill_(-30)  # every cell has one feature, so: no object, no outline
        head.outline.bias.zero_()
        head.describe.weight.zero_()
        head.describe.bias.zero_()
        for index in FIRST_CLASSES:  # of every question, whatever the cell
            head.describe.bias[index] = 30
    cells = torch.tensor([[[0, 1], [2, 2]]])
    features = torch.nn.functional.one_hot(cells, 3).permute(0, 3, 1, 2).float()
    nothing = torch.zeros(1, 2, 8, 8)
    captions = torch.zeros(1, len(CLASS_COUNTS), 2, 2, dtype=torch.int64)
    captions[:, :, 1] = NOTHING
    assert head.loss(features, cells, captions, nothing).item() == pytest.approx(0, abs=1e-6)
    unsure = math.log(3) + 2 * math.log(2)
    assert head.loss(0 * features, cells, captions, nothing).item() == pytest.approx(unsure)
    assert head.loss(features, cells, captions, 1 - nothing).item() == pytest.approx(60, rel=1e-5)
    captions[0, 2, 0, 0] = 1  # one of two cells answers one question wrongly, for sure
    assert head.loss(features, cells, captions, nothing).item() == pytest.approx(7.5, rel=1e-5)
    captions[:] = NOTHING
    assert head.loss(features, cells, captions, nothing).item() == pytest.approx(0, abs=1e-6)


def test_outlines_of_a_cell_lie_in_the_cell():
    head = DenseHead(1, 1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.outline.bias[:16] = torch.where(torch.arange(16) == 6, 30.0, -30.0)
        head.outline.bias[16:] = -30
        head.classify.bias[0] = 30
    objects = torch.zeros(1, 2, 8, 8)
    objects[0, 0, 1::4, 2::4] = 1  # row 1, column 2 of each 4 x 4 pixels
    cells = torch.zeros(1, 2, 2, dtype=torch.int64)
    captions = torch.full((1, len(CLASS_COUNTS), 2, 2), NOTHING)
    loss = head.loss(torch.zeros(1, 1, 2, 2), cells, captions, objects)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_schedules():
    config = TrainingConfig(
        steps=100, warmup_steps=10, learning_rate=1.0, dense_fade_from=0.2, dense_fade_to=0.6
    )
    rates = [config.learning_rate_at(step) for step in (0, 9, 10, 55, 100)]
    assert rates == pytest.approx([0.1, 1, 1, 0.5, 0], abs=1e-9)
    weights = [config.dense_weight_at(step) for step in (0, 19, 40, 59, 60, 99)]
    assert weights == pytest.approx([1, 1, 0.5, 0.025, 0, 0])
    assert config.average_decay_at(0) == pytest.approx(0.1)
    assert config.average_decay_at(10**6) == config.average_decay


def test_a_config_survives_json():
    import json

    config = TrainingConfig(steps=7, learning_rate=3e-4)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"average_decay": 1.0}, "average_decay is 1.0; expected at least 0 and at most"),
        ({"dense_fade_from": 0.96}, "dense_fade_from is 0.96; expected at most dense_fade_to"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of auto, float32, bfloat16"),
    ],
)
def test_numbers_out_of_range_are_named(values, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**values)
    with pytest.raises(InputError, match="expected exactly"):
        TrainingConfig.from_dict({"steps": 1})


def test_neighbor_loss_by_hand():
    head = NeighborHead(2, 3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    image, token = torch.zeros(1, 4, 2), torch.zeros(1, 2)
    image[0, 1, 0] = 1  # the first feature marks a cell
    token[0, 1] = 1  # the second one says which name
    cells = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    names = torch.tensor([2])
    unsure = 4 * math.log(2) + math.log(4)
    assert head.loss(image, token, cells, names).item() == pytest.approx(unsure)
    with torch.no_grad():
        head.mark.weight[0, 0], head.mark.bias[0] = 60, -30
        head.name.weight[2, 1] = 30
    assert head.loss(image, token, cells, names).item() == pytest.approx(0, abs=1e-6)
    # Without a neighbour, the marked cell is one of four wrong ones, and the name is wrong.
    nobody = head.loss(image, token, 0 * cells, torch.tensor([3])).item()
    assert nobody == pytest.approx(4 * 30 / 4 + 30, rel=1e-5)
