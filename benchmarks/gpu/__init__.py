"""GPU tests and benchmarks: each step runs in its own process; see ``scripts/test-gpu``.

The runner and the report need only Python, so that a broken package fails a step and not the run.
Only the steps import other packages, in their own process.
"""
