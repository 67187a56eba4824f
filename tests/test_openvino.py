"""OpenVINO and the mix of both backends for CPUs: memory, threads, cache, bf16, choice."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import json
import pathlib
import pwd
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle, file_records
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.engines.verdict.choose import measure_cpu_choice
from tap_deploy.engines.verdict.speed import SpeedOptions
from tap_deploy.errors import BundleError, MissingDependencyError, SessionError
from tap_deploy.machine import cpu
from tap_deploy.machine.host import Host
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions import cache_folder, loader
from tap_deploy.sessions.cpu_choice import cpu_backends, store_times
from tap_deploy.sessions.opening import create_session, sessions_from_bundle
from tap_deploy.sessions.openvino.compiled_cache import drop_pages
from tap_deploy.sessions.openvino.session import OpenVinoSession
from tap_deploy.sessions.ort.session import OnnxRuntimeSession
from tap_deploy.sessions.run_on import RunOn
from tests.commands import invoke
from tests.test_telemetry import run

ENCODER, PROMPTS, TEXT = graphs.GRAPH_NAMES
needs_bf16 = pytest.mark.skipif(not cpu.cpu_has_bf16(Host()), reason="this CPU has no bf16")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "tap_deploy"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tap_deploy"


@pytest.fixture(scope="module")
def encoder(micro_bundle):
    fp32 = micro_bundle.variant("fp32")
    with create_session("openvino", fp32.path(ENCODER), fp32.specs[ENCODER], threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def decoder(micro_bundle):
    fp32 = micro_bundle.variant("fp32")
    with create_session("openvino", fp32.path(PROMPTS), fp32.specs[PROMPTS], threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def images(micro_config):
    size = micro_config.image_size
    return np.random.default_rng(0).integers(0, 256, (2, 1, size, size, 3), np.uint8)


def feed(golden, rows=4, points=4):
    return {
        graphs.IMAGE_EMBEDDINGS: golden["image_embeddings"][:1],
        graphs.POINT_COORDS: np.ascontiguousarray(golden["points_model"][:rows, :points, :2]),
        graphs.POINT_LABELS: np.ascontiguousarray(
            golden["points_model"][:rows, :points, 2].astype(np.int32)
        ),
        graphs.MASK_REQUEST: request_answers(rows),
        graphs.MASK_ROWS: mask_rows(rows),
    }


def embeddings(session, picture):
    return session.run({graphs.IMAGES: picture})[graphs.IMAGE_EMBEDDINGS]


def lend(session, request):
    """Let the next call of a session use this request."""
    while session._requests.qsize():
        session._requests.get_nowait()
    session._requests.put(request)


def test_the_answers_follow_the_inputs_and_stay(encoder, images):
    """A, B, A; an answer is no view of memory that the next call overwrites."""
    first = embeddings(encoder, images[0])
    kept = first.copy()
    other = embeddings(encoder, images[1])
    assert np.abs(other - first).max() > 0.1
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(embeddings(encoder, images[0]), kept)
    assert not np.shares_memory(first, other)


def test_pictures_and_embeddings_are_not_copied(encoder, images):
    seen = {}
    request = encoder._loaded[0].create_infer_request()

    class Watched:
        def set_tensor(self, name, tensor):
            seen[name] = tensor.data.ctypes.data
            request.set_tensor(name, tensor)

        def infer(self):
            for name, address in seen.items():
                assert request.get_tensor(name).data.ctypes.data == address
            request.infer()

    lend(encoder, Watched())
    found = embeddings(encoder, images[0])
    encoder._requests.get_nowait()
    assert seen == {
        graphs.IMAGES: images[0].ctypes.data,
        graphs.IMAGE_EMBEDDINGS: found.ctypes.data,
    }


def test_inputs_may_be_read_only(encoder, images):
    expected = embeddings(encoder, images[0])
    picture = images[0].copy()
    picture.flags.writeable = False
    np.testing.assert_array_equal(embeddings(encoder, picture), expected)


def test_prompts_and_points_vary_without_compiling_again(decoder, golden):
    compiled = decoder._loaded[0]
    whole = decoder.run(feed(golden, 8))
    for rows in (1, 5, 8, 2):
        found = decoder.run(feed(golden, rows))
        for name, array in found.items():
            np.testing.assert_allclose(array, whole[name][:rows], atol=1e-4)
    fewer = decoder.run(feed(golden, 3, 1))
    assert np.isfinite(fewer[graphs.LOW_RES_MASKS]).all()
    assert decoder._loaded[0] is compiled


def test_threads_share_a_session(encoder, images):
    expected = [embeddings(encoder, picture) for picture in images]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: embeddings(encoder, images[i % 2]), range(12)))
    for i, array in enumerate(found):
        np.testing.assert_array_equal(array, expected[i % 2])
    assert encoder._requests.qsize() <= 4


def test_a_failing_run_is_one_line_and_the_next_one_works(decoder, golden):
    class Fails:
        def set_tensor(self, name, tensor):
            pass

        def infer(self):
            raise RuntimeError("Exception from src/inference.cpp:1:\nout of luck\n\n")

    lend(decoder, Fails())
    with pytest.raises(SessionError, match=r"graph prompt_decoder: OpenVINO failed: out of luck$"):
        decoder.run(feed(golden))
    assert np.isfinite(decoder.run(feed(golden))[graphs.LOW_RES_MASKS]).all()


def test_a_session_that_is_closed_during_a_run_ends_it_well(micro_bundle, images, own_cache):
    """The mapped file of the cache stays until then."""
    for _ in range(2):  # the second one comes from the cache
        session = sessions_from_bundle(micro_bundle, RunOn(backend="openvino", threads=1))[ENCODER]
    assert session._loaded[1] is not None
    expected = embeddings(session, images[0])
    request = session._requests.get_nowait()

    class ClosesMeanwhile:
        set_tensor = staticmethod(request.set_tensor)

        def infer(self):
            session.close()
            request.infer()

    lend(session, ClosesMeanwhile())
    np.testing.assert_array_equal(embeddings(session, images[0]), expected)
    with pytest.raises(SessionError, match="the session is closed"):
        session.run({graphs.IMAGES: images[0]})


def test_the_mapped_file_leaves_memory(micro_bundle, images, own_cache):
    """OpenVINO copies most weights, which would count twice with the pages of the file."""

    def resident_bytes():
        mapping = rf"{re.escape(str(own_cache))}.*\.blob\n(?:.*\n)*?Rss: +(\d+) kB"
        found = re.findall(mapping, pathlib.Path("/proc/self/smaps").read_text())
        assert found
        return 1024 * sum(map(int, found))

    for _ in range(2):  # the second one comes from the cache
        session = sessions_from_bundle(micro_bundle, RunOn(backend="openvino", threads=1))[ENCODER]
    assert resident_bytes() == 0
    expected = embeddings(session, images[0])
    assert resident_bytes() == 0
    np.testing.assert_array_equal(embeddings(session, images[0]), expected)


def test_pages_that_are_locked_in_memory_stay():
    """As in processes that call ``mlockall``."""

    class Locked:
        def madvise(self, advice):
            raise OSError(errno.EINVAL, "Invalid argument")

    drop_pages(Locked())


def test_signals_are_handled_after_another_thread_drops_the_session(micro_bundle, own_cache):
    """The CPU plugin replaces the signal stack of a thread; Python's handlers run on it."""
    program = """
import signal, sys, threading
from tap_deploy import Bundle
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
sessions = sessions_from_bundle(Bundle.open(sys.argv[1]), RunOn(backend="openvino"))

def drop():
    while sessions:
        sessions.popitem()[1].close()

other = threading.Thread(target=drop)
other.start()
other.join()
signal.raise_signal(signal.SIGUSR1)
"""
    for _ in ("compiled", "from the cache"):
        command = [sys.executable, "-c", program, micro_bundle.path]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


