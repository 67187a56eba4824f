"""``tap-export eval``: the protocols by name."""

from __future__ import annotations

import click

from tap_deploy.cli.lazy_group import LazyGroup

_PROTOCOLS = "tap_deploy.cli.evaluate.protocols"
PROTOCOLS = {
    "coco-seg": (_PROTOCOLS, "coco_seg_command"),
    "lvis-seg": (_PROTOCOLS, "lvis_seg_command"),
    "lvis-cls": (_PROTOCOLS, "lvis_cls_command"),
    "vg-caption": (_PROTOCOLS, "vg_caption_command"),
    "demo": ("tap_deploy.cli.evaluate.demo", "eval_demo_command"),
}


@click.group("eval", cls=LazyGroup, members=PROTOCOLS)
def eval_command() -> None:
    """Score a model on COCO, LVIS, Visual Genome, or on generated scenes."""
