"""The text decoder is loaded at the first caption, once, and is still the file that was checked."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from tap_deploy import TapPredictor, graphs
from tap_deploy.errors import BundleError, SessionError
from tap_deploy.graphs import graph_specs
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.lazy_session import LazySession
from tap_deploy.sessions.ort import session as ort_session

POINTS = [[[9, 9, 1]]]
PATIENCE = 60  # seconds until a test that hangs is given up


@pytest.fixture
def loaded(monkeypatch):
    """Names of the graphs that were loaded, in order."""
    names, load = [], ort_session.load_session

    def noted(path, spec, **options):
        names.append(spec.name)
        return load(path, spec, **options)

    monkeypatch.setattr(ort_session, "load_session", noted)
    return names


def text_decoder_of(bundle):
    return bundle.variant("fp32").path(graphs.TEXT_DECODER)


def test_calls_without_captions_never_load_the_text_decoder(micro_bundle, photo, loaded):
    first = [graphs.IMAGE_ENCODER, graphs.PROMPT_DECODER]
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        encoded = predictor.encode(photo)
        plain = predictor.predict(encoded, points=POINTS, captions=False)
        list(predictor.predict_many([encoded], points=POINTS, captions=False))
        assert sorted(loaded) == first
        captioned = predictor.predict(encoded, points=POINTS)
        predictor.predict(encoded, points=POINTS)
        assert sorted(loaded[:2]) == first and loaded[2:] == [graphs.TEXT_DECODER]
    assert np.array_equal(plain.low_res_masks, captioned.low_res_masks)
    assert captioned.captions != [""]


def test_warming_up_loads_everything(micro_bundle, loaded):
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        predictor.warm_up()
        assert sorted(loaded) == sorted(graphs.GRAPH_NAMES)


@pytest.mark.parametrize("graph", graphs.GRAPH_NAMES)
def test_a_broken_graph_is_reported(bundle, graph):
    """Hashes of a bundle may be left unchecked; then loading it finds the fault."""
    path = bundle.variant("fp32").path(graph)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(BundleError, match=rf"{graph}\.onnx cannot be read"):
        TapPredictor.from_bundle(bundle.path, check_hashes=False)


def test_a_changed_text_decoder_is_reported_before_anything_is_loaded(bundle, loaded):
    path = text_decoder_of(bundle)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"text_decoder\.onnx was changed"):
        TapPredictor.from_bundle(bundle.path)
    path.unlink()
    with pytest.raises(BundleError, match=r"text_decoder\.onnx is missing"):
        TapPredictor.from_bundle(bundle.path, check_hashes=False)
    assert loaded == []


@pytest.mark.parametrize("problem", ["was changed", "is missing"])
def test_a_text_decoder_changed_after_loading_is_not_used(bundle, photo, problem):
    """Graphs of two exports must not be mixed, with or without a check of all hashes before."""
    path = text_decoder_of(bundle)
    content = path.read_bytes()
    with TapPredictor.from_bundle(bundle.path, check_hashes=False) as predictor:
        replacement = path.with_name("other")
        replacement.write_bytes(content[:-1] + b"?")
        os.replace(replacement, path)
        if problem == "is missing":
            path.unlink()
        with pytest.raises(BundleError, match=rf"text_decoder\.onnx {problem}"):
            predictor.predict(photo, points=POINTS)
        path.write_bytes(content)  # a copy of the file is as good as the file
        assert len(predictor.predict(photo, points=POINTS)) == 1


@pytest.fixture
def held(micro_config):
    """A lazy session whose load waits for ``release``, with what was loaded."""
    spec = graph_specs(micro_config)[graphs.IMAGE_ENCODER]
    sessions, started, release = [], threading.Event(), threading.Event()

    def load():
        started.set()
        assert release.wait(PATIENCE)
        sessions.append(FakeSession(spec))
        return sessions[-1]

    size = micro_config.image_size
    inputs = {graphs.IMAGES: np.zeros((1, size, size, 3), np.uint8)}
    return LazySession(spec, load), inputs, sessions, started, release


def test_threads_load_it_once(held):
    lazy, inputs, sessions, started, release = held
    threads = [threading.Thread(target=lazy.run, args=(inputs,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(PATIENCE) and sessions == []
    release.set()
    for thread in threads:
        thread.join(PATIENCE)
    [session] = sessions
    assert len(session.calls) == 4


def test_closing_waits_for_a_load_and_ends_it(held):
    lazy, inputs, sessions, started, release = held
    running = threading.Thread(target=lazy.run, args=(inputs,))
    running.start()
    assert started.wait(PATIENCE)
    closing = threading.Thread(target=lazy.close)
    closing.start()
    release.set()
    for thread in (running, closing):
        thread.join(PATIENCE)
    [session] = sessions
    assert session.closed
    with pytest.raises(SessionError, match="the session is closed; load it again"):
        lazy.run(inputs)
    lazy.close()  # does nothing


def test_closing_before_a_load_loads_nothing(held):
    lazy, inputs, sessions, started, release = held
    release.set()
    lazy.close()
    with pytest.raises(SessionError, match="the session is closed; load it again"):
        lazy.run(inputs)
    assert sessions == [] and not started.is_set()
