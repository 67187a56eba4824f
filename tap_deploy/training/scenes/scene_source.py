"""What training and evaluation ask of a source of scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tap_deploy.training.scenes.scenes import Scene


class SceneSource(Protocol):
    """Labelled pictures by seed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all objects that may occur; ``name_index`` points into them."""

    def scene(self, seed: int) -> Scene:
        """Return the scene of a seed, always the same one."""