def test_weights_may_be_links_to_another_folder(micro_bundle, golden, decoder, tmp_path):
    """As in git-annex and other caches; OpenVINO itself refuses them."""
    onnx = pytest.importorskip("onnx")
    fp32, names = micro_bundle.variant("fp32"), ("graph.onnx", "graph.onnx.data")
    model = onnx.load(fp32.path(PROMPTS))
    external = {"save_as_external_data": True, "location": names[1], "size_threshold": 0}
    (tmp_path / "made").mkdir()
    onnx.save(model, tmp_path / "made" / names[0], **external)
    for name in names:
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "made" / name, tmp_path / name / "object")
        (tmp_path / "made" / name).unlink()
        (tmp_path / "made" / name).symlink_to(tmp_path / name / "object")
    path, spec = tmp_path / "made" / names[0], fp32.specs[PROMPTS]
    with create_session("openvino", path, spec, threads=1) as session:
        found, expected = session.run(feed(golden)), decoder.run(feed(golden))
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def blobs(folder):
    return sorted(folder.glob("openvino-*.blob"))


def encoded(bundle, images, **how):
    sessions = sessions_from_bundle(bundle, RunOn(backend="openvino", threads=1, **how))
    found = embeddings(sessions[ENCODER], images[0])
    for session in sessions.values():
        session.close()
    return found


