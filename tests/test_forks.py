"""A predictor belongs to the process that made it: real forks, and pickles."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tap_deploy import TapPredictor
from tap_deploy.errors import SessionError
from tap_deploy.sessions.opening import create_session

PICTURE = np.zeros((60, 90, 3), np.uint8)
POINTS = [[[9, 9, 1]]]
PATIENCE = 120  # seconds until a child that hangs is given up

PREPARED = """
import gc, multiprocessing, os, sys, threading
import numpy as np
from tap_deploy import TapPredictor
from tap_deploy.errors import SessionError

picture, points = np.zeros((60, 90, 3), np.uint8), [[[9, 9, 1]]]
predictor = TapPredictor.from_bundle(sys.argv[1], threads=2)
predictor.predict(picture, points)
made_in = os.getpid()

def refused(call):
    try:
        call()
    except SessionError as exc:
        assert f"loaded in process {made_in} cannot be used in process {os.getpid()}" in str(exc)
        assert "post_fork" in str(exc) and "worker_init_fn" in str(exc), exc
    else:
        raise AssertionError("not refused")

def in_a_child(body):
    pid = os.fork()
    if pid == 0:
        body()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(predictor.predict(picture, points)) == 1
    print("fine")
"""


def run(bundle, program):
    """Return the output of a program that has a predictor and forks."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREPARED + textwrap.dedent(program), bundle.path],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_forked_children_are_refused_and_end_as_they_should(micro_bundle):
    program = """
        for body in (
            lambda: None,
            lambda: refused(lambda: predictor.predict(picture, points)),
            lambda: refused(lambda: predictor.encode(picture)),
            lambda: refused(predictor.warm_up),
            lambda: refused(lambda: next(predictor.predict_many([picture], points))),
            lambda: predictor.close(),
            lambda: predictor.__exit__(None, None, None),
            lambda: (globals().pop("predictor"), gc.collect()),
            lambda: TapPredictor.from_bundle(sys.argv[1]).predict(picture, points),
        ):
            in_a_child(body)
        """
    assert run(micro_bundle, program) == "fine\n" * 9


def test_a_fork_half_way_through_many_pictures(micro_bundle):
    program = """
        results = predictor.predict_many([picture] * 9, points)
        next(results)
        in_a_child(lambda: refused(lambda: next(results)))
        in_a_child(lambda: results.close())
        print(len(list(results)))
        """
    assert run(micro_bundle, program) == "fine\nfine\n8\n"


def test_a_fork_while_other_threads_are_within_calls(micro_bundle):
    """The child inherits locks that no thread of it will release."""
    program = """
        stop = threading.Event()
        def go_on():
            while not stop.is_set():
                predictor.predict(picture, points)
        threads = [threading.Thread(target=go_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        def body():
            refused(lambda: predictor.predict(picture, points))
            predictor.close()
        for _ in range(5):
            in_a_child(body)
        pool = predictor._pipeline._pool
        with pool._changed:
            in_a_child_of_a_lock = os.fork()
            if in_a_child_of_a_lock == 0:
                body()
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(in_a_child_of_a_lock, 0)[1]) == 7
        stop.set()
        """
    assert run(micro_bundle, program) == "fine\n" * 5


def test_a_fork_within_a_call(micro_bundle):
    program = """
        children = []
        def progress(stage, done, total):
            if stage == "decode prompts" and not children:
                children.append(os.fork())
        def call():
            predictor.predict(picture, points, on_progress=progress)
        try:
            call()
        except SessionError as exc:
            assert children == [0] and "cannot be used in process" in str(exc)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
        print("fine")
        """
    assert run(micro_bundle, program) == "fine\n"


def test_children_of_multiprocessing(micro_bundle):
    program = """
        def body(given, queue):
            refused(lambda: given.predict(picture, points))
            with TapPredictor.from_bundle(sys.argv[1]) as own:
                queue.put(len(own.predict(picture, points)))
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=body, args=(predictor, queue))
        child.start()
        print(queue.get())
        child.join()
        print(child.exitcode)
        """
    assert run(micro_bundle, program) == "1\n0\n"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_session_of_its_own_in_a_forked_child(micro_bundle, tmp_path, monkeypatch, backend):
    pytest.importorskip(backend)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = (
        f"\n        backend = {backend!r}"
        + """
        from tap_deploy import Bundle
        from tap_deploy.sessions.opening import sessions_from_bundle
        from tap_deploy.sessions.run_on import RunOn
        bundle = Bundle.open(sys.argv[1])
        session = sessions_from_bundle(bundle, RunOn(backend=backend))["image_encoder"]
        size = predictor.config.image_size
        images = {"images": np.zeros((1, size, size, 3), np.uint8)}
        def body():
            refused(lambda: session.run(images))
            session.close()
        in_a_child(body)
        print(len(session.run(images)))
        """
    )
    assert run(micro_bundle, program) == "fine\n1\n"


def never(predictor):
    raise AssertionError


@pytest.mark.parametrize(
    "call",
    [
        pickle.dumps,
        copy.deepcopy,
        lambda predictor: pickle.dumps(predictor.predict),
        lambda predictor: (
            multiprocessing.get_context("spawn").Process(target=never, args=(predictor,)).start()
        ),
    ],
    ids=["pickle", "deepcopy", "method", "spawn"],
)
def test_a_predictor_is_not_pickled(predictor, call):
    with pytest.raises(SessionError, match=r"cannot be pickled or copied; load the bundle in the"):
        call(predictor)


def test_a_session_is_not_pickled(micro_bundle):
    spec = micro_bundle.variant("fp32").specs["prompt_decoder"]
    path = micro_bundle.variant("fp32").path("prompt_decoder")
    with (
        create_session("onnxruntime", path, spec) as session,
        pytest.raises(SessionError, match="cannot be pickled"),
    ):
        pickle.dumps(session)


def test_a_picture_that_was_encoded_on_the_cpu_travels(predictor, micro_bundle):
    encoded = pickle.loads(pickle.dumps(predictor.encode(PICTURE)))
    expected = predictor.predict(PICTURE, POINTS)
    with TapPredictor.from_bundle(micro_bundle.path) as other:
        np.testing.assert_array_equal(other.predict(encoded, POINTS).masks, expected.masks)
