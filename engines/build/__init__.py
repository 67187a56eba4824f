"""Engine plans from ONNX graphs."""
