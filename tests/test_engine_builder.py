"""The builder against a strict fake of every TensorRT version, and against the real RTX."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

pytest.importorskip("onnx")
import onnx
from strict_tensorrt import VERSIONS, Builder, Strict, read_plan, strict_module

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.build.builder import (
    attach_timing_cache,
    engine_from_onnx,
    save_timing_cache,
)
from tap_deploy.engines.build.bundle_build import build_engines, graph_builds
from tap_deploy.engines.build.profiles import profile_as_json
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.engines.fp16.convert import add_fp16
from tap_deploy.engines.int8.make import make_int8
from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
from tap_deploy.engines.smoothing.smoothed_variant import OFF
from tap_deploy.errors import InputError, MissingDependencyError, SessionError
from tap_deploy.machine.gpu import Gpu
from tap_deploy.sessions.trt.log import error_log

ORIN = Gpu(name="Orin", compute_capability="8.7", driver="540.4.0 (CUDA 12.6)", integrated=True)
PRECISIONS = ("fp32", "fp16", "int8")


class BlindRuntime(Strict):
    """A runtime that deserialises nothing: the builder tests have no engine to inspect."""

    engine_host_code_allowed = False

    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        assert self.engine_host_code_allowed
        return None


@pytest.fixture(scope="session")
def converted(micro_bundle, photo, tmp_path_factory):
    """The micro model in every precision."""
    folder = shutil.copytree(micro_bundle.path, tmp_path_factory.mktemp("converted") / "bundle")
    bundle = Bundle.open(folder, check_hashes=False)
    add_fp16(bundle)
    quantize = QuantizeOptions(calibration_data=photo, method="max", threads=1)
    make_int8(bundle, Int8Options(quantize=quantize, smoothquant=OFF, verdict=None))
    return bundle


@pytest.fixture
def bundle(converted, tmp_path):
    """A copy that engines may be added to."""
    folder = shutil.copytree(converted.path, tmp_path / "bundle")
    return Bundle.open(folder, check_hashes=False)


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch):
    module = strict_module(request.param, Runtime=BlindRuntime)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def trt103(monkeypatch):
    module = strict_module("10.3", Runtime=BlindRuntime)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def fp32(**settings):
    return BuildTarget(precision="fp32", **settings)


def build(bundle, target, **options):
    options = {"find_gpu": lambda: ORIN, "available_bytes": lambda: 64 << 30} | options
    return list(build_engines(bundle, target, **options))


def build_text_decoder(bundle, target, **options):
    (planned,) = (b for b in graph_builds(bundle, target) if b.graph == graphs.TEXT_DECODER)
    options = {"gpu": ORIN} | options
    return engine_from_onnx(planned.onnx_path, target, profile=planned.profile, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_version_builds_every_graph(trt, bundle, precision):
    target = BuildTarget(precision=precision, max_prompts=32, workspace_bytes=1 << 28, opt_level=4)
    built = build(bundle, target)
    assert [plan.graph for plan in built] == list(graphs.GRAPH_NAMES)
    for plan, planned in zip(built, graph_builds(bundle, target), strict=True):
        header, onnx_bytes = read_plan(plan.path.read_bytes())
        assert header.fake == trt._version
        assert header.strongly_typed
        assert header.outputs[0]["dtype"] == planned.spec.outputs[0].dtype  # the graph's types
        assert header.flags == []  # no precision flag, and not the TF32 that is set by default
        assert header.memory_pools == {"WORKSPACE": 1 << 28}
        assert header.builder_optimization_level == 4
        assert header.profiling_verbosity == "DETAILED"
        assert header.hardware_compatibility_level == "NONE"
        assert onnx_bytes == planned.onnx_path.read_bytes()
        (profile,) = header.profiles
        assert profile == {
            name: [list(s) for _, s in shapes.items()] for name, shapes in planned.profile.items()
        }
        record = plan.record
        assert "user_allocation" not in record.flags  # of RTX; it would not fit older plans
        assert record.profiles == profile_as_json(planned.profile)
        assert (record.backend, record.backend_version) == ("tensorrt", trt.__version__)
        assert (record.compute_capabilities, record.minimum_compute_capability) == (("8.7",), None)
        assert record.layer_precisions is None  # the engine could not be deserialised
        assert (record.gpu, record.driver) == ("Orin", "540.4.0 (CUDA 12.6)")
        files = bundle.manifest.files
        assert record.onnx_sha256 == files[f"onnx/{precision}/{plan.graph}.onnx"].sha256
        assert record.size_bytes == plan.path.stat().st_size
        assert record.build_seconds > 0


def test_version_and_hardware_compatible(trt, bundle):
    built = build_text_decoder(
        bundle, fp32(version_compatible=True, hardware_compatible="ampere+", tf32=True)
    )
    header, _ = read_plan(built.plan)
    assert header.flags == ["TF32", "VERSION_COMPATIBLE"]
    assert header.hardware_compatibility_level == "AMPERE_PLUS"
    assert built.record.minimum_compute_capability == "8.0"
    assert built.record.version_compatible


def test_same_sm_came_after_10_3(trt, bundle):
    target = fp32(hardware_compatible="same-sm")
    if trt._version == "10.3":
        with pytest.raises(InputError, match=r"10\.3\.0\.1 has no hardware compatib.* 'same-sm'"):
            build_text_decoder(bundle, target)
    else:
        header, _ = read_plan(build_text_decoder(bundle, target).plan)
        assert header.hardware_compatibility_level == "SAME_COMPUTE_CAPABILITY"


def test_the_timing_cache_grows_and_is_used(trt, bundle, tmp_path):
    cache = tmp_path / "timing.cache"
    target = fp32(timing_cache=cache)
    first = build_text_decoder(bundle, target)
    entries = read_plan(first.plan)[0].timing_cache_entries
    second = build_text_decoder(bundle, target)
    assert read_plan(second.plan)[0].timing_cache_entries == 2 * entries > 0
    assert first.notes == second.notes == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "timing.cache"]
    # It changes the build time, not the plan.
    assert first.record.key == build_text_decoder(bundle, fp32()).record.key


def test_builds_at_a_time_lose_nothing_of_each_others_timing_cache(trt, bundle, tmp_path):
    cache = tmp_path / "timing.cache"
    target = fp32(timing_cache=cache)
    entries = read_plan(build_text_decoder(bundle, target).plan)[0].timing_cache_entries
    other = trt.Builder(error_log(trt)).create_builder_config()
    assert attach_timing_cache(other, cache) is None
    build_text_decoder(bundle, target)  # stored while the other one still builds
    save_timing_cache(other, cache)
    third = build_text_decoder(bundle, target)
    assert read_plan(third.plan)[0].timing_cache_entries == 3 * entries > 0


@pytest.mark.parametrize("kind", ["damaged", "of another version"])
def test_a_timing_cache_of_no_use_is_replaced(trt103, bundle, tmp_path, monkeypatch, kind):
    cache = tmp_path / "timing.cache"
    if kind == "damaged":
        cache.write_bytes(b"rubbish")
    else:
        monkeypatch.setitem(sys.modules, "tensorrt", strict_module("11.1", Runtime=BlindRuntime))
        build_text_decoder(bundle, fp32(timing_cache=cache))
        monkeypatch.setitem(sys.modules, "tensorrt", trt103)
    built = build_text_decoder(bundle, fp32(timing_cache=cache))
    (note,) = built.notes
    assert str(cache) in note
    assert b'"version": "10.3"' in cache.read_bytes()


def test_progress_goes_from_nothing_to_all(trt, bundle):
    seen = []
    build(bundle, fp32(), on_progress=lambda *state: seen.append(state))
    for graph in graphs.GRAPH_NAMES:
        shares = [share for name, share, _ in seen if name == graph]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        assert len(shares) > 3
    assert "Building Engine" in {phase for _, _, phase in seen}


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interrupt_ends_the_build_and_leaves_nothing(trt103, bundle, error):
    def interrupt(graph, share, phase):
        if phase == "Building Engine":
            raise error

    with pytest.raises(error):
        build(bundle, fp32(), on_progress=interrupt)
    assert not (bundle.path / "engines").exists()


def test_nested_phases_make_one_share(trt103):
    from tap_deploy.engines.build.progress import progress_monitor

    shares = []
    monitor = progress_monitor(trt103, lambda share, phase: shares.append(round(share, 3)))
    monitor.phase_start("outer", None, 2)
    assert monitor.step_complete("outer", 0)
    monitor.phase_start("inner", "outer", 4)
    assert monitor.step_complete("inner", 1)
    monitor.phase_finish("inner")
    assert monitor.step_complete("outer", 1)
    assert shares == [0.0, 0.5, 0.5, 0.75, 1.0]


def test_a_graph_that_the_parser_does_not_know(trt103, bundle, tmp_path):
    model = onnx.load(bundle.variant("fp32").path(graphs.TEXT_DECODER))
    model.opset_import[0].version = 23
    path = tmp_path / "text_decoder.onnx"
    onnx.save(model, path)
    (planned,) = (b for b in graph_builds(bundle, fp32()) if b.graph == graphs.TEXT_DECODER)
    with pytest.raises(SessionError, match=r"10\.3\.0\.1 cannot parse .*opset 23"):
        engine_from_onnx(path, fp32(), profile=planned.profile, gpu=ORIN)


def test_what_is_no_onnx_file(trt, bundle, tmp_path):
    path = tmp_path / "text_decoder.onnx"
    path.write_bytes(b"this is no model")
    (planned,) = (b for b in graph_builds(bundle, fp32()) if b.graph == graphs.TEXT_DECODER)
    with pytest.raises(SessionError, match="it is not an ONNX model"):
        engine_from_onnx(path, fp32(), profile=planned.profile, gpu=ORIN)


def test_a_graph_with_other_inputs(trt103, bundle):
    builds = {b.graph: b for b in graph_builds(bundle, fp32())}
    encoder, decoder = builds[graphs.IMAGE_ENCODER], builds[graphs.PROMPT_DECODER]
    with pytest.raises(SessionError, match="has the inputs images; expected image_embeddings"):
        engine_from_onnx(encoder.onnx_path, fp32(), profile=decoder.profile, gpu=ORIN)


def test_the_reason_of_the_builder_is_part_of_the_message(trt103, bundle, monkeypatch):
    monkeypatch.setattr(Builder, "_problem", lambda *args: "Could not find any implementation")
    with pytest.raises(SessionError, match=r"Could not find any implementation; .*--workspace"):
        build_text_decoder(bundle, fp32())


def test_tensorrt_takes_a_gpu(trt103, bundle):
    with pytest.raises(SessionError, match="found none; build on the device"):
        build(bundle, fp32(), find_gpu=lambda: None)


def test_a_driver_that_is_too_old(bundle, monkeypatch):
    class NoBuilder(Strict):
        def __init__(self, logger):
            logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setitem(sys.modules, "tensorrt", strict_module("10.3", Builder=NoBuilder))
    with pytest.raises(SessionError, match=r"does not start here: CUDA .*35; see: tap-export doc"):
        build_text_decoder(bundle, fp32())


def test_missing_packages_name_the_extra(monkeypatch, bundle):
    for backend, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")):
        monkeypatch.setitem(sys.modules, backend, None)
        with pytest.raises(MissingDependencyError, match=rf'pip install "tap-deploy\[{extra}\]"'):
            build(bundle, fp32(backend=backend))


INSPECTED = {
    "10": {"Name": "y", "Format/Datatype": "Row major linear FP16 format"},
    "11": {"Name": "y", "DataType": "Half", "Format": "Row major linear FP32 format"},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_inspector_counts_layers_where_there_is_a_gpu(version, bundle, monkeypatch):
    output = INSPECTED[version.split(".")[0]]
    dynamic = {"Name": "z", "Format/Datatype": "N/A due to dynamic shapes"}
    layers = [{"Outputs": [output]}, {"Outputs": [output]}, {"Outputs": [dynamic]}, "a name"]

    class FakeInspector(Strict):
        def get_engine_information(self, format):
            assert format is trt.LayerInformationFormat.JSON
            return json.dumps({"Layers": layers})

    class FakeEngine(Strict):
        def create_engine_inspector(self):
            return trt.EngineInspector._make()

    class FakeRuntime(Strict):
        engine_host_code_allowed = False

        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            # A small board has no room for both.
            assert not list(trt._building), "builder and network are still there"
            read_plan(data)
            return trt.ICudaEngine._make()

    trt = strict_module(
        version, Runtime=FakeRuntime, ICudaEngine=FakeEngine, EngineInspector=FakeInspector
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    record = build_text_decoder(bundle, fp32()).record
    assert record.layer_precisions == {"fp16": 2, "unknown": 2}


def test_a_second_build_is_a_cache_hit(trt, bundle):
    first, second = build(bundle, fp32()), build(bundle, fp32())
    assert not any(plan.cached for plan in first)
    assert all(plan.cached for plan in second)
    assert [p.record for p in first] == [p.record for p in second]
    assert not any(plan.cached for plan in build(bundle, fp32(), force=True))


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({"max_prompts": 8}, {graphs.PROMPT_DECODER, graphs.TEXT_DECODER}),
        ({"max_points": 4}, {graphs.PROMPT_DECODER}),
        ({"max_images": 2}, {graphs.IMAGE_ENCODER}),
        ({"workspace_bytes": 1 << 20}, set(graphs.GRAPH_NAMES)),
        ({"opt_level": 0}, set(graphs.GRAPH_NAMES)),
        ({"tf32": True}, set(graphs.GRAPH_NAMES)),
        ({"version_compatible": True}, set(graphs.GRAPH_NAMES)),
    ],
)
def test_what_changed_is_built_again(trt103, bundle, change, rebuilt):
    build(bundle, fp32())
    assert {p.graph for p in build(bundle, fp32(**change)) if not p.cached} == rebuilt


def test_a_damaged_plan_is_built_again(trt103, bundle):
    (path,) = (p.path for p in build(bundle, fp32()) if p.graph == graphs.TEXT_DECODER)
    path.write_bytes(path.read_bytes()[:-1])
    assert [p.cached for p in build(bundle, fp32())] == [True, True, False]


def test_another_gpu_has_its_own_folder(trt103, bundle):
    thor = Gpu(name="Thor", compute_capability="11.0", driver="580.00", integrated=True)
    build(bundle, fp32())
    assert not any(plan.cached for plan in build(bundle, fp32(), find_gpu=lambda: thor))
    names = sorted(p.name for p in (bundle.path / "engines").iterdir())
    assert names == ["tensorrt-10.3.0.1-sm110-fp32", "tensorrt-10.3.0.1-sm87-fp32"]


def test_a_build_that_memory_will_not_do_for_is_refused(trt103, bundle):
    target, gib = fp32(), 1 << 30
    with pytest.raises(
        InputError, match=r"needs about 1\.5 GiB.*chmod 600.*swapon.*--force-memory"
    ):
        build(bundle, target, available_bytes=lambda: gib)
    assert not (bundle.path / "engines").exists()
    build(bundle, target, available_bytes=lambda: gib, force_memory=True)
    # Nothing is to be built, so nothing is asked for.
    build(bundle, target, available_bytes=lambda: 0)


@pytest.mark.parametrize(
    ("capabilities", "set_to", "record"),
    [
        ((), [], (("8.6", "8.9", "12.0", "12.1"), "12.1")),
        (("8.6", "8.9"), ["SM86", "SM89"], (("8.6", "8.9"), None)),
        (("current",), ["CURRENT"], (("8.7",), None)),
    ],
)
def test_rtx_builds_for_the_gpus_that_are_asked_for(
    monkeypatch, bundle, capabilities, set_to, record
):
    monkeypatch.setitem(
        sys.modules, "tensorrt_rtx", strict_module("1.7", "tensorrt_rtx", Runtime=BlindRuntime)
    )
    target = fp32(backend="tensorrt_rtx", compute_capabilities=capabilities)
    gpu = ORIN if capabilities == ("current",) else None
    built = build_text_decoder(bundle, target, gpu=gpu)
    header, _ = read_plan(built.plan)
    assert header.compute_capabilities == set_to
    assert header.flags == ["REQUIRE_USER_ALLOCATION"]  # or its contexts cannot be recorded
    assert built.record.flags["user_allocation"] is True
    found = built.record.compute_capabilities, built.record.minimum_compute_capability
    assert found == record
    assert built.record.layer_precisions is None


def test_a_gpu_that_rtx_cannot_build_for(bundle):
    pytest.importorskip("tensorrt_rtx")
    target = fp32(backend="tensorrt_rtx", compute_capabilities=("8.7",))
    with pytest.raises(InputError, match=r"cannot build for compute capability 8\.7; .*SM86"):
        build_text_decoder(bundle, target, gpu=None)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rtx_itself_builds_every_graph(bundle, precision):
    """No fake: NVIDIA's builder parses, type-checks and compiles; it needs no GPU for that."""
    rtx = pytest.importorskip("tensorrt_rtx")
    seen = []
    target = BuildTarget(backend="tensorrt_rtx", precision=precision, compute_capabilities=("8.6",))
    built = build(
        bundle, target, find_gpu=lambda: None, on_progress=lambda *state: seen.append(state)
    )
    for plan in built:
        weights = bundle.manifest.graphs[target.variant][plan.graph].weights_bytes
        assert plan.path.stat().st_size > 0.9 * weights
        assert plan.record.backend_version == rtx.__version__
        assert plan.record.layer_precisions is None  # it takes a GPU to know
        shares = [share for graph, share, _ in seen if graph == plan.graph]
        assert shares == sorted(shares)
        assert len({phase for graph, _, phase in seen if graph == plan.graph}) > 4
    assert all(plan.cached for plan in build(bundle, target, find_gpu=lambda: None))


def test_rtx_itself_refuses_what_is_no_onnx_file(bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "text_decoder.onnx"
    path.write_bytes(b"this is no model")
    (planned,) = (b for b in graph_builds(bundle, fp32()) if b.graph == graphs.TEXT_DECODER)
    with pytest.raises(SessionError, match=r"tensorrt_rtx .* cannot parse"):
        engine_from_onnx(path, fp32(backend="tensorrt_rtx"), profile=planned.profile)
