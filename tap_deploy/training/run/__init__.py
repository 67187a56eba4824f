"""A training run: optimizer, trainer, folder, progress."""
