"""A bundle: the folder of a model, its manifest, and what is written into it."""
