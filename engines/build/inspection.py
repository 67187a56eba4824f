"""Layer precisions of a plan, from the engine inspector; needs a GPU to deserialise the plan."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

UNKNOWN = "unknown"
CONVERSION = "conversion"
_INT8 = "int8"
# Kernel names of NVIDIA's libraries encode the types of inputs and accumulator, such as i8i8_i8i32
# and f16f16_f32.
_INT8_TACTIC = r"i8i8|i8816|i16832|imma|int8"
_FLOAT_TACTIC = r"(tf|bf|f)(16|32)_?(tf|bf|f)(16|32)|h16816|h1688|hmma"
# Matches the type of a layer, its name in TensorRT's compiler, or the name of our ONNX node.
_PRODUCT = (
    r"(?i:gemm|matmul|matrixmultiply|convolution|mha)$|_(Fc|Gemm|MatMul|Mha|Conv(?!ert))(?=[A-Z_])"
    r"|/(MatMul|Gemm|Conv)(_\d+)?(?![\w/.])"
)
# Names in the inspector: 10.x "Half" or "Row major linear FP16 format", 11.x "Half".
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
    """Deserialise a plan and count its layers by precision.

    Returns:
        See ``precisions_from_json``; None if the plan cannot be deserialised.
    """
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # safe: this process has just built the plan
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return precisions_from_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def precisions_from_json(text: str) -> dict[str, int] | None:
    """Count the layers in the inspector's JSON by precision; None for an unknown format.

    Layers are objects if the plan was built with detailed verbosity, as ours are, and names
    otherwise.

    Returns:
        Data type -> number of layers. "int8" counts matrix products of int8 inputs, regardless of
        their output. Other layers count by the first output, or else the first input, if it is not
        int8. "conversion" counts layers that only change type or layout; "unknown" counts layers
        without type information or with int8 only.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return None
    counts = collections.Counter(_precision(layer) for layer in layers)
    return dict(sorted(counts.items()))


def _precision(layer: Any) -> str:
    """Return the precision of a layer; "unknown" if the inspector does not tell."""
    if not isinstance(layer, dict):
        return UNKNOWN
    if _is_conversion(layer):
        return CONVERSION
    reads, gives = _data_types(layer, "Inputs"), _data_types(layer, "Outputs")
    if _multiplies_int8(layer, reads):
        return _INT8
    # A Q fused to the end of a float layer, or a DQ to its start, does not make it int8.
    first = [types[0] for types in (gives, reads) if types]
    return next((name for name in first if name != _INT8), UNKNOWN)


def _is_conversion(layer: dict[str, Any]) -> bool:
    """Whether a layer only changes type or layout, like a standalone Q or DQ."""
    return "reformat" in str(layer.get("LayerType", "")).lower() or layer.get("Origin") == "QDQ"


def _multiplies_int8(layer: dict[str, Any], reads: list[str]) -> bool:
    """Whether a layer is a matrix product or convolution of int8 values.

    The name of the tactic usually tells. Otherwise, a layer that reads int8 and implements a
    MatMul, Gemm or Conv of the graph counts as one.
    """
    tactic = str(layer.get("TacticName", ""))
    if re.search(_INT8_TACTIC, tactic, re.IGNORECASE):
        return True
    if re.search(_FLOAT_TACTIC, tactic, re.IGNORECASE):
        return False
    texts = (tactic, *(str(layer.get(key, "")) for key in ("LayerType", "Name", "Metadata")))
    return _INT8 in reads and any(re.search(_PRODUCT, text) for text in texts)


def _data_types(layer: dict[str, Any], key: str) -> list[str]:
    """Return the known data types of a layer's inputs or outputs, in order."""
    tensors = layer.get(key)
    found = []
    for tensor in tensors if isinstance(tensors, list) else []:
        if not isinstance(tensor, dict):
            continue
        # "Format/Datatype" in 10.x, "DataType" in 11.x; "N/A" for dynamic shapes.
        texts = [str(v) for k, v in tensor.items() if "datatype" in k.lower()]
        names = (n for n, p in _NAMES.items() if any(re.search(p, t, re.IGNORECASE) for t in texts))
        if name := next(names, None):
            found.append(name)
    return found
