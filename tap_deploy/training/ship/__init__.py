"""From a training run to the files of the package."""
