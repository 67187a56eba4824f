"""Overlays: regions drawn on their picture."""

from tap_deploy.visualize.overlay import draw_regions

__all__ = ["draw_regions"]
