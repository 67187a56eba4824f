"""PyTorch to ONNX: one wrapper module per graph, one exporter, a clean-up, a check."""

from tap_deploy.optional_modules import turn_telemetry_off

# torch, onnxscript and onnx_ir import onnxruntime where they compare results.
turn_telemetry_off()