def test_the_second_start_compiles_nothing(micro_bundle, images, own_cache, monkeypatch):
    import openvino

    expected = encoded(micro_bundle, images)
    stored = {path: path.stat().st_mtime_ns for path in blobs(own_cache)}
    assert len(stored) == 3

    def refuse(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(openvino.Core, "compile_model", refuse)
    np.testing.assert_array_equal(encoded(micro_bundle, images), expected)
    assert {path: path.stat().st_mtime_ns for path in blobs(own_cache)} == stored


@pytest.fixture(scope="module")
def linked_bundle(micro_bundle, tmp_path_factory):
    """A bundle of links, as in the cache of a model hub, whose weights are in other files."""
    onnx = pytest.importorskip("onnx")
    made = shutil.copytree(micro_bundle.path, tmp_path_factory.mktemp("linked") / "made")
    records = {}
    for graph, record in micro_bundle.manifest.graphs["fp32"].items():
        path = made / record.file
        model = onnx.load(path)
        path.unlink()
        external = {"save_as_external_data": True, "location": f"{path.name}.data"}
        onnx.save(model, path, size_threshold=0, **external)
        records[graph] = dataclasses.replace(record, external_data=True)
    (made / MANIFEST_NAME).unlink()
    manifest = dataclasses.replace(
        micro_bundle.manifest,
        graphs=micro_bundle.manifest.graphs | {"fp32": records},
        files=file_records(made),
    )
    (made / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    linked = made.with_name("linked")
    for index, file in enumerate(path for path in made.rglob("*") if path.is_file()):
        path = linked / file.relative_to(made)
        path.parent.mkdir(parents=True, exist_ok=True)
        (made.parent / str(index)).mkdir()
        path.symlink_to(file.rename(made.parent / str(index) / "object"))
    return Bundle.open(linked)


@pytest.mark.parametrize("has_cache", [True, False])
def test_graphs_behind_links_are_compiled_once(
    linked_bundle, micro_bundle, images, own_cache, monkeypatch, has_cache
):
    """OpenVINO gets copies: hard links would change the times of the files."""
    import openvino

    if not has_cache:
        monkeypatch.setattr(loader.Loader, "_cache_folder", lambda self, options: None)
    real, calls = openvino.Core.compile_model, []

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(openvino.Core, "compile_model", counted)
    expected = encoded(micro_bundle, images)
    calls.clear()
    np.testing.assert_array_equal(encoded(linked_bundle, images), expected)
    assert len(calls) == 3
    np.testing.assert_array_equal(encoded(linked_bundle, images), expected)
    assert len(calls) == (3 if has_cache else 6)


def test_other_weights_at_the_same_path_are_compiled_anew(bundle, images, own_cache):
    """Bundles are replaced in place; OpenVINO's own cache would look at path and time."""
    onnx = pytest.importorskip("onnx")
    expected = encoded(bundle, images)
    name = "onnx/fp32/image_encoder.onnx"
    model = onnx.load(bundle.path / name)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("bias"):
            changed = onnx.numpy_helper.to_array(tensor) + np.float32(1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    (bundle.path / name).write_bytes(model.SerializeToString())
    files = bundle.manifest.files | {name: file_records(bundle.path)[name]}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    other = Bundle.open(bundle.path)
    assert np.abs(encoded(other, images) - expected).max() > 0.1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-999],
        lambda data: b"",
        lambda data: b"xx",
        lambda data: data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:],
    ],
    ids=["cut", "empty", "short", "a bit of a weight"],
)
def test_a_cache_that_cannot_be_read_is_made_again(micro_bundle, images, own_cache, caplog, spoil):
    expected = encoded(micro_bundle, images)
    whole = {path: path.read_bytes() for path in blobs(own_cache)}
    for path, data in whole.items():
        path.write_bytes(spoil(data))
    np.testing.assert_array_equal(encoded(micro_bundle, images), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "cannot be read and is made again" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(encoded(micro_bundle, images), expected)
    assert set(blobs(own_cache)) == set(whole)
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_no_error(
    micro_bundle, images, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.isfinite(encoded(micro_bundle, images)).all()
    assert "compiled graph not stored" in caplog.text


def test_without_a_home_folder_nothing_is_kept(micro_bundle, images, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    cache_folder._warn_once.cache_clear()
    for session in sessions_from_bundle(micro_bundle, RunOn(threads=1)).values():
        session.close()
    assert caplog.text == ""  # onnxruntime compiles nothing
    assert np.isfinite(encoded(micro_bundle, images)).all()
    assert "this user has no home folder" in caplog.text


def test_settings_and_instructions_have_files_of_their_own(
    micro_bundle, images, own_cache, monkeypatch
):
    from tap_deploy.sessions.openvino import compiled_cache

    encoded(micro_bundle, images)
    monkeypatch.setattr(compiled_cache, "cpu_flags", lambda host: {"sse2"})
    encoded(micro_bundle, images)
    assert len(blobs(own_cache)) == 6


PROGRAM = """
import os, pathlib, re, sys
allowed = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, allowed)
from tap_deploy import TapPredictor
predictor = TapPredictor.from_bundle(sys.argv[1], sys.argv[2], allow_failed=True)
predictor.predict(sys.argv[3], points=[[[9, 9, 1]]])
tasks = pathlib.Path("/proc/self/task").iterdir()
lists = {re.search(r"Cpus_allowed_list:\\\\s+(\\\\S+)", (task / "status").read_text())[1]
         for task in tasks}
print(lists == {str(cpu) for cpu in allowed})
"""


@pytest.mark.parametrize("backend", ["openvino", "cpu"])
def test_threads_stay_on_the_cpus_of_the_process(micro_bundle, photo, backend):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("\\\\", "\\"), micro_bundle.path, backend, photo],
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_only_the_cache_appears_in_the_home_folder(tmp_path, micro_bundle, photo):
    """Left alone, OpenVINO reports its import, and stores an id."""
    code = (
        "import sys; from tap_deploy import TapPredictor\n"
        "with TapPredictor.from_bundle(sys.argv[1], 'openvino') as predictor:\n"
        "    predictor.predict(sys.argv[2], points=[[[9, 9, 1]]])\n"
    )
    run(tmp_path, code, micro_bundle.path, photo)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".blob"}
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]


