"""The PyTorch reference model, which exported graphs are compared with. Needs torch."""
