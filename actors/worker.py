"""The environment worker: leases episodes, steps them, hands them to replay. Plain; a launcher may wrap it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from actors.episode import Outcome
from actors.rollout import Rollout
from gsa.metrics import Meter
from gsa.schema import Lease, NoLease, Trajectory, WeightSnapshot

IDLE_S = 0.02  # pause of a worker that has nothing to step
FAULTS_KEPT = 100  # sentences about faults that nobody has asked for yet


class ReplayLink(Protocol):
    """The worker's end of the link to the replay service. No call waits for the learner."""

    def lease(self, worker: str, held: Collection[int]) -> Lease | NoLease:
        """Permission to collect an episode; WAIT also while the answer is still on its way. `held`: episodes under way;
        what else the worker was ever leased, and did not hear of, is given back."""

    def add(self, worker: str, episode: int, trajectory: Trajectory) -> object:
        """Hands over a finished episode."""

    def release(self, worker: str, episode: int) -> object:
        """Gives back the lease of an episode that was dropped."""


class WeightLink(Protocol):
    """The worker's end of the weight broadcast."""

    def poll(self) -> WeightSnapshot | None:
        """The newest snapshot if there is a newer one than polled last; never waits."""


class EnvWorker:
    """Runs free of learner and driver: one tick is one agent step in each of its environments."""

    def __init__(
        self, name: str, rollout: Rollout, replay: ReplayLink, weights: WeightLink, prior: WeightLink | None
    ) -> None:
        """`prior`: where the prior actor's weights come from, once; None for a method without one."""
        self.name, self.rollout, self.replay, self.weights = name, rollout, replay, weights
        self._awaited_prior = prior
        self.meter = Meter("worker")
        self.last_progress = time.monotonic()
        self._faults: deque[str] = deque(maxlen=FAULTS_KEPT)

    def tick(self) -> bool:
        """One agent step in every slot that has an episode. False if there was none to step."""
        self._swap_weights()
        if self.rollout.version < 0 or self._awaited_prior is not None:
            return False  # the first weights are on their way
        for slot in self.rollout.free_slots:
            lease = self.replay.lease(self.name, self.rollout.leased)
            if not isinstance(lease, Lease):
                break  # nor is there one for the next slot
            self.rollout.begin(slot, lease)
        outcomes = self.rollout.advance(IDLE_S)
        for outcome in outcomes:
            self._take(outcome)
        self.last_progress = time.monotonic()
        return bool(outcomes) or len(self.rollout.free_slots) < len(self.rollout.hosts)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Ticks until `stopped()`; pauses briefly when nothing is leased."""
        while not stopped():
            started = time.monotonic()
            if not self.tick():
                self.last_progress = time.monotonic()
                time.sleep(IDLE_S)
                self.meter.count("idle_s", time.monotonic() - started)

    def stats(self) -> dict[str, float]:
        return self.meter.stats()

    def state(self) -> dict[str, Any]:
        """What continues the worker exactly, between two ticks: its episodes under way, and what it counted."""
        return {"rollout": self.rollout.state(), "meter": self.meter.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where the one that gave `state` stood. Episodes whose environment does not repeat itself are
        given back."""
        self.meter.restore(state["meter"])
        for lease in self.rollout.restore(state["rollout"]):
            self.meter.count("unrepeated_episodes")
            self.replay.release(self.name, lease.episode)

    def faults(self) -> list[str]:
        """What went wrong with the environments since the last call, in sentences."""
        return [self._faults.popleft() for _ in range(len(self._faults))]

    def close(self) -> None:
        self.rollout.close()

    def _swap_weights(self) -> None:
        if self._awaited_prior is not None and (cloned := self._awaited_prior.poll()) is not None:
            self.rollout.policy.load_prior(cloned.tensors)  # type: ignore[attr-defined]
            self._awaited_prior = None
        snapshot = self.weights.poll()
        if snapshot is not None:
            started = time.perf_counter()
            self.rollout.policy.load_tensors(snapshot.tensors)  # type: ignore[attr-defined]
            self.rollout.version = snapshot.version
            self.meter.mean({"swap_ms": 1e3 * (time.perf_counter() - started)})
            self.meter.gauge("policy_version", snapshot.version)

    def _take(self, outcome: Outcome) -> None:
        if outcome.fault is not None:
            self.meter.count("faults")
            self._faults.append(str(outcome.fault))
            self.replay.release(self.name, outcome.lease.episode)
            return
        self.meter.count("agent_steps", rate=True)
        if outcome.trajectory is not None:
            self.meter.count("episodes")
            self.replay.add(self.name, outcome.lease.episode, outcome.trajectory)
