"""What a machine is and how it stands: board, GPU, versions, power mode, clocks, memory."""
