"""Conversion, quantization and building of graphs; imports neither torch nor ``export``."""

from tap_deploy.optional_modules import turn_telemetry_off

# torch, onnxscript and onnx_ir import onnxruntime in their code that compares results.
turn_telemetry_off()
