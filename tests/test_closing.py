"""Closing a predictor on the CPU: it waits for running calls, and rejects later ones."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tap_deploy import TapPredictor, graphs
from tap_deploy.errors import SessionError
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import create_session

PICTURE = np.zeros((40, 60, 3), np.uint8)
POINTS = [[[9, 9, 1]], [[30, 20, 1]]]
PATIENCE = 60  # seconds until a test that hangs is given up


class Predictor:
    """A predictor on fakes; ``holding`` keeps its next call in the image encoder."""

    def __init__(self, config):
        specs = graphs.graph_specs(config)
        self.sessions = {name: FakeSession(spec) for name, spec in specs.items()}
        self.sessions[graphs.IMAGE_ENCODER].compute = self._compute
        self.predictor = TapPredictor(self.sessions, config)
        self.held, self.release = threading.Event(), threading.Event()
        self._holding = True

    def _compute(self, inputs):
        if self._holding:
            self._holding = False
            self.held.set()
            assert self.release.wait(PATIENCE)
        assert not self.any_closed
        return {}

    @property
    def any_closed(self):
        return any(session.closed for session in self.sessions.values())

    def predict(self, **options):
        return self.predictor.predict(PICTURE, POINTS, captions=False, **options)


@pytest.fixture
def fake(micro_config):
    return Predictor(micro_config)


def until_refused(call):
    """Call until the predictor is closed."""
    for _ in range(100_000):
        try:
            call()
        except SessionError as exc:
            assert str(exc) == "this predictor is closed; load the bundle again"
            return
    raise AssertionError("never closed")


def test_closing_waits_for_calls_that_run(fake):
    answers = []
    running = threading.Thread(target=lambda: answers.append(fake.predict()))
    running.start()
    assert fake.held.wait(PATIENCE)
    closers = [threading.Thread(target=fake.predictor.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    until_refused(fake.predict)
    assert all(closer.is_alive() for closer in closers)
    assert not fake.any_closed
    fake.release.set()
    for thread in (running, *closers):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    (regions,) = answers
    assert len(regions) == len(POINTS)
    assert all(session.closed for session in fake.sessions.values())
    fake.predictor.close()  # does nothing


def test_closing_from_within_a_call_is_refused(fake):
    fake.release.set()

    def progress(stage, done, total):
        if stage == "decode prompts":
            fake.predictor.close()

    with pytest.raises(SessionError, match="cannot be closed from within its own call"):
        fake.predict(on_progress=progress)
    assert len(fake.predict()) == len(POINTS)
    fake.predictor.close()
    assert fake.any_closed


@pytest.mark.parametrize("group", [1, 3])
def test_closing_ends_what_is_half_way_through_many_pictures(fake, group):
    """Finished results are still returned, then the error is raised, and no thread is left."""
    fake.release.set()
    before = set(threading.enumerate())
    fake.predictor._pipeline.max_images = group
    results = fake.predictor.predict_many([PICTURE] * 99, POINTS, captions=False)
    assert len(next(results)) == len(POINTS)
    fake.predictor.close()
    with pytest.raises(SessionError, match=r"picture \d: this predictor is closed"):
        list(results)
    assert set(threading.enumerate()) == before


def test_a_session_that_is_closed_during_a_run_ends_it_well(micro_bundle):
    """A session of one graph has no lanes: a running call keeps it alive."""
    name = graphs.IMAGE_ENCODER
    path, spec = micro_bundle.variant("fp32").path(name), micro_bundle.variant("fp32").specs[name]
    session = create_session("onnxruntime", path, spec, threads=1)
    native = session._session

    class ClosesMeanwhile:
        def io_binding(self):
            session.close()
            return native.io_binding()

        def run_with_iobinding(self, binding):
            native.run_with_iobinding(binding)

    session._session = ClosesMeanwhile()
    size = micro_bundle.config.image_size
    images = np.zeros((1, size, size, 3), np.uint8)
    assert np.isfinite(session.run({graphs.IMAGES: images})[graphs.IMAGE_EMBEDDINGS]).all()
    with pytest.raises(SessionError, match="the session is closed"):
        session.run({graphs.IMAGES: images})
