"""Stages of a prediction: inputs, options, graph calls and results."""
