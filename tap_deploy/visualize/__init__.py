"""Draws regions on their picture."""

from tap_deploy.visualize.drawing import Drawing
from tap_deploy.visualize.labels import LabelTexts
from tap_deploy.visualize.overlay import draw_regions

__all__ = ["Drawing", "LabelTexts", "draw_regions"]
