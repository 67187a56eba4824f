"""Latency benchmarks, with a baseline measured in the same run."""
