"""``Session`` of a graph that is loaded at its first run."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session, Tensors


class LazySession(Session):
    """Loads a graph at its first run, once for all threads; a failed load is tried again."""

    def __init__(self, spec: GraphSpec, load: Callable[[], Session]) -> None:
        """Store the arguments.

        Args:
            spec: inputs and outputs of the graph.
            load: loads it; its errors are raised by ``run``.
        """
        super().__init__(spec)
        self._load = load
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._closed = False

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        self._loaded()._run(inputs, outputs)

    def _loaded(self) -> Session:
        with self._lock:
            if self._closed:
                raise self._error("the session is closed; load it again")
            if self._session is None:
                self._session = self._load()
            return self._session

    def close(self) -> None:
        """Close the session if it was loaded, after waiting for a load in another thread."""
        if self.is_of_another_process:  # the thread that holds the lock may not exist here
            return
        with self._lock:
            self._closed = True
            if self._session is not None:
                self._session.close()
