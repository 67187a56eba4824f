"""A bundle of the demo model in fp32 and int8."""

from __future__ import annotations

import pathlib

from tap_deploy.demo_model import DemoModel
from tests.commands import invoke


def make_demo_bundle(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Export and quantize the demo model; returns the data files that went into it."""
    demo = DemoModel()
    pictures = sorted(demo.samples.glob("*.png"))
    for arguments in (
        ("export", "--model", "tap_demo", "-o", folder),
        ("quantize", folder, "--calibration-data", demo.samples, "--no-verdict"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
    return (demo.weights, demo.config, demo.tokenizer, demo.concepts, *pictures)
