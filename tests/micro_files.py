"""The micro model of ``tests/data`` in the published formats, and its bundle."""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np

from tap_deploy.bundle.manifest import CheckpointRecord
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.storage.files import sha256_of_file

DATA = pathlib.Path(__file__).parent / "data"
CONFIG = DATA / "tap_micro.json"
GOLDEN = DATA / "tap_micro_outputs.npz"
SEED = 0


def micro_config() -> TapConfig:
    return TapConfig.from_dict(json.loads(CONFIG.read_text("utf-8"))["config"])


def write_assets(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Checkpoint, golden concepts and a tokenizer for the micro model, as files."""
    from benchmarks.gpu.micro import trained_tokenizer
    from tap_deploy.reference.checkpoint import save_checkpoint
    from tap_deploy.reference.synthetic import synthetic_state_dict

    config = micro_config()
    files = {
        "config": folder / "tap_micro.json",
        "checkpoint": folder / "tap_micro.pkl",
        "concepts": folder / "concepts.npz",
        "tokenizer": folder / "tokenizer.model",
    }
    files["config"].write_text(json.dumps(config.to_dict()), "utf-8")
    save_checkpoint(synthetic_state_dict(config, SEED), files["checkpoint"])
    with np.load(GOLDEN) as golden:
        names = tuple(golden["concept_vocabulary"].tolist())
        Vocabulary(weights=golden["concept_weights"], names=names).save(files["concepts"])
    files["tokenizer"].write_bytes(trained_tokenizer(config.vocab_size))
    return files


def make_bundle(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Export the micro model; returns the data files that went into it."""
    from tap_deploy.export.bundle_export import export_bundle
    from tap_deploy.reference.synthetic import synthetic_model

    with tempfile.TemporaryDirectory() as name:
        assets = write_assets(pathlib.Path(name))
        record = CheckpointRecord(
            file="tap_micro.pkl",
            sha256=sha256_of_file(assets["checkpoint"]),
            md5="0" * 32,
            known_as=None,
            synthetic=False,
        )
        export_bundle(
            synthetic_model(micro_config(), SEED),
            folder,
            name="tap_micro",
            checkpoint=record,
            concepts=assets["concepts"],
            tokenizer=assets["tokenizer"],
        )
    return CONFIG, GOLDEN
