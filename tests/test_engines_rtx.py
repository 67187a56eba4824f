"""Every graph compiles with an NVIDIA builder; TensorRT-RTX needs no GPU for that."""

from __future__ import annotations

import sys

import pytest

from tap_deploy import graphs
from tap_deploy.engines.rtx import rtx_engine_from_onnx
from tap_deploy.errors import MissingDependencyError, SessionError


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_graph_builds(micro_bundle, name):
    pytest.importorskip("tensorrt_rtx")
    path = micro_bundle.graph_path(name, "fp32")
    engine = rtx_engine_from_onnx(path, micro_bundle.graph_specs()[name])
    record = micro_bundle.manifest.graphs["fp32"][name]
    assert len(engine) > 0.9 * record.weights_bytes


def test_no_onnx_file(micro_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "graph.onnx").write_bytes(b"this is no model")
    spec = micro_bundle.graph_specs()[graphs.IMAGE_ENCODER]
    with pytest.raises(SessionError, match="TensorRT-RTX cannot parse"):
        rtx_engine_from_onnx(tmp_path / "graph.onnx", spec)


def test_missing_package_names_the_extra(monkeypatch, micro_bundle):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    spec = micro_bundle.graph_specs()[graphs.IMAGE_ENCODER]
    with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[rtx\]"'):
        rtx_engine_from_onnx("graph.onnx", spec)
