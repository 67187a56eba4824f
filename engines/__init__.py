"""ONNX to engines. Knows the graphs and the bundle, never torch and never ``export``."""
