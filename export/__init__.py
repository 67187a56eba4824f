"""Exports the PyTorch model to ONNX: a wrapper module per graph, the exporter, graph clean-up."""

from tap_deploy.optional_modules import turn_telemetry_off

# torch, onnxscript and onnx_ir import onnxruntime to compare results.
turn_telemetry_off()
