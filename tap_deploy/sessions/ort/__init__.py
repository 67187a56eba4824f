"""Graphs on onnxruntime."""
