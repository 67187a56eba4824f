"""The prompt encoder: points and labels to sparse embeddings, with Fourier features."""

from __future__ import annotations

import torch
from torch import nn

from tap_deploy.config import NUM_POINT_LABELS, PointLabel, TapConfig

# The model was trained with this value; torch.pi would change the features by 1e-7.
PI = 3.1415926


class PromptEncoder(nn.Module):
    """Embeds points in the model frame as sparse prompt embeddings."""

    coord_matrix: torch.Tensor

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        self.image_size, self.grid_size = config.image_size, config.grid_size
        self.register_buffer("coord_matrix", torch.zeros(2, config.image_embed_dim // 2))
        self.point_embed = nn.Embedding(NUM_POINT_LABELS, config.image_embed_dim)

    def fourier_features(self, coords: torch.Tensor) -> torch.Tensor:
        """Map XY in [0, 1], float32 ``[..., 2]``, to ``[..., C]``."""
        angle = (4 * PI * coords - 2 * PI) @ self.coord_matrix
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def image_position_encoding(self) -> torch.Tensor:
        """Return the features of the grid cell centres, row by row, ``[grid * grid, C]``."""
        centre = (torch.arange(self.grid_size, device=self.coord_matrix.device) + 0.5) / (
            self.grid_size
        )
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return self.fourier_features(torch.stack([x, y], dim=-1).flatten(0, 1))

    def forward(self, point_coords: torch.Tensor, point_labels: torch.Tensor) -> torch.Tensor:
        """Embed prompts.

        Args:
            point_coords: float ``[P, N, 2]`` XY, pixels of the model frame.
            point_labels: integer ``[P, N]``, see ``PointLabel``.

        Returns:
            float32 ``[P, N, C]``.
        """
        coords = ((point_coords + 0.5) / self.image_size).clamp(0, 1)
        real = (point_labels != PointLabel.PADDING).unsqueeze(-1)
        features = self.fourier_features(coords) * real
        out: torch.Tensor = features + self.point_embed(point_labels)
        return out
