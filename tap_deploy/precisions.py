"""Precisions that a user asks for, and the variants of the graphs that a bundle keeps for them."""

from __future__ import annotations

from tap_deploy.errors import InputError

FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)

# How the range of a tensor can be chosen; see tap_deploy.engines.calibration.thresholds.
CALIBRATION_METHODS = ("max", "entropy", "percentile", "mse")
# By measurement: see docs/int8.md.
DEFAULT_CALIBRATION_METHOD = "mse"

# The same Q/DQ nodes over fp32: for a CPU, which has no fp16 products.
INT8_FP32 = "int8_fp32"
# Variant -> dtype of the floats that go in and out of its graphs. A variant is a folder below
# onnx/ and a key of ``Manifest.graphs``.
VARIANT_DTYPES = {FP32: "float32", FP16: "float16", INT8: "float16", INT8_FP32: "float32"}


def variant_for(precision: str, *, on_cpu: bool) -> str:
    """Return the variant that stands for a precision.

    Args:
        precision: one of ``PRECISIONS``.
        on_cpu: whether a CPU runs the graphs; INT8 then lies over fp32 in place of fp16.

    Raises:
        InputError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}"
        )
    return INT8_FP32 if precision == INT8 and on_cpu else precision


def precision_of(variant: str) -> str:
    """Return the precision that a variant stands for: what a user asks for to get it."""
    return INT8 if variant == INT8_FP32 else variant
