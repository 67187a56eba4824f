"""Calibration: activation ranges of the graphs on real pictures."""
