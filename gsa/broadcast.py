"""Weights from the learner to the workers: over Redis, or within one process by the twin in memory.

The publisher never waits for subscribers or for the server: `publish` copies the weights and returns, a thread sends
them. A subscriber never waits for the publisher or the server: a thread fetches, `poll` hands over what has
arrived. A version is seen whole or not at all, and order only rises: first by epoch, then by version.

The epoch fences off stale learners. Each publisher claims one above all before it; from then on theirs is refused.
Epochs start at the clock, so they rise also where the server lost its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import redis

from gsa.errors import FormatError, SpecMismatch, StaleError, Unavailable
from gsa.metrics import Meter
from gsa.node_share import Memory, NodeShare
from gsa.packing import Blank, Packed, pack
from gsa.redis_link import Head, RedisLink
from gsa.schema import WeightSnapshot

CHECK_S = 1.0  # how often the publisher looks whether the server still has its version
POLL_S = 1.0  # how often a subscriber looks where no notice has come
BACKOFF_S = (0.1, 5.0)  # after an error: doubled from the first up to the second
Stage = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class Publisher(Protocol):
    """The learner's side."""

    epoch: int
    latest: int  # version at the head when the epoch was claimed, −1 where there was none: go on above it

    def lend(self) -> Mapping[str, np.ndarray] | None:
        """Arrays like those published last, to write to and publish: that spares the copy. Ours again once anything is
        published. None where copies are made in any case."""

    def publish(self, snapshot: WeightSnapshot) -> bool:
        """Takes a copy to send. False if its version is not above the last one. StaleError once another learner has
        claimed the group: stop."""

    def flush(self, timeout_s: float) -> bool:
        """Waits until the last version is there for all to see."""

    def stats(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Subscriber(Protocol):
    """A worker's side."""

    def poll(self) -> WeightSnapshot | None:
        """The newest snapshot that has arrived, once; None where there is nothing new. Never blocks."""

    def wait(self, version: int, timeout_s: float) -> WeightSnapshot:
        """The newest snapshot, as soon as it is `version` or above. Unavailable if it does not come in time."""

    def stats(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class RedisPublisher:
    """Owns a group of a run's weights on the server, until another publisher claims it.

    A server that is away is waited for in the background; one that comes back empty gets the last version again.
    Meanwhile `trouble` says in a sentence what is wrong; it is empty where nothing is.
    `epoch` is for callers that number their learners themselves: StaleError if a higher one was claimed.
    """

    def __init__(self, url: str, run: str, group: str = "policy", epoch: int | None = None) -> None:
        self.epoch, self.latest = time.time_ns() // 1_000_000 if epoch is None else epoch, -1
        self.trouble = ""
        self._numbered, self._claimed = epoch is not None, False
        self._link, self._meter = RedisLink(url, run, group), Meter("broadcast")
        self._packing = threading.Lock()  # one at a time has room to copy to
        self._lent: Blank | None = None
        self._changed = threading.Condition()  # guards what follows
        self._last: Packed | None = None
        self._sending: Packed | None = None
        self._sent: Packed | None = None  # the one that is on the server
        self._rooms: list[np.ndarray] = []  # memory of these, and what is free again: fresh memory is slow
        self._fenced = self._closed = False
        try:
            self._claim()
        except redis.RedisError as error:  # merely away: claimed before the first version is sent
            self._link.raise_if_refused(error)
        self._thread = threading.Thread(target=self._run, name=f"publish-{group}", daemon=True)
        self._thread.start()

    def lend(self) -> Mapping[str, np.ndarray] | None:
        with self._packing:
            self._lent = None
            if self._last is None:
                return None
            self._lent = Blank(self._room(self._last.size), self._last.entries)
            return self._lent.tensors

    def publish(self, snapshot: WeightSnapshot) -> bool:
        with self._packing:
            with self._changed:
                self._check_fence()
                if snapshot.version <= (self._last.version if self._last else -1):
                    return False
            packed, self._lent = pack(snapshot, self._room, self._lent), None
            with self._changed:
                self._last = packed  # one that was not sent yet is skipped: only the newest matters
                self._changed.notify_all()
        return True

    def flush(self, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._sent is self._last or self._fenced, timeout_s)
            self._check_fence()
            return self._sent is self._last

    def _room(self, size: int) -> np.ndarray:
        """Memory that no version under way is in, nor what is lent."""
        with self._changed:
            parts = (self._last, self._sending, self._sent, self._lent)
            used = [part.memory for part in parts if part is not None]
            free = [r for r in self._rooms if len(r) == size and not any(r is memory for memory in used)]
            room = free[0] if free else np.empty(size, np.uint8)
            self._rooms = [*used, room]
            return room

    def stats(self) -> dict[str, float]:
        self._meter.gauge("version", self._sent.version if self._sent else -1)
        return self._meter.stats()

    def retire(self) -> None:
        """Closes, and lets the versions on the server expire: the run is over. A server that is away has nothing."""
        self.close()
        with contextlib.suppress(redis.RedisError):
            self._link.retire()

    def close(self) -> None:
        """Stops sending; what is not sent is dropped. The versions on the server stay."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1)  # one that waits for a server ends by itself

    def _run(self) -> None:
        backoff = _Backoff()
        while not self._closed and not self._fenced:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._last is not self._sent, CHECK_S)
                packed = self._sending = self._last
            try:
                if packed is not None and not self._closed:
                    self._send_if_missing(packed)
                    self.trouble = ""
                backoff.reset()
            except StaleError:
                with self._changed:
                    self._fenced = True
                    self._changed.notify_all()
            except (redis.RedisError, FormatError) as error:
                self._meter.count("publish_errors")
                self.trouble = self._link.explain(error, packed.size if packed is not None else 0)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, backoff.next_s())
        self._link.close()

    def _send_if_missing(self, packed: Packed) -> None:
        """Sends what is new, and again what the server has lost."""
        if not self._claimed:
            self._claim()
        head = self._link.head() if packed is self._sent else None
        if head is None or head[:2] != (self.epoch, packed.version):
            started = time.monotonic()
            self._link.send(packed, self.epoch)
            self._meter.count("republished" if packed is self._sent else "published")
            self._meter.mean({"publish_s": time.monotonic() - started, "publish_bytes": packed.size})
        with self._changed:
            self._sent = packed
            self._changed.notify_all()

    def _claim(self) -> None:
        self.epoch, head = self._link.claim(self.epoch, at_least=not self._numbered)
        self.latest, self._claimed = -1 if head is None else head.version, True

    def _check_fence(self) -> None:
        if self._fenced:
            raise self._link.fenced(self.epoch)


class _Inbox:
    """The newest snapshot that has arrived, for one reader. What the subscribers of both kinds share."""

    def __init__(self) -> None:
        self._meter = Meter("broadcast")
        self._arrived = threading.Condition()
        self._newest: WeightSnapshot | None = None
        self._order = (-1, -1)  # epoch and version of the newest
        self._fresh = False  # it has not been handed over

    def poll(self) -> WeightSnapshot | None:
        with self._arrived:
            fresh, self._fresh = self._fresh, False
            return self._newest if fresh else None

    def wait(self, version: int, timeout_s: float) -> WeightSnapshot:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._order[1] >= version, timeout_s) or self._newest is None:
                raise Unavailable(
                    f"Version {version} of the weights did not come in {timeout_s:g} s (newest: {self._order[1]}). "
                    f"Does the learner run, and is Redis up?"
                )
            self._fresh = False
            return self._newest

    def stats(self) -> dict[str, float]:
        self._meter.gauge("version", self._order[1])
        return self._meter.stats()

    def close(self) -> None:
        pass

    def _put(self, epoch: int, snapshot: WeightSnapshot) -> None:
        with self._arrived:
            if (epoch, snapshot.version) > self._order:
                self._newest, self._order, self._fresh = snapshot, (epoch, snapshot.version), True
                self._meter.count("received")
                self._arrived.notify_all()


class RedisSubscriber(_Inbox):
    """Follows a group of a run's weights. Without the server it keeps what it has, counts, and tries again; `trouble`
    says what is wrong.

    Of those on a node one fetches, the others get the same memory from it. A snapshot's tensors are views of that.
    """

    stage: Stage | None = None  # what the thread makes of a snapshot's tensors before it is handed over

    def __init__(self, url: str, run: str, group: str = "policy") -> None:
        super().__init__()
        self._link, self._closed = RedisLink(url, run, group), threading.Event()
        self._share = NodeShare(f"{url} {self._link.prefix}")
        self.trouble = ""
        try:
            self._link.check_subscriber()
        except redis.RedisError as error:
            self._link.raise_if_refused(error)
        except FormatError:
            pass  # foreign bytes: the thread counts them
        threading.Thread(target=self._run, name=f"subscribe-{group}", daemon=True).start()

    def close(self) -> None:
        self._closed.set()  # the thread sees it within POLL_S, and closes its connections

    def _run(self) -> None:
        backoff = _Backoff()
        while not self._closed.is_set():
            try:
                with self._link.notices() as notices:
                    told = None
                    while not self._closed.is_set():
                        self._fetch(told or self._link.head())
                        backoff.reset()
                        self.trouble = ""
                        told = self._link.told(notices, POLL_S)
            except (redis.RedisError, FormatError, OSError, MemoryError) as error:
                self._meter.count("fetch_errors")
                self.trouble = self._link.explain(error)
                self._closed.wait(backoff.next_s())
        self._share.close()
        self._link.close()

    def _fetch(self, head: Head | None) -> None:
        """Puts the head's version into the inbox if it is new."""
        if head is None or head[:2] <= self._order:
            return
        started = time.monotonic()
        if (snapshot := self._obtain(head)) is not None:
            self._meter.mean({"fetch_ms": 1e3 * (time.monotonic() - started)})
            self._put(snapshot.meta["epoch"], self._staged(snapshot))

    def _staged(self, snapshot: WeightSnapshot) -> WeightSnapshot:
        """With its tensors made ready. Where they do not fit, who takes them over says so."""
        if self.stage is not None:
            with contextlib.suppress(SpecMismatch):
                return dataclasses.replace(snapshot, tensors=self.stage(snapshot.tensors))
        return snapshot

    def _obtain(self, head: Head) -> WeightSnapshot | None:
        """The head's version, or a later one: from the node's leader, else from the server."""
        if not self._share.lead():
            if (shared := self._share.ask(head[:2], self._closed.is_set)) is not None:
                self._meter.count("shared")
                return shared[1]
            if self._closed.is_set():
                return None
        self._share.lead()  # if the one who led is gone
        memory = Memory()
        try:
            description = self._link.fetch(head, memory)
            if description is None and (kept := self._link.anchor()) is not None and kept[:2] > self._order:
                self._meter.count("too_slow")
                head, description = kept, self._link.fetch(kept, memory)
            if description is None:
                memory.close()
                return None
            snapshot = memory.seal(description)
        except BaseException:
            memory.close()
            raise
        self._meter.count("fetched")
        self._share.offer(head[:2], memory)
        return snapshot


class MemoryBroadcast:
    """The twin within one process, for runs without Redis and for tests: what is published has arrived."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch, self._head = 0, (0, WeightSnapshot(-1, {}))
        self._inboxes: list[_Inbox] = []

    def publisher(self, epoch: int | None = None) -> MemoryPublisher:
        with self._lock:
            if epoch is not None and epoch < self._epoch:
                raise StaleError(f"Epoch {self._epoch} was claimed; {epoch} is stale.")
            self._epoch = self._epoch + 1 if epoch is None else epoch
            return MemoryPublisher(self, self._epoch, self._head[1].version)

    def subscriber(self) -> Subscriber:
        inbox = _Inbox()
        with self._lock:
            self._inboxes.append(inbox)
            if self._head[1].version >= 0:
                inbox._put(*self._head)
        return inbox

    def _flip(self, epoch: int, snapshot: WeightSnapshot) -> bool:
        with self._lock:
            if epoch < self._epoch:
                raise StaleError(f"Another learner has taken over (this one's epoch is {epoch}); stop this one.")
            if (epoch, snapshot.version) <= (self._head[0], self._head[1].version):
                return False
            self._head = epoch, snapshot
            for inbox in self._inboxes:
                inbox._put(epoch, snapshot)
            return True


class MemoryPublisher:
    """The learner's side of a MemoryBroadcast."""

    def __init__(self, broadcast: MemoryBroadcast, epoch: int, latest: int) -> None:
        self.epoch, self.latest = epoch, latest
        self._broadcast, self._meter = broadcast, Meter("broadcast")

    def lend(self) -> None:
        return None

    def publish(self, snapshot: WeightSnapshot) -> bool:
        tensors = {name: tensor.copy() for name, tensor in snapshot.tensors.items()}  # the learner's go on changing
        for tensor in tensors.values():
            tensor.flags.writeable = False
        copy = WeightSnapshot(snapshot.version, tensors, {**snapshot.meta, "epoch": self.epoch})
        flipped = self._broadcast._flip(self.epoch, copy)
        self._meter.count("published", flipped)
        return flipped

    def flush(self, timeout_s: float) -> bool:
        return True

    def stats(self) -> dict[str, float]:
        return self._meter.stats()

    def close(self) -> None:
        pass


class _Backoff:
    """How long to wait after an error: longer each time, up to a limit."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._next_s = BACKOFF_S[0]

    def next_s(self) -> float:
        now_s, self._next_s = self._next_s, min(2 * self._next_s, BACKOFF_S[1])
        return now_s
