"""Q/DQ: quantize and dequantize nodes from calibrated ranges."""
