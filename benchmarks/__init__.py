"""Latency next to what a user would run instead, measured in the same run."""
