"""The files that the authors of TAP publish on the model hub."""

from __future__ import annotations

import dataclasses

from tap_deploy.errors import InputError

REPOSITORY = "BAAI/tokenize-anything"
MODELS = ("tap_vit_b", "tap_vit_l", "tap_vit_h")
VERSIONS = ("1.1", "1.0")  # the newest first
CONCEPTS = ("merged_2560", "lvis_1203", "coco_80")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A published checkpoint.

    Attributes:
        model: name of the variant, one of ``MODELS``.
        version: one of ``VERSIONS``.
        md5_prefix: first digits of its MD5, which the authors publish with it.
    """

    model: str
    version: str
    md5_prefix: str

    @property
    def name(self) -> str:
        """Its name without a suffix, such as ``tap_vit_b_v1_1``."""
        return f"{self.model}_v{self.version.replace('.', '_')}"

    @property
    def paths(self) -> tuple[str, ...]:
        """Its paths in the repository, the present one first."""
        old = (f"models/{self.model}_{self.md5_prefix}.pkl",)
        return (f"models/{self.name}.pkl", *(old if self.version == "1.0" else ()))


CHECKPOINTS = (
    PublishedCheckpoint(model="tap_vit_b", version="1.1", md5_prefix="707f80"),
    PublishedCheckpoint(model="tap_vit_l", version="1.1", md5_prefix="c1d41f"),
    PublishedCheckpoint(model="tap_vit_h", version="1.1", md5_prefix="4bdfb9"),
    PublishedCheckpoint(model="tap_vit_b", version="1.0", md5_prefix="b45cbf"),
    PublishedCheckpoint(model="tap_vit_l", version="1.0", md5_prefix="03f8ec"),
)
KNOWN_MD5_PREFIXES = {each.md5_prefix: each.name for each in CHECKPOINTS}


def published_checkpoint(model: str, version: str = VERSIONS[0]) -> PublishedCheckpoint:
    """Return the checkpoint of a model.

    Args:
        model: one of ``MODELS``.
        version: one of ``VERSIONS``.

    Raises:
        InputError: there is none.
    """
    for each in CHECKPOINTS:
        if (each.model, each.version) == (model, version):
            return each
    known = ", ".join(f"{each.model} {each.version}" for each in CHECKPOINTS)
    raise InputError(f"{model} {version} was never published; expected one of {known}")


def concepts_path(name: str) -> str:
    """Return the path of concept weights, one of ``CONCEPTS``, in the repository."""
    return f"concepts/{name}.pkl"
