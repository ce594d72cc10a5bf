"""E environments stepped together under the guided policy, one batched forward an agent step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from actors.environment import Observation, Step
from actors.guidance import GuidanceConfig, Guide, episode_plan, guided_action
from actors.hosting import Host
from gsa.errors import EnvironmentFault, GsaError, cause_of
from gsa.schema import Controller, Lease, Trajectory

MAX_FAULTS = 10  # of one cause in a row: then it is no accident
GUIDES = (Controller.PRIOR, Controller.HUMAN)


class ActingPolicy(Protocol):
    """What a rollout asks for actions: gsa.agent.policy.GuidedPolicy, or anything alike."""

    def begin(self, slot: int) -> None:
        """A new episode starts in `slot`."""

    def act(
        self,
        observation: Mapping[str, np.ndarray],
        controller: np.ndarray,
        rngs: Sequence[np.random.Generator],
        sample: bool = True,
    ) -> np.ndarray:
        """Actions [E, A] in [-1, 1] for observations [E, …]; `controller` [E] says who chooses each.

        With `sample` the policy draws its action, else it takes the mean.
        """

    def executed(self, action: np.ndarray) -> None:
        """What is executed [E, A], where that is not what `act` returned: a guide took over."""

    def memory(self) -> dict[str, Any]:
        """What it remembers of the episodes under way, without its weights: numbers and arrays."""

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Takes back what `memory` gave."""


