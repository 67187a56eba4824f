"""Runs a minimal ONNX model on every provider of onnxruntime, to find those that work.

``onnxruntime.get_available_providers()`` lists the providers that were compiled in, not those that
work on this machine. The model is ``y = x + x``; its protobuf fields are written here by number,
as in onnx.proto, because a device usually has no onnx package.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from tap_deploy.errors import first_line

_FLOAT = 1  # TensorProto.DataType.FLOAT
_LENGTH = 3
_SILENT = 4  # onnxruntime log level: failures come back as exceptions


def tiny_model() -> bytes:
    """Return a serialized ONNX model, opset 17: ``y = x + x``, both float32 ``[3]``."""
    node = _text(1, "x") + _text(1, "x") + _text(2, "y") + _text(4, "Add")
    graph = _message(1, node) + _text(2, "probe")
    graph += _message(11, _value_info("x")) + _message(12, _value_info("y"))
    opset = _text(1, "") + _number(2, 17)
    return _number(1, 8) + _message(7, graph) + _message(8, opset)  # IR version 8


def working_providers(onnxruntime: ModuleType) -> dict[str, str | None]:
    """Run the tiny model on every provider of an onnxruntime module.

    Returns:
        Provider name -> None if its result is correct, else the problem in one line.
    """
    # The Azure provider calls a remote service, so there is nothing to run here.
    names = [n for n in onnxruntime.get_available_providers() if n != "AzureExecutionProvider"]
    return {name: _failure(onnxruntime, name) for name in names}


def _failure(onnxruntime: ModuleType, provider: str) -> str | None:
    """Return None if the result of a provider is correct, else the problem."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = 1  # the default is one per core of the machine
    x = np.arange(_LENGTH, dtype=np.float32)
    try:
        session = onnxruntime.InferenceSession(tiny_model(), options, providers=[provider])
        if session.get_providers()[0] != provider:
            return "listed, but fell back to the CPU"
        (y,) = session.run(None, {"x": x})
    # Providers and drivers raise exceptions of any type; each of them is a finding.
    except Exception as error:
        return first_line(error)
    return None if np.array_equal(y, x + x) else f"wrong result: {y}, expected {x + x}"


def _value_info(name: str) -> bytes:
    dimension = _message(1, _number(1, _LENGTH))
    tensor_type = _number(1, _FLOAT) + _message(2, dimension)
    return _text(1, name) + _message(2, _message(1, tensor_type))


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])  # one byte each: both stay below 128


def _message(field: int, payload: bytes) -> bytes:
    return bytes([field << 3 | 2, len(payload)]) + payload


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
