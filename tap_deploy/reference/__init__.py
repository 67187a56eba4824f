"""The PyTorch reference: what every exported graph is measured against. Needs torch."""