@dataclass
class Episode:
    """One episode under way in a slot: what was seen and done so far."""

    lease: Lease
    plan: np.ndarray  # [max_steps] who is to control each step
    rng: np.random.Generator  # every random draw of the episode
    observation: list[Observation] = field(default_factory=list)  # empty until the environment is reset
    action: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    discount: list[float] = field(default_factory=list)
    controller: list[int] = field(default_factory=list)  # who did control it
    version: list[int] = field(default_factory=list)
    success: float | None = None

    def record(self, step: Step, controller: int, version: int) -> None:
        self.observation.append(step.observation)
        self.action.append(step.action)
        self.reward.append(step.reward)
        self.discount.append(step.discount)
        self.controller.append(controller)
        self.version.append(version)
        self.success = step.success

    def state(self) -> dict[str, Any]:
        """Plain data and arrays from which `Rollout.restore` plays the episode to where it stands."""
        return {
            "lease": asdict(self.lease), "rng": self.rng.bit_generator.state, "action": np.array(self.action),
            "reward": np.array(self.reward), "controller": np.array(self.controller, np.uint8),
            "version": np.array(self.version, np.int64),
        }  # fmt: skip

    def trajectory(self, host: Host, id: str) -> Trajectory:
        reward = np.array(self.reward, np.float32)
        controller = np.array(self.controller, np.uint8)
        total = float(reward.sum(dtype=np.float64))
        stats = {
            "return": total,
            "score": host.task.score(total, self.success),
            "guided_share": float(np.isin(controller, GUIDES).mean()),
            "length": float(len(self.action)),
        }
        return Trajectory(
            embodiment=host.spec.embodiment,
            observation={k: np.stack([o[k] for o in self.observation]) for k in self.observation[0]},
            action=np.stack(self.action).astype(np.float32),
            discount=np.array(self.discount, np.float32),
            reward=reward,
            controller=controller,
            policy_version=np.array(self.version, np.int64),
            source=f"{host.task.name}/online",
            id=id,
            stats=stats,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one slot's step: nothing more, the end of its episode, or a fault that lost it."""

    lease: Lease
    trajectory: Trajectory | None = None
    fault: EnvironmentFault | None = None


class Rollout:
    """Owns E environments and their episodes. Every episode is decided by (seed, episode number) alone.

    An environment that fails loses its episode and is made anew; ten failures of one cause with no whole episode
    between them are a GsaError.
    """

    def __init__(
        self,
        make: Callable[[], Host],
        envs: int,
        policy: ActingPolicy,
        guidance: GuidanceConfig,
        has_prior: bool,
        seed: int,
        run: str = "run",
        sample: bool = True,
        guides: Sequence[Guide] = (),
    ) -> None:
        """`guides`: none, or one for each environment, that may take over from policy and prior."""
        self._make = make
        self.hosts = [make() for _ in range(envs)]
        self.policy, self.guidance, self.has_prior, self.guides = policy, guidance, has_prior, guides
        self.seed, self.run, self.sample = seed, run, sample
        self.version = -1  # of the weights that act
        self.episodes: list[Episode | None] = [None] * envs
        self._faults: dict[str, int] = {}  # cause → in a row
        spec = self.hosts[0].spec
        self._blank = {k: np.zeros(v.shape, v.dtype) for k, v in spec.observation.items()}
        self._idle_rng = np.random.default_rng(0)  # draws for empty slots are thrown away

    @property
    def free_slots(self) -> list[int]:
        return [slot for slot, episode in enumerate(self.episodes) if episode is None]

    def begin(self, slot: int, lease: Lease) -> None:
        """Begins the leased episode in a free slot. It is stepped once the environment has answered the reset."""
        host = self.hosts[slot]
        rng = np.random.default_rng((self.seed, lease.episode))
        guide = Controller.HUMAN if self.guides else Controller.PRIOR if self.has_prior else None
        plan = episode_plan(self.guidance, lease, host.task.episode_steps, guide, rng, host.task.action_repeat)
        host.ask_reset(int(rng.integers(2**31)))
        self.episodes[slot] = Episode(lease, plan, rng)

    def advance(self, wait_s: float = 0.0) -> list[Outcome]:
        """One agent step in every slot whose environment is reset; one outcome for each of them, and for each failed
        reset. If all are still resetting, waits for the first of them, but no longer than `wait_s`."""
        outcomes = self._take_resets(wait_s)
        stepping = {s: e for s, e in enumerate(self.episodes) if e is not None and e.observation}
        if stepping:
            controller = self._planned(stepping)
            actions = self._act(stepping, controller)
            for slot in stepping:
                self.hosts[slot].ask_step(actions[slot])
            outcomes += [self._take_step(slot, int(controller[slot])) for slot in stepping]
        return outcomes

    def state(self) -> dict[str, Any]:
        """What continues the rollout exactly, between two steps of environments in this process."""
        episodes = [None if episode is None else episode.state() for episode in self.episodes]
        return {
            "version": self.version, "episodes": episodes, "policy": self.policy.memory(), "faults": dict(self._faults),
            "idle_rng": self._idle_rng.bit_generator.state,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> list[Lease]:
        """Plays the episodes under way again by what was done in them, and gives the policy its memory back.

        Returns the leases of those that cannot go on, since their environment fails or does not repeat itself.
        """
        lost = []
        for slot, saved in enumerate(state["episodes"]):
            if saved is not None and not self._replay(slot, saved):
                self.episodes[slot] = None
                lost.append(Lease(**saved["lease"]))
        self.policy.recall(state["policy"])
        self._idle_rng.bit_generator.state = state["idle_rng"]
        self.version = int(state["version"])
        self._faults = {str(cause): int(n) for cause, n in state["faults"].items()}
        return lost

    def _replay(self, slot: int, saved: Mapping[str, Any]) -> bool:
        """Whether the saved episode could be played again to where it stood, reward for reward."""
        self.begin(slot, Lease(**saved["lease"]))
        episode, host = self.episodes[slot], self.hosts[slot]
        assert episode is not None
        try:
            episode.observation.append(host.answer())
            for action, controller, version in zip(saved["action"], saved["controller"], saved["version"], strict=True):
                host.ask_step(action)
                episode.record(step := host.answer(), int(controller), int(version))
                if step.last:
                    return False
        except EnvironmentFault:
            return False
        episode.rng.bit_generator.state = saved["rng"]
        return np.array_equal(episode.reward, saved["reward"])

    def close(self) -> None:
        for host in self.hosts:
            host.close()

    def _take_resets(self, wait_s: float) -> list[Outcome]:
        outcomes = []
        waiting = [(s, e) for s, e in enumerate(self.episodes) if e is not None and not e.observation]
        if sum(e is not None for e in self.episodes) > len(waiting):
            wait_s = 0.0  # the others go on
        for slot, episode in waiting:
            if not self.hosts[slot].ready(wait_s):
                continue
            wait_s = 0.0
            try:
                episode.observation.append(self.hosts[slot].answer())
                self.policy.begin(slot)
            except EnvironmentFault as fault:
                outcomes.append(self._lost(slot, fault))
        return outcomes

    def _planned(self, stepping: Mapping[int, Episode]) -> np.ndarray:
        """Who the schedule gives this step of each slot to, [E]."""
        controller = np.full(len(self.episodes), Controller.RANDOM, np.uint8)
        for slot, episode in stepping.items():
            controller[slot] = episode.plan[len(episode.action)]
        return controller

    def _act(self, stepping: Mapping[int, Episode], controller: np.ndarray) -> np.ndarray:
        """Actions [E, A]; those of idle slots mean nothing. Sets `controller` [E] to who did choose."""
        scheduled = controller == Controller.HUMAN
        for slot in np.flatnonzero(scheduled).tolist():
            controller[slot] = self._without_guide(stepping[slot])
        rows = [stepping[s].observation[-1] if s in stepping else self._blank for s in range(len(self.episodes))]
        observation = {k: np.stack([row[k] for row in rows]) for k in self._blank}
        rngs = [stepping[s].rng if s in stepping else self._idle_rng for s in range(len(self.episodes))]
        actions = self.policy.act(observation, controller, rngs, self.sample)
        if self.guides:
            for slot, episode in stepping.items():
                seen, step, asked = episode.observation[-1], len(episode.action), bool(scheduled[slot])
                if (taken := guided_action(self.guides[slot], seen, step, asked, actions.shape[1])) is not None:
                    actions[slot], controller[slot] = taken, Controller.HUMAN
            self.policy.executed(actions)
        return actions

    def _without_guide(self, episode: Episode) -> Controller:
        """Who takes a step of the guide's that it leaves to the others."""
        if self.has_prior:
            return Controller.PRIOR
        return Controller.RANDOM if episode.lease.warmup else Controller.POLICY

    def _take_step(self, slot: int, controller: int) -> Outcome:
        episode, host = self.episodes[slot], self.hosts[slot]
        assert episode is not None
        try:
            step = host.answer()
        except EnvironmentFault as fault:
            return self._lost(slot, fault)
        episode.record(step, controller, self.version)
        if not step.last and len(episode.action) < episode.lease.max_steps:
            return Outcome(episode.lease)
        self.episodes[slot] = None
        self._faults.clear()
        return Outcome(episode.lease, episode.trajectory(host, f"{self.run}-{episode.lease.episode:08d}"))

    def _lost(self, slot: int, fault: EnvironmentFault) -> Outcome:
        """Drops the slot's episode and makes its environment anew."""
        episode = self.episodes[slot]
        assert episode is not None
        self.episodes[slot] = None
        cause = cause_of(str(fault))
        self._faults[cause] = self._faults.get(cause, 0) + 1
        self.hosts[slot].close()
        if self._faults[cause] >= MAX_FAULTS:
            raise GsaError(f"The environment failed {MAX_FAULTS} times in a row for one cause: {fault}") from fault
        self.hosts[slot] = self._make()
        return Outcome(episode.lease, fault=fault)
