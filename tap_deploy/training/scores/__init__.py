"""Metrics and evaluation of a model."""
