"""Calibration: the range of every tensor on real pictures."""
