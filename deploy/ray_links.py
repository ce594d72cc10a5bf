"""The links between processes over Ray: what a worker and the learner hold of the replay service, and the driver of the
learner.

No call waits without a deadline. What a worker has no answer to it asks again. The learner looks again and again for
what it asked for: batches whose answer was given up would be drawn and never learned from.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from gsa.metrics import Meter
from gsa.schema import Batch, Lease, NoLease, Trajectory
from replay_service.batches import Cutter, Layout
from replay_service.prefetch import BUFFERS, Prefetcher
from retrieval.store import TrajectoryStore

IN_FLIGHT = 4  # episodes a worker may have under way to replay; then it waits
DRAWS = 2  # batches that one call draws
ANSWER_S = 0.005  # how long a worker with nothing to step waits for a lease before it looks again
DEADLINE_S = 60.0


@dataclass
class _Delivery:
    episode: int
    trajectory: Any  # reference in the object store, so that a second try costs nothing
    answer: Any
    since: float


@dataclass(frozen=True)
class BatchSource:
    """Where a replay service draws from: what a learner beside it needs to cut its batches itself."""

    node: str
    stores: dict[str, Path]
    layout: Layout


class RayReplayLink:
    """A worker's end: leases arrive when they do, episodes are handed over by reference and kept until acknowledged."""

    def __init__(self, replay: Any, name: str) -> None:
        self._replay, self._name = replay, name
        self._lease: Any = None
        self._lease_since = 0.0
        self._deliveries: deque[_Delivery] = deque()
        self.last_turn = time.monotonic()  # of a worker that waits here, and does not hang
        self.meter = Meter("link")

    def lease(self, worker: str, held: Collection[int]) -> Lease | NoLease:
        if self._lease is None or time.monotonic() - self._lease_since > DEADLINE_S:
            open_ = [*held, *(delivery.episode for delivery in self._deliveries)]
            self._lease, self._lease_since = self._replay.lease.remote(worker, open_), time.monotonic()
        self._settle()
        ready, _ = ray.wait([self._lease], timeout=ANSWER_S)
        if not ready:
            return NoLease.WAIT
        reference, self._lease = self._lease, None
        try:
            return ray.get(reference, timeout=DEADLINE_S)
        except RayError:  # the service is being restarted
            self.meter.count("replay_errors")
            return NoLease.WAIT

    def add(self, worker: str, episode: int, trajectory: Trajectory) -> None:
        """Waits only while four episodes are under way: back-pressure instead of growth."""
        reference = ray.put(trajectory)
        answer = self._replay.add.remote(worker, episode, reference)
        self._deliveries.append(_Delivery(episode, reference, answer, time.monotonic()))
        while len(self._deliveries) >= IN_FLIGHT:
            self._settle(wait_s=1.0)

    def release(self, worker: str, episode: int) -> None:
        self._replay.release.remote(worker, episode)

    def flush(self, deadline_s: float = DEADLINE_S) -> bool:
        """Waits until every episode is acknowledged; False if the deadline came first."""
        end = time.monotonic() + deadline_s
        while self._deliveries and time.monotonic() < end:
            self._settle(wait_s=0.2)
        return not self._deliveries

    def _settle(self, wait_s: float = 0.0) -> None:
        """Takes what was acknowledged off the list; sends again what failed or stayed unanswered."""
        self.last_turn = time.monotonic()
        if not self._deliveries:
            return
        ready, _ = ray.wait([d.answer for d in self._deliveries], num_returns=1, timeout=wait_s)
        for delivery in list(self._deliveries):
            if delivery.answer in ready:
                try:
                    if not ray.get(delivery.answer, timeout=DEADLINE_S):
                        self.meter.count("refused")  # its lease had run out: the steps were leased to another
                    self._deliveries.remove(delivery)
                    continue
                except RayError:
                    self.meter.count("replay_errors")
                    time.sleep(0.2)
            elif time.monotonic() - delivery.since < DEADLINE_S:
                continue
            delivery.answer = self._replay.add.remote(self._name, delivery.episode, delivery.trajectory)
            delivery.since = time.monotonic()


class RayBatchLink:
    """The learner's end: at least two batches are drawn ahead and one is cut ahead, all hidden behind the update.

    On the replay service's node only refs cross: the learner cuts from the same mapped files. On another one
    the batch itself comes, by the object store.
    """

    def __init__(self, replay: Any, depth: int = 2) -> None:
        about: BatchSource = ray.get(replay.about.remote(), timeout=DEADLINE_S)
        self._cut: Cutter | None = None
        self._ask, self._each = replay.sample.remote, 1
        if about.node == _here():
            stores = {name: TrajectoryStore.open(path) for name, path in about.stores.items()}
            self._cut = Cutter(stores, about.layout, BUFFERS)
            self._ask, self._each = partial(replay.draw.remote, DRAWS), DRAWS
        self._depth, self._last = depth, False
        self._pending: deque[Any] = deque()
        self._drawn: deque[Any] = deque()  # answers that are next
        self._ahead = Prefetcher(self._next)

    def sample(self) -> Batch | None:
        """The next batch, or None if there is none yet. Its arrays are good until the next call."""
        return self._ahead.sample()

    def finish(self, deadline_s: float) -> bool:
        """Asks for no more; waits until all that was drawn is handed out. False if the deadline came first."""
        self._last, end = True, time.monotonic() + deadline_s
        while not (done := not self._pending and not self._drawn and self._ahead.idle) and time.monotonic() < end:
            time.sleep(0.01)
        return done

    def close(self) -> None:
        self._ahead.close()

    def _next(self) -> Batch | None:
        while not self._last and self._each * len(self._pending) + len(self._drawn) < self._depth:
            self._pending.append(self._ask())
        if not self._drawn and self._pending:
            self._receive()
        if not self._drawn:
            return None
        drawn = self._drawn.popleft()
        return drawn if self._cut is None else self._cut(drawn)

    def _receive(self) -> None:
        """Takes the oldest answer if it is there. It comes for certain: a service that hangs is killed, Ray says so."""
        ready, _ = ray.wait([self._pending[0]], timeout=0.05)
        if not ready:
            return
        try:
            answer = ray.get(ready[0], timeout=DEADLINE_S)
        except RayTaskError:
            raise
        except RayError:  # the service is being restarted
            self._pending.clear()
            return
        if answer is not None:
            self._drawn.extend(answer if self._cut is not None else [answer])
        self._pending.popleft()  # last: `finish` looks for what is under way


class ScoredSaves:
    """Asks a learner elsewhere to save, one request at a time. A score is offered again until a request has taken it:
    it decides which checkpoint is kept as the best."""

    def __init__(self, begin: Callable[[float | None], Any]) -> None:
        """`begin` sends the request and returns its reference in Ray."""
        self._begin = begin
        self.score: float | None = None  # the newest that no answered request has taken
        self._asked: tuple[Any, float | None] | None = None

    def offer(self, score: float | None = None) -> None:
        """Asks to save, unless the request before is not yet answered."""
        self.score = self.score if score is None else score
        if self._asked is not None:
            reference, taken = self._asked
            if not ray.wait([reference], timeout=0)[0]:
                return
            with contextlib.suppress(RayError):  # it died: the score is offered again
                ray.get(reference, timeout=0)
                self.score = None if taken is self.score else self.score
        self._asked = self._begin(self.score), self.score


def where() -> tuple[str, int]:
    """This process: its node and its number there."""
    return _here(), os.getpid()


def _here() -> str:
    return ray.get_runtime_context().get_node_id()
