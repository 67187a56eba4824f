"""Insertion of QuantizeLinear/DequantizeLinear (Q/DQ) nodes from calibrated ranges."""
