"""What a machine with a GPU has to show: one process a step, one report; see ``scripts/test-gpu``.

What runs the steps and reports needs nothing but Python, so that a broken package is a line in the
report and not its end. Only the steps import the rest, inside their own process.
"""
