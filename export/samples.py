"""Makes golden samples: synthetic inputs with the outputs of the reference."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tap_deploy import graphs
from tap_deploy.bundle.golden import Golden, GoldenSample, GoldenText, logit_digest
from tap_deploy.config import PointLabel, TapConfig
from tap_deploy.masks import select_mask_token
from tap_deploy.reference.model import TapModel
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.verify.difference import difference
from tap_deploy.verify.picture_samples import PromptedPicture
from tap_deploy.verify.tolerances import FP32_LARGEST, FP32_MEAN, PROMPT_OUTPUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenSize:
    """Sizes of golden samples with the same pictures.

    Attributes:
        images: number of pictures B.
        prompts: number of prompts P and of points N of each sample.
    """

    images: int
    prompts: tuple[tuple[int, int], ...]


# They cover several prompts with padding, a single point without, many points, and a batch of
# pictures. A bundle holds the first, of one picture, because an engine may take no more.
GOLDEN_SIZES = (
    GoldenSize(images=1, prompts=((4, 4), (3, 1), (7, 11))),
    GoldenSize(images=2, prompts=((1, 2),)),
)
# Rows of the text decoder with any tokens: all of a small vocabulary, some of a large one.
MOST_TEXT_ROWS = 48
TEXT_ROWS_PER_CALL = 8
# Row of ``_contested_box``, the lead in IoU at which the search ends, and its limits.
CONTESTED_ROW, CLEAR_LEAD = 3, 0.01
CONTESTED_PER_CALL, CONTESTED_CALLS = 8, 16


def made_images(config: TapConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return pictures with smooth shading, sharp edges and noise, uint8 ``[B, S, S, 3]``."""
    size = config.image_size
    y, x = np.mgrid[0:size, 0:size] / size
    images = []
    for _ in range(count):
        waves = rng.uniform(1, 9, (3, 2))
        shade = np.stack([np.sin(a * x * 6 + b * y * 6) for a, b in waves], axis=-1)  # [S, S, 3]
        for _ in range(6):
            cx, cy, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.04, 0.2)
            shade[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = rng.uniform(-1, 1, 3)
        noisy = 127.5 + 100 * shade + rng.normal(0, 12, shade.shape)
        images.append(noisy.clip(0, 255).astype(np.uint8))
    return np.stack(images)


def made_prompts(
    config: TapConfig, num_prompts: int, num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates float32 ``[P, N, 2]`` and labels int32 ``[P, N]``.

    Points and boxes alternate, and so do foreground and background. Rows have different amounts of
    padding. The first box reaches beyond the picture.
    """
    shape = (num_prompts, num_points)
    coords = rng.uniform(0, config.image_size, (*shape, 2)).astype(np.float32)
    labels = rng.choice([PointLabel.FOREGROUND, PointLabel.BACKGROUND], shape)
    for row in range(num_prompts):
        if row % 2 and num_points >= 2:
            corners = np.sort(coords[row, :2], axis=0)
            beyond = config.image_size / 8
            coords[row, :2] = corners if row > 1 else [[-beyond], [config.image_size + beyond]]
            labels[row, :2] = PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM
            used = 2 + row % max(1, num_points - 1)
        else:
            labels[row, 0] = PointLabel.BACKGROUND if row % 4 else PointLabel.FOREGROUND
            used = 1 + row % num_points
        coords[row, used:], labels[row, used:] = 0, PointLabel.PADDING
    return coords, labels.astype(np.int32)


@torch.inference_mode()
def golden_from_model(model: TapModel, size: GoldenSize, seed: int) -> Golden:
    """Return inputs drawn from a seed, with the outputs of the reference."""
    rng = np.random.default_rng(seed)
    images = made_images(model.config, size.images, rng)
    embeddings = model.encode_image(torch.from_numpy(images))
    samples = tuple(
        _sample(model, images, embeddings, *_prompts(model, embeddings, prompts, points, rng))
        for prompts, points in size.prompts
    )
    return Golden(
        samples=samples,
        captions=_captions(model, samples),
        vocabulary=_any_text(model, samples, rng),
    )


def _prompts(
    model: TapModel,
    embeddings: torch.Tensor,
    num_prompts: int,
    num_points: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``made_prompts``; if there are enough, the fourth is ``_contested_box``."""
    coords, labels = made_prompts(model.config, num_prompts, num_points, rng)
    if num_prompts > CONTESTED_ROW:
        found = _contested_box(model, embeddings, num_points, rng)
        coords[CONTESTED_ROW], labels[CONTESTED_ROW] = found
    return coords, labels


def _contested_box(
    model: TapModel, embeddings: torch.Tensor, num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a prompt that starts with a box corner, and whose best mask is not that of token 0.

    By the rule, token 0 answers it. A graph without that rule gives the same answer wherever token
    0 is the best one anyway, which it is for nearly all boxes of a well-trained model. Of a limited
    number, the prompt is returned where token 0 is furthest behind.

    Returns:
        Coordinates float32 ``[N, 2]`` and labels int32 ``[N]``.
    """
    best, found = -np.inf, None
    labels = np.full((CONTESTED_PER_CALL, num_points), PointLabel.FOREGROUND, np.int32)
    labels[::2] = PointLabel.BOX_RIGHT_BOTTOM
    labels[:, 0] = PointLabel.BOX_LEFT_TOP
    for _ in range(CONTESTED_CALLS):
        coords = rng.uniform(0, model.config.image_size, (*labels.shape, 2)).astype(np.float32)
        outputs = model.decode_prompts(
            embeddings[:1], torch.from_numpy(coords), torch.from_numpy(labels)
        )
        iou = outputs.iou_predictions.numpy()
        leads = iou[:, 1:].max(axis=1) - iou[:, 0]
        row = int(leads.argmax())
        if leads[row] > best:
            best, found = float(leads[row]), (coords[row], labels[row])
        if best > CLEAR_LEAD:
            break
    assert found is not None
    return found


def _sample(
    model: TapModel,
    images: np.ndarray,
    embeddings: torch.Tensor,
    coords: np.ndarray,
    labels: np.ndarray,
) -> GoldenSample:
    outputs = model.decode_prompts(
        embeddings[:1], torch.from_numpy(coords), torch.from_numpy(labels)
    )
    mask_index = select_mask_token(outputs.iou_predictions.numpy(), labels)
    tokens = outputs.semantic_tokens[torch.arange(len(coords)), torch.from_numpy(mask_index)]
    return GoldenSample(
        images=images,
        image_embeddings=embeddings.numpy(),
        point_coords=coords,
        point_labels=labels,
        mask_index=mask_index,
        caption_ids=model.generate(tokens, stop_at_eos=False).numpy(),
        **{name: value.numpy() for name, value in outputs._asdict().items()},
    )


def _captions(model: TapModel, samples: Sequence[GoldenSample]) -> GoldenText:
    return text_from_model(
        model,
        np.concatenate([sample.chosen_tokens for sample in samples]),
        np.concatenate([sample.caption_ids[:, :-1] for sample in samples]),
    )


def _any_text(
    model: TapModel, samples: Sequence[GoldenSample], rng: np.random.Generator
) -> GoldenText:
    """Return rows with each token of the vocabulary at most once.

    They cover a small vocabulary, and as much of a large one as fits into ``MOST_TEXT_ROWS``.
    """
    steps, vocab = model.config.max_new_tokens, model.config.vocab_size
    rows, channels = min(MOST_TEXT_ROWS, -(-vocab // steps)), model.config.image_embed_dim
    tokens = np.concatenate([sample.semantic_tokens.reshape(-1, channels) for sample in samples])
    ids = np.resize(rng.permutation(vocab), (rows, steps))
    return text_from_model(model, np.resize(tokens, (rows, channels)), ids)


def text_from_model(model: TapModel, tokens: np.ndarray, ids: np.ndarray) -> GoldenText:
    """Return what the reference makes of given tokens.

    Args:
        model: the reference.
        tokens: semantic tokens, float32 ``[R, C]``.
        ids: input tokens, int64 ``[R, steps]``.
    """
    next_ids, digests = [], []
    for start in range(0, len(ids), TEXT_ROWS_PER_CALL):
        rows = slice(start, start + TEXT_ROWS_PER_CALL)
        logits = model.text_decoder(torch.from_numpy(tokens[rows]), torch.from_numpy(ids[rows]))
        next_ids.append(logits.argmax(dim=-1).numpy())
        digests.append(logit_digest(logits.numpy()))
    return GoldenText(
        semantic_tokens=tokens,
        input_ids=ids,
        next_ids=np.concatenate(next_ids),
        logit_digests=np.concatenate(digests),
    )


def sessions_from_model(model: TapModel) -> dict[str, FakeSession]:
    """Return image encoder and prompt decoder of the reference, as sessions."""
    specs = graphs.graph_specs(model.config)

    @torch.inference_mode()
    def encode(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        embeddings = model.encode_image(torch.from_numpy(inputs[graphs.IMAGES]))
        return {graphs.IMAGE_EMBEDDINGS: embeddings.numpy()}

    @torch.inference_mode()
    def decode(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        labels = inputs[graphs.POINT_LABELS]
        outputs = model.decode_prompts(
            torch.from_numpy(inputs[graphs.IMAGE_EMBEDDINGS]),
            torch.from_numpy(inputs[graphs.POINT_COORDS]),
            torch.from_numpy(labels),
        )
        found = {name: value.numpy() for name, value in outputs._asdict().items()}
        answers = select_mask_token(found[graphs.IOU_PREDICTIONS], labels)[:, None]
        request = inputs[graphs.MASK_REQUEST]
        index = np.where(request == graphs.ANSWERING_TOKEN, answers, request)
        rows = np.arange(len(index))[:, None]
        iou = found.pop(graphs.IOU_PREDICTIONS)
        chosen = {name: np.ascontiguousarray(array[rows, index]) for name, array in found.items()}
        chosen[graphs.LOW_RES_MASKS] = chosen[graphs.LOW_RES_MASKS][inputs[graphs.MASK_ROWS]]
        return chosen | {graphs.IOU_PREDICTIONS: iou, graphs.MASK_INDEX: index.astype(np.int32)}

    computed = {graphs.IMAGE_ENCODER: encode, graphs.PROMPT_DECODER: decode}
    return {name: FakeSession(specs[name], compute) for name, compute in computed.items()}


@torch.inference_mode()
def golden_from_picture(model: TapModel, picture: PromptedPicture) -> Golden:
    """Return a picture with the outputs of the model, without tokens of the whole vocabulary."""
    embeddings = model.encode_image(torch.from_numpy(picture.images))
    samples = tuple(
        dataclasses.replace(
            _sample(model, picture.images, embeddings, coords, labels), picture=picture.name
        )
        for coords, labels in picture.prompts
    )
    return Golden(samples=samples, captions=_captions(model, samples))


@torch.inference_mode()
def rounding_noise(model: TapModel, golden: Golden) -> float:
    """Return how far rounding may move an output, over its tolerance in fp32.

    Measured on a copy of the model, each weight of which is one unit in the last place off.
    With very large attention scores, outputs move more than the tolerance that most models keep.

    Args:
        model: the reference.
        golden: inputs, with the outputs of the model.
    """
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in other.parameters():
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        weight.mul_(1 + signs * torch.finfo(weight.dtype).eps)
    first = golden.samples[0]
    embeddings = other.encode_image(torch.from_numpy(first.images)).numpy()
    pairs = [(embeddings, first.image_embeddings)]
    for sample in golden.samples:
        given = torch.from_numpy(sample.image_embeddings)
        moved = _sample(other, sample.images, given, sample.point_coords, sample.point_labels)
        pairs += [(getattr(moved, name), getattr(sample, name)) for name in PROMPT_OUTPUTS]
    text = text_from_model(other, golden.captions.semantic_tokens, golden.captions.input_ids)
    pairs.append((text.logit_digests, golden.captions.logit_digests))
    found = [difference(*pair) for pair in pairs]
    return max(max(d.max_rel / FP32_LARGEST, d.mean_rel / FP32_MEAN) for d in found)


def golden_samples(
    model: TapModel, on_sample: Callable[[Golden], None] | None = None
) -> list[Golden]:
    """Return the samples of each entry of ``GOLDEN_SIZES``."""
    found = []
    for seed, size in enumerate(GOLDEN_SIZES):
        found.append(golden_from_model(model, size, seed))
        if on_sample is not None:
            on_sample(found[-1])
    return found
