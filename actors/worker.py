"""The environment worker: leases episodes, steps them, hands them to replay. Plain; a launcher may wrap it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from actors.environment import Environment
from actors.rollout import Rollout
from gsa.errors import EnvironmentFault, GsaError
from gsa.metrics import Meter
from gsa.schema import Lease, NoLease, Trajectory, WeightSnapshot

IDLE_S = 0.02  # pause of a worker that has nothing to step
MAX_FAULTS = 10  # of one cause in a row: then it is no accident


class ReplayLink(Protocol):
    """The worker's end of the link to the replay service. No call waits for the learner."""

    def lease(self, worker: str) -> Lease | NoLease:
        """Permission to collect an episode; WAIT also while the answer is still on its way."""

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
        self,
        name: str,
        rollout: Rollout,
        replay: ReplayLink,
        weights: WeightLink,
        prior: WeightLink | None,
        remake: Callable[[], Environment],
    ) -> None:
        """`prior`: where the prior actor's weights come from, once; None for a method without one."""
        self.name, self.rollout, self.replay, self.weights, self.remake = name, rollout, replay, weights, remake
        self._awaited_prior = prior
        self.meter = Meter("worker")
        self.last_progress = time.monotonic()
        self._faults: dict[str, int] = {}

    def tick(self) -> bool:
        """One agent step in every slot that has an episode. False if there was none to step."""
        self._swap_weights()
        if self.rollout.version < 0 or self._awaited_prior is not None:
            return False  # the first weights are on their way
        for slot in self.rollout.free_slots:
            self._start(slot)
        busy = [slot for slot, episode in enumerate(self.rollout.episodes) if episode is not None]
        if not busy:
            return False
        actions = self.rollout.act()
        for slot in busy:
            self._step(slot, actions[slot])
        self.last_progress = time.monotonic()
        return True

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
        return {"rollout": self.rollout.state(), "faults": dict(self._faults), "meter": self.meter.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where the one that gave `state` stood. Episodes whose environment does not repeat itself are
        given back."""
        self._faults = {str(cause): int(n) for cause, n in state["faults"].items()}
        self.meter.restore(state["meter"])
        for lease in self.rollout.restore(state["rollout"]):
            self.meter.count("unrepeated_episodes")
            self.replay.release(self.name, lease.episode)

    def close(self) -> None:
        for environment in self.rollout.environments:
            environment.close()

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

    def _start(self, slot: int) -> None:
        lease = self.replay.lease(self.name)
        if isinstance(lease, Lease):
            try:
                self.rollout.begin(slot, lease)
            except EnvironmentFault as fault:
                self._drop(slot, lease, fault)

    def _step(self, slot: int, action) -> None:
        episode = self.rollout.episodes[slot]
        assert episode is not None
        try:
            trajectory = self.rollout.step(slot, action)
        except EnvironmentFault as fault:
            self._drop(slot, episode.lease, fault)
            return
        self.meter.count("agent_steps", rate=True)
        if trajectory is not None:
            self._faults.clear()
            self.meter.count("episodes")
            self.replay.add(self.name, episode.lease.episode, trajectory)

    def _drop(self, slot: int, lease: Lease, fault: EnvironmentFault) -> None:
        """Gives the lease back and builds the environment anew; ten faults of one cause in a row end the worker."""
        cause = str(fault)
        self.meter.count("faults")
        self._faults[cause] = self._faults.get(cause, 0) + 1
        self.replay.release(self.name, lease.episode)
        if self._faults[cause] >= MAX_FAULTS:
            raise GsaError(f"The environment failed {MAX_FAULTS} times in a row for one cause: {cause}") from fault
        self.rollout.environments[slot].close()
        self.rollout.environments[slot] = self.remake()
