"""Exports the demo model from the files in the package."""

from __future__ import annotations

import os

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import DEMO, TapConfig
from tap_deploy.demo_model import DemoModel


def export_demo(
    demo: DemoModel,
    output: str | os.PathLike[str],
    config: TapConfig | None = None,
) -> Bundle:
    """Export the fp32 bundle, as ``tap-export export --model tap_demo`` does.

    Args:
        demo: the files.
        output: the folder to write.
        config: configuration of the weights; None for the variant ``tap_demo``.

    Raises:
        CheckpointError: a file is missing, or the weights do not fit ``config``.
    """
    from tap_deploy.export.bundle_export import checkpoint_record, export_bundle
    from tap_deploy.reference.checkpoint import load_checkpoint

    weights = demo.require().weights
    model, found = load_checkpoint(weights, config or TapConfig.from_name(DEMO))
    return export_bundle(
        model,
        output,
        name=DEMO,
        checkpoint=checkpoint_record(weights.name, found),
        concepts=demo.concepts,
        tokenizer=demo.tokenizer,
    ).bundle
