"""Describes a machine: board, GPU, versions, power mode, clocks, memory."""