# --- precisions, and the commands ---


@pytest.fixture(scope="module")
def int8_bundle(micro_bundle, tmp_path_factory, photo):
    pytest.importorskip("onnx_ir")
    path = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(micro_bundle.path, path)
    how = ("--method", "max", "--smoothquant", "off", "--no-verdict", "--threads", 1)
    result = invoke("quantize", path, "--calibration-data", photo, *how)
    assert result.exit_code == 0, result.output
    return Bundle.open(path)


PRECISIONS = [
    "fp32",
    "int8",
    pytest.param("bf16", marks=needs_bf16),
    pytest.param("int8+bf16", marks=needs_bf16),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["openvino", "cpu"])
def test_selftest_and_verify_pass(int8_bundle, tmp_path, backend, precision):
    path = shutil.copytree(int8_bundle.path, tmp_path / "bundle")
    how = ("--backend", backend, "--precision", precision, "--threads", 1)
    verified = invoke("verify", path, *how, "--json")
    assert verified.exit_code == 0, verified.output
    assert len(json.loads(verified.stdout)["checks"]) > 50
    result = invoke("selftest", path, *how, "--json")
    assert result.exit_code == 0, result.output
    mark = json.loads(result.stdout)
    assert (mark["comparisons"], mark["precision"]) == (69, precision)
    assert "2026" in mark["backend_version"]
    name = RunOn(backend=backend, precision=precision).mark_name
    variant = "int8_fp32" if "int8" in precision else "fp32"
    marks = Bundle.open(path).manifest.precision_record(variant).selftest
    assert list(marks) == [name] == [mark["backend"]]


