"""For training tests: fast scenes of coloured squares and discs, a tiny model, an oracle."""

from __future__ import annotations

import numpy as np

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.regions import Regions
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.scenes.captions import CaptionParts
from tap_deploy.training.scenes.scenes import Scene, SceneObject

SIZE = 64
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220)}
SHAPES = ("square", "disc")
NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

TINY = TrainingConfig(
    model=TapConfig(
        image_size=SIZE,
        patch_size=16,
        window_size=2,
        encoder_depth=4,
        encoder_dim=32,
        encoder_heads=2,
        image_embed_dim=32,
        sem_embed_dim=16,
        text_depth=1,
        text_dim=64,
        text_seq_len=16,
        vocab_size=60,
    ),
    steps=60,
    pictures_per_step=4,
    regions_per_picture=3,
    learning_rate=2e-3,
    warmup_steps=5,
    average_decay=0.9,
)


class StandInScenes:
    """Two objects, one in either half, on grey with a little noise."""

    names = NAMES

    def __init__(self, first_seed: int = 0) -> None:
        self._first_seed = first_seed

    def scene(self, seed: int) -> Scene:
        rng = np.random.default_rng([self._first_seed, seed])
        image = rng.integers(100, 140, (SIZE, SIZE, 3)).astype(np.uint8)
        objects = []
        for half, index in enumerate(rng.choice(len(NAMES), 2, replace=False).tolist()):
            radius = int(rng.integers(9, 14))
            x = int(rng.integers(radius + 1, SIZE // 2 - radius)) + half * SIZE // 2
            y = int(rng.integers(radius + 1, SIZE - radius))
            mask = shape_mask(NAMES[index].split()[1], x, y, radius)
            image[mask] = COLORS[NAMES[index].split()[0]]
            objects.append(scene_object(index, mask, f"on the {('left', 'right')[half]}"))
        return Scene(image=image, objects=tuple(objects), seed=seed, split="train")


def shape_mask(shape: str, x: int, y: int, radius: int) -> np.ndarray:
    ys, xs = np.mgrid[:SIZE, :SIZE]
    if shape == "square":
        return (abs(xs - x) <= radius) & (abs(ys - y) <= radius)
    return np.hypot(xs - x, ys - y) <= radius


def scene_object(index: int, mask: np.ndarray, place: str) -> SceneObject:
    ys, xs = np.nonzero(mask)
    return SceneObject(
        name=NAMES[index],
        name_index=index,
        mask=mask,
        box=np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32),
        parts=CaptionParts(name=NAMES[index], place=place),
    )


def vocabulary() -> Vocabulary:
    """Unit vectors times 20: orthogonal, but those of one colour are alike."""
    vectors = np.zeros((TINY.model.sem_embed_dim, len(NAMES)), np.float32)
    for column, name in enumerate(NAMES):
        vectors[column, column] = 1
        vectors[len(NAMES) + list(COLORS).index(name.split()[0]), column] = 0.5
    return Vocabulary(weights=20 * vectors / np.linalg.norm(vectors, axis=0), names=NAMES)


class Oracle:
    """A predictor that knows the scenes and returns configured results."""

    def __init__(self, source, spoil):
        self._by_image = {}
        for seed in range(20):
            scene = source.scene(seed)
            self._by_image[scene.image.tobytes()] = scene
        self._spoil = spoil

    def predict(self, image, *, prompts, top_k):
        scene = self._by_image[image.tobytes()]
        count = len(prompts)
        asked = [item for item in scene.objects if any(same(item, row) for row in prompts.coords)]
        objects = [*asked, *asked]
        assert len(objects) == count
        answers = [self._spoil(i, item) for i, item in enumerate(objects)]
        zeros = np.zeros((count, 1), np.float32)
        return Regions(
            masks=np.stack([mask for mask, _, _ in answers]),
            iou_predictions=zeros[:, 0],
            mask_index=np.zeros(count, np.int64),
            concepts=[[(name, 0.1) for name in names] for _, names, _ in answers],
            captions=[caption for _, _, caption in answers],
            caption_ids=None,
            semantic_tokens=zeros,
            semantic_embeddings=zeros,
            low_res_masks=zeros[:, :, None],
            prompts=prompts,
            image_height=image.shape[0],
            image_width=image.shape[1],
        )


def same(item, row):
    return row.flatten().tolist() == item.box.tolist()
