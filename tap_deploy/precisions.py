"""Precisions that a user can select, and the graph variants of a bundle that implement them."""

from __future__ import annotations

from tap_deploy.errors import InputError

FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)
# How to run the graphs of a precision on a CPU: image encoder and prompt decoder multiply in bf16,
# the text decoder does not.
BF16, INT8_BF16 = "bf16", "int8+bf16"
GRAPHS_IN_BF16 = {BF16: FP32, INT8_BF16: INT8}
RUN_PRECISIONS = (*PRECISIONS, *GRAPHS_IN_BF16)

# Methods that choose a tensor's int8 range; see tap_deploy.engines.calibration.thresholds.
CALIBRATION_METHODS = ("max", "entropy", "percentile", "mse")
# The most accurate one as measured in docs/int8.md.
DEFAULT_CALIBRATION_METHOD = "mse"

# The same Q/DQ nodes in an fp32 graph, for CPUs, which lack fp16 matrix products.
INT8_FP32 = "int8_fp32"
# Variant -> dtype of the float inputs and outputs of its graphs. A variant is a folder below
# onnx/ and a key of ``Manifest.graphs``.
VARIANT_DTYPES = {FP32: "float32", FP16: "float16", INT8: "float16", INT8_FP32: "float32"}


def variant_for(precision: str, *, on_cpu: bool) -> str:
    """Return the variant that implements a precision.

    Args:
        precision: one of ``RUN_PRECISIONS``.
        on_cpu: whether a CPU runs the graphs; int8 then uses fp32 instead of fp16 elsewhere.

    Raises:
        InputError: unknown precision.
    """
    if precision not in RUN_PRECISIONS:
        raise InputError(
            f"unknown precision {precision!r}; expected one of {', '.join(RUN_PRECISIONS)}"
        )
    made = GRAPHS_IN_BF16.get(precision, precision)
    return INT8_FP32 if made == INT8 and on_cpu else made


def precision_of(variant: str) -> str:
    """Return the precision that a variant implements."""
    return INT8 if variant == INT8_FP32 else variant