@pytest.mark.parametrize("backend", ["openvino", "cpu"])
def test_a_cpu_without_bf16_refuses_it(micro_bundle, monkeypatch, backend):
    monkeypatch.setattr(loader, "cpu_has_bf16", lambda host: False)
    how = ("--backend", backend, "--precision", "bf16")
    result = invoke("verify", micro_bundle.path, *how)
    assert result.exit_code == 2
    assert "cannot multiply bf16; use precision fp32 or int8" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_bf16_is_read_from_the_flags_of_the_cpu(tmp_path, flags, has):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert cpu.cpu_has_bf16(Host(root=tmp_path)) is has


@needs_bf16
def test_bf16_leaves_the_text_decoder_alone(micro_bundle):
    sessions = sessions_from_bundle(micro_bundle, RunOn(backend="openvino", precision="bf16"))
    hints = {
        name: session._loaded[0].get_property("INFERENCE_PRECISION_HINT").to_string()
        for name, session in sessions.items()
    }
    assert hints == {ENCODER: "bf16", PROMPTS: "bf16", TEXT: "f32"}


# --- the choice of the backend ``cpu`` ---


def kinds(bundle, **how):
    sessions = sessions_from_bundle(bundle, RunOn(backend="cpu", threads=1, **how))
    found = {name: type(session) for name, session in sessions.items()}
    for session in sessions.values():
        session.close()
    return found


def test_the_default_mix_is_said_and_loaded(micro_bundle, own_cache, caplog):
    caplog.set_level("INFO")
    assert kinds(micro_bundle) == {
        ENCODER: OpenVinoSession,
        PROMPTS: OpenVinoSession,
        TEXT: OnnxRuntimeSession,
    }
    assert (
        "on this CPU: image_encoder in openvino, prompt_decoder in openvino, text_decoder in "
        "onnxruntime" in caplog.text
    )


def test_measured_times_decide_for_their_precision_and_model(micro_bundle, own_cache):
    times = {name: {"onnxruntime": 1.0, "openvino": 2.0} for name in (ENCODER, PROMPTS)}
    times[TEXT] = {"onnxruntime": 2.0, "openvino": 1.0}
    config, run_on = micro_bundle.config, RunOn(backend="cpu")
    path = store_times(config, {"fp32": times})
    assert path.parent == own_cache
    assert kinds(micro_bundle) == {
        ENCODER: OnnxRuntimeSession,
        PROMPTS: OnnxRuntimeSession,
        TEXT: OpenVinoSession,
    }
    assert cpu_backends(config, RunOn(backend="cpu", precision="int8"))[ENCODER] == "openvino"
    other = dataclasses.replace(config, text_depth=config.text_depth + 1)
    assert cpu_backends(other, run_on)[ENCODER] == "openvino"
    store_times(config, {"int8": times})
    assert cpu_backends(config, run_on)[ENCODER] == "onnxruntime"  # kept
    assert cpu_backends(config, RunOn(backend="cpu", precision="int8"))[TEXT] == "openvino"


@pytest.mark.parametrize("content", ["", "[1]", '{"fp32": 3}', '{"fp32": {"image_encoder": {}}}'])
def test_times_that_cannot_be_read_are_ignored(micro_bundle, own_cache, caplog, content):
    config, run_on = micro_bundle.config, RunOn(backend="cpu")
    expected = cpu_backends(config, run_on)
    store_times(config, {}).write_text(content)
    assert cpu_backends(config, run_on) == expected
    assert "cannot be read; the built-in times are used" in caplog.text


