"""Makes the files of the demo model from a training run."""
