"""Building of plans (serialized TensorRT engines) from ONNX graphs."""
