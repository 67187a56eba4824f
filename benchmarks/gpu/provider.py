"""Step: check that one matrix product runs on the GPU with onnxruntime's CUDA provider."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from benchmarks.gpu.context import Context, Notes, Skipped, StepFailed
from tap_deploy.sessions.ort.session import import_onnxruntime

PROVIDER = "CUDAExecutionProvider"
SIDE = 64
OPSET, IR_VERSION = 20, 10


def run(context: Context, notes: Notes) -> None:
    """Multiply in fp32 and fp16; compare with NumPy, and check the provider in the profile."""
    onnxruntime = import_onnxruntime()
    require_provider()
    for dtype in ("float32", "float16"):
        with notes.check(dtype) as found:
            found["max_abs"] = _multiply(onnxruntime, dtype, context.logs)
    notes.require()


def require_provider() -> None:
    """Check that onnxruntime was built with the CUDA provider, not that the provider works.

    Raises:
        Skipped: it was not.
    """
    available = import_onnxruntime().get_available_providers()
    if PROVIDER not in available:
        raise Skipped(
            f"onnxruntime has no {PROVIDER}, only {', '.join(available)}; "
            "replace it by onnxruntime-gpu"
        )


def _multiply(runtime: object, dtype: str, folder: pathlib.Path) -> float:
    options = runtime.SessionOptions()  # type: ignore[attr-defined]
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / f"provider-{dtype}")
    session = runtime.InferenceSession(  # type: ignore[attr-defined]
        _model(dtype), options, providers=[PROVIDER, "CPUExecutionProvider"]
    )
    if session.get_providers()[0] != PROVIDER:
        raise StepFailed("onnxruntime dropped the provider while loading; see the log")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((SIDE, SIDE)).astype(dtype) for _ in "ab")
    (result,) = session.run(None, {"a": a, "b": b})
    profile = pathlib.Path(session.end_profiling())
    events = json.loads(profile.read_text("utf-8"))
    profile.unlink()
    nodes = [event["args"] for event in events if event.get("cat") == "Node"]
    places = {args["provider"] for args in nodes if "MatMul" in args.get("op_name", "")}
    if places != {PROVIDER}:
        raise StepFailed(f"MatMul ran on {sorted(places)}, expected {PROVIDER}")
    error = float(
        np.abs(result.astype("float64") - a.astype("float64") @ b.astype("float64")).max()
    )
    if not error < (0.1 if dtype == "float32" else 0.2):  # TF32 has 10 mantissa bits, as fp16
        raise StepFailed(f"the product is off by {error:.3g}")
    return error


def _model(dtype: str) -> bytes:
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16
    a, b, c = (helper.make_tensor_value_info(name, kind, [SIDE, SIDE]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", [a, b], [c])
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    content: bytes = model.SerializeToString()
    return content
