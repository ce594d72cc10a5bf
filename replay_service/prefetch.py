"""The next batch is made while one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from gsa.schema import Batch

BUFFERS = 3  # batches alive at a time: one in use, one ready, one being made
WAIT_S = 0.05  # how long `sample` waits for the one that is being made
PAUSES_S = (0.001, 0.02)  # where the source has nothing: doubled from the first up to the second


class Prefetcher:
    """Owns a thread that asks `source` for one batch more than is used; None of it means: ask again.

    A source that reuses arrays needs BUFFERS of them: a batch is good until the next `sample`.
    """

    def __init__(self, source: Callable[[], Batch | None]) -> None:
        self._source = source
        self._ready: queue.Queue[Batch] = queue.Queue(maxsize=1)
        self._closed, self._idle = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def sample(self) -> Batch | None:
        """The next batch, or None if there is none yet. Raises what the source raised."""
        try:
            return self._ready.get(timeout=WAIT_S)
        except queue.Empty:
            if self._error is not None:
                raise self._error from None
            return None

    @property
    def idle(self) -> bool:
        """Whether the source had nothing when last asked, is not asked now, and all that it gave is handed out."""
        return self._idle.is_set() and self._ready.empty()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(1)

    def _run(self) -> None:
        pause_s = PAUSES_S[0]
        try:
            while not self._closed.is_set():
                self._idle.clear()
                batch = self._source()
                if batch is None:
                    self._idle.set()
                    self._closed.wait(pause_s)
                    pause_s = min(2 * pause_s, PAUSES_S[1])
                    continue
                self._put(batch)
                pause_s = PAUSES_S[0]
        except BaseException as error:
            self._error = error

    def _put(self, batch: Batch) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(batch, timeout=WAIT_S)
            except queue.Full:
                continue
