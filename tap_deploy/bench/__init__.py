"""Latency benchmarks of bundles: workloads, candidates in turns, reports."""
