"""The session contract, on the fake, on onnxruntime and on OpenVINO."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from tap_deploy.errors import BundleError, InputError, MissingDependencyError, SessionError
from tap_deploy.graphs import PROMPT_DECODER, GraphSpec, TensorSpec
from tap_deploy.machine.cpu import NO_VNNI, usable_cores
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import create_session, sessions_from_bundle, sessions_from_variant
from tap_deploy.sessions.options import Device
from tap_deploy.sessions.ort import session as ort_session
from tap_deploy.sessions.run_on import RunOn

both = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])

SPEC = GraphSpec(
    "adder",
    inputs=(TensorSpec("a", "float32", ("P", 3)), TensorSpec("b", "int32", ("P",))),
    outputs=(TensorSpec("sum", "float32", ("P", 3)), TensorSpec("rows", "int32", (1,))),
)


@pytest.fixture
def session():
    return FakeSession(SPEC, lambda inputs: {"sum": inputs["a"] + inputs["b"][:, None]})


def inputs(rows=2):
    return {"a": np.ones((rows, 3), np.float32), "b": np.full(rows, 4, np.int32)}


def test_outputs_are_allocated_by_the_spec(session):
    outputs = session.run(inputs(5))
    np.testing.assert_array_equal(outputs["sum"], np.full((5, 3), 5, np.float32))
    assert outputs["rows"].shape == (1,)
    assert session.calls == [{"a": (5, 3), "b": (5,)}]


@pytest.mark.parametrize(("int8", "exact"), [("AVX512-VNNI", False), (NO_VNNI, True), (None, True)])
def test_the_slow_exact_mode_is_for_cpus_that_need_it(monkeypatch, int8, exact):
    import onnxruntime

    monkeypatch.setattr(ort_session, "cpu_int8", lambda host: int8)
    options = ort_session.session_options(onnxruntime)
    if not exact:
        with pytest.raises(RuntimeError, match="x64quantprecision"):  # no such entry
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_onnxruntime_frees_large_buffers_after_their_last_use(micro_bundle, monkeypatch):
    """With buffers that are planned in advance, the encoder takes six times the memory."""
    import onnxruntime

    planned = {}

    class Noted(onnxruntime.InferenceSession):
        def __init__(self, path, options, **rest):
            planned[path.split("/")[-1]] = (options.enable_mem_pattern, options.enable_mem_reuse)
            super().__init__(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Noted)
    for session in sessions_from_bundle(micro_bundle, RunOn(threads=1)).values():
        session.close()
    assert planned == {
        "image_encoder.onnx": (False, False),
        "prompt_decoder.onnx": (False, False),
        "text_decoder.onnx": (True, True),
    }


def test_outputs_are_written_in_place(session):
    cache = np.zeros((4, 2, 3), np.float32)
    outputs = session.run(inputs(), into={"sum": cache[1]})
    assert outputs["sum"].base is cache
    assert cache[1].sum() == 30
    assert cache[[0, 2, 3]].sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.ones((2, 3))}, r"input 'a' is float64 \[2, 3\]; expected a float32 \[P, 3\]"),
        ({"a": np.ones((2, 4), np.float32)}, r"is float32 \[2, 4\]; expected"),
        ({"a": np.ones(3, np.float32)}, r"is float32 \[3\]; expected"),
        ({"b": np.ones(7, np.int32)}, r"input 'b' is int32 \[7\].*with {'P': 2}"),
        ({"c": np.ones(1)}, r"inputs are \['a', 'b', 'c'\]; expected \['a', 'b'\]"),
        ({"a": np.ones((3, 2), np.float32).T}, r"not contiguous"),
    ],
)
def test_bad_inputs_are_refused_before_the_backend(session, change, message):
    with pytest.raises(SessionError, match=message):
        session.run(inputs() | change)
    assert session.calls == []


def test_empty_axis_is_refused(session):
    with pytest.raises(SessionError, match=r"float32 \[0, 3\]"):
        session.run(inputs(0))


def test_bad_outputs_are_refused(session):
    with pytest.raises(SessionError, match="no output 'total'"):
        session.run(inputs(), into={"total": np.zeros(1)})
    with pytest.raises(SessionError, match="output 'sum' is float32"):
        session.run(inputs(), into={"sum": np.zeros((9, 3), np.float32)})


def test_unknown_backend():
    with pytest.raises(SessionError, match="unknown backend 'abacus'; expected one of onnxrun"):
        create_session("abacus", "graph.onnx", SPEC)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "abacus"}, SessionError, "unknown backend 'abacus'; expected one of onnxrun"),
        ({"backend": "tensorrt", "device": "cpu"}, InputError, "'tensorrt' needs a GPU; got devi"),
        ({"provider": "cuda"}, InputError, "provider needs backend 'onnxruntime' and device"),
        ({"backend": "tensorrt_rtx", "provider": "cuda"}, InputError, "provider needs backend"),
        ({"device": "gpu"}, InputError, "unknown device 'gpu'; expected cpu, cuda or cuda:N"),
        ({"device": "cuda:1", "threads": 1}, InputError, "threads need device 'cpu'; omit"),
        ({"backend": "tensorrt", "threads": 1}, InputError, "threads need device 'cpu'; omit"),
        ({"threads": 0}, InputError, "threads is 0; expected 1 to "),
        ({"threads": True}, InputError, "threads is True; expected 1 to "),
        ({"threads": 1 << 20}, InputError, "threads is 1048576; expected 1 to "),
        ({"precision": "fp8"}, InputError, "unknown precision 'fp8'; expected one of fp32, fp16"),
        ({"precision": "bf16"}, InputError, "'bf16' needs backend 'openvino' or 'cpu'; got 'onn"),
        (
            {"backend": "tensorrt", "precision": "int8+bf16"},
            InputError,
            "needs backend 'openvino' or 'cpu'; got 'tensorrt'",
        ),
        (
            {"backend": "openvino", "device": "cuda"},
            InputError,
            "'openvino' runs on the CPU only; got device 'cuda'",
        ),
        ({"backend": "cpu", "device": "cuda"}, InputError, "'cpu' runs on the CPU only; got dev"),
        ({"backend": "openvino", "precision": "fp16"}, InputError, "has no fp16; use fp32, or b"),
    ],
)
def test_run_on_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        RunOn(**arguments)


@pytest.mark.parametrize(
    ("arguments", "device", "variant", "mark_name"),
    [
        ({}, Device("cpu"), "fp32", "onnxruntime"),
        ({"device": "cpu", "precision": "int8"}, Device("cpu"), "int8_fp32", "onnxruntime"),
        ({"backend": "openvino", "precision": "int8"}, Device("cpu"), "int8_fp32", "openvino"),
        ({"backend": "openvino", "precision": "bf16"}, Device("cpu"), "fp32", "openvino-bf16"),
        ({"backend": "cpu", "precision": "int8+bf16"}, Device("cpu"), "int8_fp32", "cpu-bf16"),
        ({"device": "cuda:1", "precision": "int8"}, Device("cuda", 1), "int8", "onnxruntime-cuda"),
        (
            {"device": "cuda", "provider": "tensorrt"},
            Device("cuda"),
            "fp32",
            "onnxruntime-tensorrt",
        ),
        ({"backend": "tensorrt", "precision": "int8"}, Device("cuda"), "int8", "tensorrt"),
        (
            {"backend": "tensorrt_rtx", "device": "cuda:2"},
            Device("cuda", 2),
            "fp32",
            "tensorrt_rtx",
        ),
    ],
)
def test_run_on_decides_device_graphs_and_mark(arguments, device, variant, mark_name):
    run_on = RunOn(**arguments)
    assert (run_on.resolved_device, run_on.on_cpu) == (device, device.kind == "cpu")
    assert (run_on.variant, run_on.mark_name) == (variant, mark_name)
    assert run_on.is_engine is run_on.backend.startswith("tensorrt")


@both
def test_missing_backend_names_the_extra(monkeypatch, backend):
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "tap-deploy\[{backend}\]"'):
        create_session(backend, "graph.onnx", SPEC)


@both
@pytest.mark.parametrize("content", ["truncated", "no graph", "nothing"])
def test_a_file_that_is_no_graph(micro_bundle, tmp_path, backend, content, capfd):
    path = tmp_path / "graph.onnx"
    whole = micro_bundle.variant("fp32").path(PROMPT_DECODER).read_bytes()
    # OpenVINO reads an empty file as an empty graph.
    message = r"decoder: (\w+ cannot load .*graph\.onnx|inputs of the file are {})"
    path.write_bytes({"truncated": whole[:-1000], "no graph": b"no graph", "nothing": b""}[content])
    with pytest.raises(SessionError, match=message) as caught:
        create_session(backend, path, micro_bundle.variant("fp32").specs[PROMPT_DECODER])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@both
def test_a_missing_file(tmp_path, backend):
    with pytest.raises(SessionError, match=r"graph adder: \w+ cannot load .*none\.onnx"):
        create_session(backend, tmp_path / "none.onnx", SPEC)


@both
def test_a_file_of_another_graph_is_refused(micro_bundle, backend):
    with pytest.raises(SessionError, match="graph adder: inputs of the file are"):
        create_session(backend, micro_bundle.variant("fp32").path(PROMPT_DECODER), SPEC)


@both
@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs[:-1],
        lambda outputs: (*outputs, TensorSpec("extra", "float32", ("P",))),
        lambda outputs: (dataclasses.replace(outputs[0], name="other"), *outputs[1:]),
        lambda outputs: (dataclasses.replace(outputs[0], dtype="float16"), *outputs[1:]),
        lambda outputs: (dataclasses.replace(outputs[0], shape=("P", 4)), *outputs[1:]),
    ],
    ids=["missing", "additional", "renamed", "dtype", "rank"],
)
def test_a_file_with_other_outputs_is_refused(micro_bundle, backend, change):
    """Its inputs match the spec, so only the outputs differ."""
    spec = micro_bundle.variant("fp32").specs[PROMPT_DECODER]
    wrong = dataclasses.replace(spec, outputs=change(spec.outputs))
    with pytest.raises(SessionError, match=r"graph prompt_decoder: outputs of the file are"):
        create_session(backend, micro_bundle.variant("fp32").path(PROMPT_DECODER), wrong)


def threads_of(session):
    if hasattr(session, "_session"):
        return session._session.get_session_options().intra_op_num_threads
    return session._loaded[0].get_property("INFERENCE_NUM_THREADS")


@both
@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 2), (None, usable_cores())])
def test_threads_reach_the_backend(micro_bundle, backend, threads, expected):
    path = micro_bundle.variant("fp32").path(PROMPT_DECODER)
    spec = micro_bundle.variant("fp32").specs[PROMPT_DECODER]
    with create_session(backend, path, spec, threads=threads) as session:
        assert threads_of(session) == expected


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "cpu"])
def test_threads_of_a_bundle_reach_all_its_sessions(micro_bundle, monkeypatch, tmp_path, backend):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sessions = sessions_from_bundle(micro_bundle, RunOn(backend=backend, threads=1))
    for session in sessions.values():
        assert threads_of(session) == 1
        session.close()


@both
def test_outputs_are_computed_in_a_slot(micro_bundle, golden, backend):
    """The output is computed at the address of the slot, and nowhere else."""
    spec = micro_bundle.variant("fp32").specs[PROMPT_DECODER]
    with create_session(
        backend, micro_bundle.variant("fp32").path(PROMPT_DECODER), spec, threads=1
    ) as session:
        feed = {
            "image_embeddings": golden["image_embeddings"][:1],
            "point_coords": np.ascontiguousarray(golden["points_model"][:4, :, :2]),
            "point_labels": golden["points_model"][:4, :, 2].astype(np.int32),
            "mask_request": request_answers(4),
            "mask_rows": mask_rows(4),
        }
        slots = session.allocate((3, 4, 4), "float32")
        outputs = session.run(feed, into={"iou_predictions": slots[1]})
        assert outputs["iou_predictions"].base is slots
        np.testing.assert_allclose(slots[1], golden["iou_predictions"][:4], atol=1e-4)
        assert not slots[[0, 2]].any()


def test_failing_backend_is_one_line(micro_bundle, golden, monkeypatch):
    spec = micro_bundle.variant("fp32").specs[PROMPT_DECODER]
    path = micro_bundle.variant("fp32").path(PROMPT_DECODER)
    session = create_session("onnxruntime", path, spec)

    def fail(binding):
        raise RuntimeError("out of luck\nat length")

    monkeypatch.setattr(session._session, "run_with_iobinding", fail, raising=False)
    feed = {
        "image_embeddings": golden["image_embeddings"][:1],
        "point_coords": np.zeros((1, 1, 2), np.float32),
        "point_labels": np.zeros((1, 1), np.int32),
        "mask_request": request_answers(1),
        "mask_rows": mask_rows(1),
    }
    with pytest.raises(SessionError, match=r"onnxruntime failed: out of luck$"):
        session.run(feed)


@both
@pytest.mark.parametrize("op_type", ["MatMul", "Gemm", "Conv"])
def test_int8_products_are_exact(backend, op_type, tmp_path):
    """CPUs without VNNI clip sums of large products unless onnxruntime is told not to."""
    pytest.importorskip(backend)
    onnx = pytest.importorskip("onnx")
    k, n = 256, 16
    weight = np.random.default_rng(0).integers(100, 128, (k, n)).astype(np.int8)
    stored = weight.T.reshape(n, k, 1, 1) if op_type == "Conv" else weight
    arrays = {
        "scale": np.float32(1),
        "zero": np.int8(0),
        "w": stored,
        "w_scale": np.ones(n, np.float32),
        "w_zero": np.zeros(n, np.int8),
        "y_scale": np.float32(2**17),
    }
    pair = ("QuantizeLinear", "DequantizeLinear")
    axis = 0 if op_type == "Conv" else 1
    node = onnx.helper.make_node
    nodes = [
        node(pair[0], ["x", "scale", "zero"], ["q"]),
        node(pair[1], ["q", "scale", "zero"], ["d"]),
        node(pair[1], ["w", "w_scale", "w_zero"], ["dw"], axis=axis),
        node(op_type, ["d", "dw"], ["y" if op_type != "Conv" else "c"]),
    ]
    if op_type == "Conv":  # which onnxruntime computes in int8 only if the result is int8
        nodes += [
            node(pair[0], ["c", "y_scale", "zero"], ["qc"]),
            node(pair[1], ["qc", "y_scale", "zero"], ["y"]),
        ]
    shapes = {"x": (4, k), "y": (4, n)}
    if op_type == "Conv":
        shapes = {name: (1, size, 2, 2) for name, (_, size) in shapes.items()}
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    tensors = [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "product", [values["x"]], [values["y"]], tensors)
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "p.onnx"
    )
    spec = GraphSpec(
        "product",
        inputs=(TensorSpec("x", "float32", shapes["x"]),),
        outputs=(TensorSpec("y", "float32", shapes["y"]),),
    )
    x = np.full(shapes["x"], 127, np.float32)
    with create_session(backend, tmp_path / "p.onnx", spec) as session:
        found = session.run({"x": x})["y"]
    sums = 127.0 * weight.astype(np.int64).sum(axis=0)
    if op_type == "Conv":
        sums = np.rint(sums / 2**17)[:, None, None] * 2**17
    np.testing.assert_array_equal(found, np.broadcast_to(sums, shapes["y"]))


def test_a_graph_that_does_not_load_closes_those_before_it(micro_bundle, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from tap_deploy.sessions.ort.session import OnnxRuntimeSession

    fp32 = micro_bundle.variant("fp32")
    sessions = sessions_from_variant(fp32, threads=1)
    assert {name: session.spec for name, session in sessions.items()} == fp32.specs
    closed, close = [], OnnxRuntimeSession.close
    monkeypatch.setattr(
        OnnxRuntimeSession, "close", lambda self: (closed.append(self.spec.name), close(self))
    )
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    record = dataclasses.replace(fp32.records["text_decoder"], file="broken.onnx")
    broken = fp32.with_graphs(tmp_path, {"text_decoder": record})
    with pytest.raises(BundleError, match=r"broken\.onnx cannot be read"):
        sessions_from_variant(broken, threads=1)
    assert closed == ["prompt_decoder", "image_encoder"]
