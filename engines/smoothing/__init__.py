"""SmoothQuant: outliers of activations moved into weights."""
