"""What the engine inspector says of a plan. It takes a GPU to deserialise one."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

UNKNOWN = "unknown"
CONVERSION = "conversion"
_INT8 = "int8"
# What kernels of NVIDIA's libraries are called: inputs, then the sum; i8i8_i8i32, f16f16_f32.
_INT8_TACTIC = r"i8i8|i8816|i16832|imma|int8"
_FLOAT_TACTIC = r"(tf|bf|f)(16|32)_?(tf|bf|f)(16|32)|h16816|h1688|hmma"
# The type of a layer, the name that TensorRT's compiler gives it, or the node of our graph.
_PRODUCT = (
    r"(?i:gemm|matmul|matrixmultiply|convolution|mha)$|_(Fc|Gemm|MatMul|Mha|Conv(?!ert))(?=[A-Z_])"
    r"|/(MatMul|Gemm|Conv)(_\d+)?(?![\w/.])"
)
# What TensorRT calls them: 10.x "Half" or "Row major linear FP16 format", 11.x "Half".
_NAMES = {
    "fp32": r"\b(fp32|float|float32)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "bf16": r"\b(bf16|bfloat16)\b",
    "int8": r"\bint8\b",
    "uint8": r"\buint8\b",
    "fp8": r"\bfp8\b",
    "int32": r"\bint32\b",
    "int64": r"\bint64\b",
    "bool": r"\bbool\b",
}


def layer_precisions(trt: Any, logger: Any, plan: bytes) -> dict[str, int] | None:
    """Deserialise a plan and count its layers by what they compute in.

    Returns:
        see ``precisions_from_json``; None if the plan could not be deserialised.
    """
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # a version-compatible plan, made a moment ago
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return precisions_from_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def precisions_from_json(text: str) -> dict[str, int] | None:
    """Count the layers in the inspector's JSON; None if it is not what it should be.

    Layers are objects where the plan was built with detailed verbosity, as ours are, else names.

    Returns:
        data type -> layers. "int8" are products of int8, whatever they give; all others are
        counted by their first output, or input, that is not int8. "conversion" are layers that only
        change type or layout, "unknown" those of which nothing is told, or nothing but int8.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return None
    counts = collections.Counter(_precision(layer) for layer in layers)
    return dict(sorted(counts.items()))


def _precision(layer: Any) -> str:
    """Return what a layer computes in, as far as the inspector tells."""
    if not isinstance(layer, dict):
        return UNKNOWN
    if _is_conversion(layer):
        return CONVERSION
    reads, gives = _data_types(layer, "Inputs"), _data_types(layer, "Outputs")
    if _multiplies_int8(layer, reads):
        return _INT8
    # A Q at the end of a float layer, or a DQ at its beginning, does not make it an int8 one.
    first = [types[0] for types in (gives, reads) if types]
    return next((name for name in first if name != _INT8), UNKNOWN)


def _is_conversion(layer: dict[str, Any]) -> bool:
    """Whether a layer only changes type or layout, as a Q or DQ on its own does."""
    return "reformat" in str(layer.get("LayerType", "")).lower() or layer.get("Origin") == "QDQ"


def _multiplies_int8(layer: dict[str, Any], reads: list[str]) -> bool:
    """Whether a layer is a product of int8 values.

    The tactic says so, or says that it is one of floats. Where it says nothing, a layer that reads
    int8 and stands for a MatMul, Gemm or Conv of the graph is taken for one.
    """
    tactic = str(layer.get("TacticName", ""))
    if re.search(_INT8_TACTIC, tactic, re.IGNORECASE):
        return True
    if re.search(_FLOAT_TACTIC, tactic, re.IGNORECASE):
        return False
    texts = (tactic, *(str(layer.get(key, "")) for key in ("LayerType", "Name", "Metadata")))
    return _INT8 in reads and any(re.search(_PRODUCT, text) for text in texts)


def _data_types(layer: dict[str, Any], key: str) -> list[str]:
    """Return the types of a layer's inputs or outputs that are known, in order."""
    tensors = layer.get(key)
    found = []
    for tensor in tensors if isinstance(tensors, list) else []:
        if not isinstance(tensor, dict):
            continue
        # "Format/Datatype" in 10.x, "DataType" in 11.x; "N/A" where shapes are dynamic.
        texts = [str(v) for k, v in tensor.items() if "datatype" in k.lower()]
        names = (n for n, p in _NAMES.items() if any(re.search(p, t, re.IGNORECASE) for t in texts))
        if name := next(names, None):
            found.append(name)
    return found
