"""A bundle: the folder of a model with its manifest, graphs, engines and records."""
