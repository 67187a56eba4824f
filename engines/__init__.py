"""ONNX to engines. Knows the graphs and the bundle, never torch and never ``export``."""

from tap_deploy.optional_modules import turn_telemetry_off

# torch, onnxscript and onnx_ir import onnxruntime where they compare results.
turn_telemetry_off()
