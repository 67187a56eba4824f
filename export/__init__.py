"""PyTorch to ONNX: one wrapper module per graph, one exporter, a clean-up, a check."""