@pytest.mark.parametrize("missing", ["onnxruntime", "openvino"])
def test_what_is_not_installed_is_not_taken(micro_bundle, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    (other,) = {"onnxruntime", "openvino"} - {missing}
    run_on = RunOn(backend="cpu")
    assert set(cpu_backends(micro_bundle.config, run_on).values()) == {other}
    if missing == "openvino":
        with pytest.raises(MissingDependencyError, match=r'install "tap-deploy\[openvino\]"'):
            cpu_backends(micro_bundle.config, RunOn(backend="cpu", precision="bf16"))
    monkeypatch.setitem(sys.modules, other, None)
    with pytest.raises(MissingDependencyError, match=r"'onnxruntime' is not installed"):
        cpu_backends(micro_bundle.config, run_on)


def test_the_choice_can_be_measured(micro_bundle, own_cache):
    speed = SpeedOptions(min_iterations=1, min_seconds=0, warm_up_seconds=0)
    stages = []
    times = measure_cpu_choice(micro_bundle, threads=1, speed=speed, on_stage=stages.append)
    assert stages == [f"fp32 {name}" for name in graphs.GRAPH_NAMES]
    assert list(times["fp32"]) == list(graphs.GRAPH_NAMES)
    assert all(set(found) == {"onnxruntime", "openvino"} for found in times["fp32"].values())
    assert cpu_backends(micro_bundle.config, RunOn(backend="cpu")) == {
        name: min(found, key=found.get) for name, found in times["fp32"].items()
    }


@pytest.mark.parametrize("backend", ["cpu", "onnxruntime"])
def test_onnxruntime_does_not_spin_after_a_run(micro_bundle, own_cache, monkeypatch, backend):
    import onnxruntime

    entries, add = [], onnxruntime.SessionOptions.add_session_config_entry

    def note(options, name, value):
        entries.append((name, value))
        add(options, name, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", note)
    for session in sessions_from_bundle(micro_bundle, RunOn(backend=backend, threads=1)).values():
        session.close()
    assert ("session.force_spinning_stop", "1") in entries


# --- verdicts ---

LENIENT = ("--min-miou", 0, "--min-top1", 0, "--min-captions", 0)


@pytest.mark.parametrize("backend", ["openvino", "cpu"])
def test_int8_is_judged_on_the_backend_that_runs_it(
    int8_bundle, pictures, tmp_path, caplog, backend
):
    path = shutil.copytree(int8_bundle.path, tmp_path / "bundle")
    how = ("--backend", backend, "--evaluation-data", pictures, "--threads", 1)
    how += (*LENIENT, "--no-speed", "--min-calibration-pictures", 1)
    result = invoke("verdict", path, *how, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    counts = {name: graph["int8_kernels"] for name, graph in report["graphs"].items()}
    by_openvino = {name for name, count in counts.items() if "precisions" in count}
    assert by_openvino == set(counts) - ({TEXT} if backend == "cpu" else set())
    assert all(counts[name]["precisions"]["int8"] > 0 for name in by_openvino)
    mark = Bundle.open(path).manifest.precision_record("int8_fp32").verdict
    assert (mark.passed, mark.backend) == (True, backend)
    caplog.set_level("INFO")
    for other in (backend, "onnxruntime"):
        caplog.clear()
        run_on = RunOn(backend=other, precision="int8", threads=1)
        for session in sessions_from_bundle(Bundle.open(path), run_on).values():
            session.close()
        said = f"int8 was judged on {backend}, not on onnxruntime; judge it with: tap-export"
        assert (said in caplog.text) is (other != backend)
        assert caplog.text.count("was judged on") == (other != backend)


@needs_bf16
@pytest.mark.parametrize("precision", ["bf16", "int8+bf16"])
def test_bf16_is_judged_by_the_answers(int8_bundle, pictures, tmp_path, precision):
    path = shutil.copytree(int8_bundle.path, tmp_path / "bundle")
    how = ("--backend", "openvino", "--precision", precision, "--evaluation-data", pictures)
    judge = ("verdict", path, *how, "--threads", 1)
    result = invoke(*judge, *LENIENT)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mean mask IoU 0.9")
    variant = RunOn(backend="openvino", precision=precision).variant
    assert Bundle.open(path).manifest.precision_record(variant).bf16_verdict.passed
    result = invoke(*judge, *LENIENT, "--min-miou", 1)
    assert result.exit_code == 1
    assert f"{precision} failed its accuracy check" in result.stderr
    bundle = Bundle.open(path)
    with pytest.raises(BundleError, match="failed its accuracy check"):
        sessions_from_bundle(bundle, RunOn(backend="cpu", precision=precision))
    made = {"bf16": "fp32", "int8+bf16": "int8"}[precision]
    for session in sessions_from_bundle(bundle, RunOn(precision=made, threads=1)).values():
        session.close()
