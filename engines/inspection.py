"""What the engine inspector says of a plan. It takes a GPU to deserialise one."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

UNKNOWN = "unknown"
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
    """Deserialise a plan and count its layers by the data type of their first output.

    Returns:
        data type -> layers, "unknown" included; None if the plan could not be deserialised.
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
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return None
    counts = collections.Counter(_precision(layer) for layer in layers)
    return dict(sorted(counts.items()))


def _precision(layer: Any) -> str:
    outputs = layer.get("Outputs") if isinstance(layer, dict) else None
    if not outputs or not isinstance(outputs[0], dict):
        return UNKNOWN
    # "Format/Datatype" in 10.x, "DataType" in 11.x.
    texts = [str(v) for k, v in outputs[0].items() if "datatype" in k.lower()]
    for name, pattern in _NAMES.items():
        if any(re.search(pattern, text, re.IGNORECASE) for text in texts):
            return name
    return UNKNOWN
