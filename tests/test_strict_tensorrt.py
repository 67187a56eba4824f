"""The fake rejects everything that a version lacks."""

from __future__ import annotations

import json

import pytest
from strict_tensorrt import (
    API_FOLDER,
    BUILDER_SIDE,
    VERSIONS,
    PlanHeader,
    Strict,
    read_plan,
    strict_module,
)


@pytest.mark.parametrize(
    ("version", "path"),
    [
        ("10.3", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"),
        ("10.3", "Builder.build_serialized_network_to_stream"),
        ("10.3", "BuilderFlag.MONITOR_MEMORY"),
        ("10.3", "ComputeCapability"),
        ("10.13", "INetworkDefinition.add_attention"),
        ("10.16", "IBuilderConfig.num_compute_capabilities"),
        ("11.1", "BuilderFlag.FP16"),
        ("11.1", "IBuilderConfig.int8_calibrator"),
        ("11.1", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("11.1", "IInt8Calibrator"),
        ("11.1", "Builder.platform_has_fast_fp16"),
    ],
)
def test_what_a_version_lacks_raises_with_its_name(version, path):
    found = strict_module(version)
    *parents, last = path.split(".")
    for name in parents:
        found = getattr(found, name)
    with pytest.raises(AttributeError, match=last):
        getattr(found, last)


@pytest.mark.parametrize("version", VERSIONS)
def test_instances_are_as_strict_as_classes(version):
    trt = strict_module(version)
    config = trt.Builder(trt.Logger()).create_builder_config()
    for name in ("num_compute_capabilities", "max_workspace_size"):
        with pytest.raises(AttributeError, match=name):
            getattr(config, name)
        with pytest.raises(AttributeError, match=name):
            setattr(config, name, 1)
    with pytest.raises(NotImplementedError, match="max_aux_streams"):
        _ = config.max_aux_streams
    with pytest.raises(TypeError, match="No constructor"):
        trt.IBuilderConfig()


def test_programs_may_add_to_their_own_subclasses():
    trt = strict_module("10.3")

    class OwnLogger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, msg):
            self.lines.append(msg)

    logger = OwnLogger()
    trt.Builder(logger)
    logger.log(trt.ILogger.ERROR, "a line")
    assert logger.lines == ["a line"]


def test_strong_typing_has_another_number_in_every_major_version():
    numbers = {
        v: int(strict_module(v).NetworkDefinitionCreationFlag.STRONGLY_TYPED) for v in VERSIONS
    }
    assert numbers == {"10.3": 1, "10.13": 1, "10.16": 1, "11.1": 0}


def test_enumerators_are_no_integers():
    trt = strict_module("10.3")
    with pytest.raises(TypeError):
        _ = trt.BuilderFlag.FP16 + 1
    with pytest.raises(TypeError):
        _ = trt.BuilderFlag.FP16 < trt.BuilderFlag.INT8
    assert not hasattr(trt.BuilderFlag, "NO_SUCH_FLAG")


def test_other_sides_can_be_added():
    class FakeRuntime(Strict):
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, data):
            return len(data)

        def not_in_any_version(self):
            raise AssertionError

    trt = strict_module("10.3", Runtime=FakeRuntime)
    runtime = trt.Runtime(trt.Logger())
    assert runtime.deserialize_cuda_engine(b"123") == 3
    with pytest.raises(AttributeError, match="not_in_any_version"):
        runtime.not_in_any_version()


def test_other_bytes_are_no_plan():
    with pytest.raises(ValueError, match="not a plan"):
        read_plan(b"ftrt")
    assert "profiles" in PlanHeader.__dataclass_fields__


@pytest.mark.parametrize("version", VERSIONS)
def test_every_implemented_class_is_part_of_the_version(version):
    api = json.loads((API_FOLDER / f"tensorrt-{version}.json").read_text("utf-8"))
    assert set(BUILDER_SIDE) <= set(api)


def test_the_listing_of_rtx_is_that_of_the_module():
    """The one listing that can be checked here; made the same way for what the fake implements."""
    module = pytest.importorskip("tensorrt_rtx")
    if not module.__version__.startswith("1.7"):
        pytest.skip(f"the listing is of 1.7, this is {module.__version__}")
    api = json.loads((API_FOLDER / "tensorrt_rtx-1.7.json").read_text("utf-8"))
    for name, members in api.items():
        native = getattr(module, name)
        missing = [member for member in members if not hasattr(native, member)]
        assert not missing, name
    for name in BUILDER_SIDE:
        public = {n for n in dir(getattr(module, name)) if not n.startswith("_")}
        assert public <= set(api[name]) | {"name", "value"}, name
