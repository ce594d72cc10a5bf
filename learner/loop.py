"""The learner's loop: sample, update, publish. Plain: a process of its own, a thread or a Ray actor may run it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from gsa.metrics import Meter
from gsa.schema import Batch

Tensors = Mapping[str, np.ndarray]
Publish = Callable[[Tensors, Mapping[str, Any]], object]  # acting tensors, meta

FIRST_WAIT_S, LONGEST_WAIT_S = 0.001, 0.05  # between two askings for a batch, when there is none


class Tuner(Protocol):
    """What the loop needs of a FineTuner."""

    updates: int

    def update(self, batch: Batch) -> dict[str, float]: ...

    def snapshot(self, out: Tensors | None = None) -> Tensors: ...


class LearnerLoop:
    """Owns the rhythm of learning: it waits where `sample` has nothing, and publishes as often as asked for, at most.

    `sample` gives a batch, or None where the rate limiter says wait. `publish` takes the acting tensors and
    {"updates": n}; it copies what it keeps of them, unless they are the arrays that `lend` gave to write them to.
    """

    def __init__(
        self,
        tuner: Tuner,
        sample: Callable[[], Batch | None],
        publish: Publish,
        publish_every: int = 1,
        publish_every_s: float = 0.0,
        lend: Callable[[], Tensors | None] = lambda: None,
    ) -> None:
        self.tuner, self._sample, self._publish, self._lend = tuner, sample, publish, lend
        self.publish_every, self.publish_every_s = publish_every, publish_every_s
        self._published_updates: int | None = None
        self._published_at = 0.0
        self._meter = Meter("learner")
        self.turn = threading.Lock()  # held during an update and its publication; who holds it sees a whole state

    def run(self, stop: threading.Event, updates: int | None = None) -> None:
        """Learns until `stop` is set, or the tuner has done `updates` updates. Publishes first and last."""
        self.publish()
        wait_s = FIRST_WAIT_S
        while not stop.is_set() and (updates is None or self.tuner.updates < updates):
            if self.step() is not None:
                wait_s = FIRST_WAIT_S
                continue
            started = time.monotonic()
            stop.wait(wait_s)
            self._meter.count("waited_s", time.monotonic() - started)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self.publish()

    def step(self) -> dict[str, float] | None:
        """One update and, if due, one publication. The update's metrics; None where there was no batch."""
        batch = self._sample()
        if batch is None:
            return None
        with self.turn:
            metrics = self.tuner.update(batch)
            self._meter.count("updates_done", rate=True)
            self._meter.count("replayed_steps", int(batch.valid.sum()), rate=True)
            self._meter.mean(metrics)
            if self._due():
                self.publish()
        return metrics

    def publish(self) -> None:
        """Publishes the weights as they are, unless they are the ones published last."""
        if self._published_updates == self.tuner.updates:
            return
        self._publish(self.tuner.snapshot(self._lend()), {"updates": self.tuner.updates})
        self._published_updates, self._published_at = self.tuner.updates, time.monotonic()
        self._meter.count("published")

    def state(self) -> dict[str, Any]:
        """Plain data: which update was published last, and what was counted."""
        return {"published": self._published_updates, "meter": self._meter.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where the one that gave `state` stood; the caller publishes again what that one had published."""
        self._published_updates = state["published"]
        self._meter.restore(state["meter"])

    def stats(self) -> dict[str, float]:
        """Counts, rates and the mean of each update metric since the last reading."""
        self._meter.gauge("updates", self.tuner.updates)
        return self._meter.stats()

    def _due(self) -> bool:
        if self._published_updates is None:
            return True
        updates = self.tuner.updates - self._published_updates
        return updates >= self.publish_every and time.monotonic() - self._published_at >= self.publish_every_s
