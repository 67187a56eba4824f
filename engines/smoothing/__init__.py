"""SmoothQuant: moves outliers from activations into weights."""
