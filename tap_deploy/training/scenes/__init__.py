"""Synthetic scenes: pictures, regions, captions."""
