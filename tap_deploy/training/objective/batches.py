"""Batches of scenes as tensors, determined by seed and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from tap_deploy.image import model_image
from tap_deploy.prompts import Prompts
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.objective.caption_classes import CLASS_COUNTS, caption_classes
from tap_deploy.training.objective.heads import NOTHING, cell_owners, coverage, outline_maps
from tap_deploy.training.objective.prompt_sampling import first_prompts
from tap_deploy.training.scenes.scenes import SceneSource
from tap_deploy.training.words.caption_tokenizer import CaptionEncoder

if TYPE_CHECKING:
    from tap_deploy.training.scenes.scenes import Scene, SceneObject

_SCENES_A_SEED = 10**9  # scenes per seed; runs with different seeds share none below this number


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B pictures with R regions each, P = B * R; region p belongs to picture p // R.

    Attributes:
        images: pictures in the model frame, BGR uint8 ``[B, H, W, 3]``.
        point_coords: first prompts XY, pixels of the model frame, float32 ``[P, 2, 2]``.
        point_labels: labels of the points, see ``PointLabel``, int64 ``[P, 2]``.
        targets: fraction of each low-resolution pixel that the object covers, 0..1, float32
            ``[P, S, S]``.
        concepts: index of the object's name, int64 ``[P]``.
        caption_ids: BOS, the caption, EOS and padding, int64 ``[P, L]``.
        cell_classes: index of the name of the object that covers most of a cell, or the number
            of names for the background, int64 ``[B, grid, grid]``.
        cell_captions: ``caption_classes`` of that object, or ``NOTHING`` for the background, int64
            ``[B, n, grid, grid]``.
        outlines: see ``outline_maps``, float32 ``[B, 2, S, S]``.
        neighbor_cells: fraction of each cell that the neighbour named in the caption covers; 0
            without one, float32 ``[P, grid, grid]``.
        neighbor_names: index of the neighbour's name, or the number of names without one, int64
            ``[P]``.
    """

    images: torch.Tensor
    point_coords: torch.Tensor
    point_labels: torch.Tensor
    targets: torch.Tensor
    concepts: torch.Tensor
    caption_ids: torch.Tensor
    cell_classes: torch.Tensor
    cell_captions: torch.Tensor
    outlines: torch.Tensor
    neighbor_cells: torch.Tensor
    neighbor_names: torch.Tensor

    @property
    def regions_per_picture(self) -> int:
        """Regions per picture R."""
        return len(self.concepts) // len(self.images)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        names = [field.name for field in dataclasses.fields(self)]
        return Batch(**{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class BatchMaker(Dataset[Batch]):
    """Data set of batches; the index is the step, counted from 0."""

    def __init__(
        self, config: TrainingConfig, scenes: SceneSource, captions: CaptionEncoder
    ) -> None:
        self.config, self.scenes, self.captions = config, scenes, captions

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        count = self.config.pictures_per_step
        first_seed = self.config.seed * _SCENES_A_SEED + step * count
        rng = np.random.default_rng([self.config.seed, step])
        scenes = [self.scenes.scene(first_seed + i) for i in range(count)]
        regions = [self._regions(scene, rng) for scene in scenes]
        flat = [region for picture in regions for region in picture]
        prompts = first_prompts(
            [region.mask for region in flat],
            [region.box for region in flat],
            self.config.box_noise,
            rng,
        )
        return self._batch(scenes, flat, prompts)

    def _regions(self, scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
        """Return R random objects; an object repeats only after all others were chosen."""
        order = rng.permutation(len(scene.objects))
        return [scene.objects[i] for i in np.resize(order, self.config.regions_per_picture)]

    def _batch(
        self, scenes: Sequence[Scene], regions: Sequence[SceneObject], prompts: Prompts
    ) -> Batch:
        size = self.config.model.low_res_mask_size
        image_size = self.config.model.image_size
        targets = np.stack([coverage(region.mask, size) for region in regions])
        cells = [self._cells(scene) for scene in scenes]
        count = self.config.regions_per_picture
        beside = [self._beside(scenes[i // count], item) for i, item in enumerate(regions)]
        images = np.concatenate([model_image(scene.image, image_size)[0] for scene in scenes])
        return Batch(
            images=torch.from_numpy(images),
            point_coords=torch.from_numpy(prompts.coords),
            point_labels=torch.from_numpy(prompts.labels.astype(np.int64)),
            targets=torch.from_numpy(targets),
            concepts=torch.tensor([region.name_index for region in regions]),
            caption_ids=self._caption_ids(regions),
            cell_classes=torch.from_numpy(np.stack([names for names, _ in cells])),
            cell_captions=torch.from_numpy(np.stack([captions for _, captions in cells])),
            outlines=torch.from_numpy(
                np.stack([outline_maps([o.mask for o in scene.objects], size) for scene in scenes])
            ),
            neighbor_cells=torch.from_numpy(np.stack([cells for cells, _ in beside])),
            neighbor_names=torch.tensor([name for _, name in beside]),
        )

    def _beside(self, scene: Scene, item: SceneObject) -> tuple[npt.NDArray[np.float32], int]:
        """Return ``neighbor_cells`` and ``neighbor_names`` of one region."""
        grid, neighbor = self.config.model.grid_size, neighbor_of(item, scene.objects)
        if neighbor is None:
            return np.zeros((grid, grid), np.float32), len(self.scenes.names)
        return coverage(neighbor.mask, grid), neighbor.name_index

    def _caption_ids(self, regions: Sequence[SceneObject]) -> torch.Tensor:
        """Return the encoded captions; rows are only as long as the longest, to save time."""
        ids = self.captions.encode([region.caption for region in regions])
        longest = int((ids != self.captions.pad_id).sum(axis=1).max())
        return torch.from_numpy(ids[:, :longest])

    def _cells(self, scene: Scene) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return ``cell_classes`` and ``cell_captions`` of one picture."""
        objects = scene.objects
        owners = cell_owners([item.mask for item in objects], self.config.model.grid_size)
        names = np.array([*(item.name_index for item in objects), len(self.scenes.names)])
        captions = np.full((len(objects) + 1, len(CLASS_COUNTS)), NOTHING)
        captions[:-1] = [caption_classes(item.parts) for item in objects]
        return names[owners], np.moveaxis(captions[owners], -1, 0)


def neighbor_of(item: SceneObject, objects: Sequence[SceneObject]) -> SceneObject | None:
    """Return the object that the caption of another one names; None if it names none.

    Args:
        item: the object with the caption.
        objects: all objects of the scene; their names differ.
    """
    named = [other for other in objects if other.name == item.parts.neighbor]
    return named[0] if named else None


def batches_from(maker: BatchMaker, first_step: int, workers: int) -> Iterator[Batch]:
    """Yield the batches from a step to the end of the run, in order.

    Args:
        maker: makes the batches.
        first_step: first step, counted from 0.
        workers: processes that make batches ahead; 0 makes each batch on demand.
    """
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=range(first_step, len(maker)),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader
