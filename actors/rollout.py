"""E environments stepped together under the guided policy, one batched forward an agent step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from actors.environment import Environment, Observation
from actors.guidance import GuidanceConfig, episode_plan
from gsa.errors import EnvironmentFault
from gsa.schema import Controller, Lease, Trajectory


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

    def memory(self) -> dict[str, Any]:
        """What it remembers of the episodes under way, without its weights: numbers and arrays."""

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Takes back what `memory` gave."""


@dataclass
class Episode:
    """One episode under way in a slot: what was seen and done so far."""

    lease: Lease
    plan: np.ndarray  # [max_steps] controller of each step
    rng: np.random.Generator  # every random draw of the episode
    observation: list[Observation]
    action: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    discount: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    success: float | None = None

    def state(self) -> dict[str, Any]:
        """Plain data and arrays from which `Rollout.restore` plays the episode to where it stands."""
        return {
            "lease": asdict(self.lease), "rng": self.rng.bit_generator.state, "action": np.array(self.action),
            "reward": np.array(self.reward), "version": np.array(self.version, np.int64),
        }  # fmt: skip

    def trajectory(self, environment: Environment, source: str, id: str) -> Trajectory:
        reward = np.array(self.reward, np.float32)
        controller = self.plan[: len(self.action)]
        total = float(reward.sum(dtype=np.float64))
        stats = {
            "return": total,
            "score": environment.task.score(total, self.success),
            "guided_share": float((controller == Controller.PRIOR).mean()),
            "length": float(len(self.action)),
        }
        return Trajectory(
            embodiment=environment.spec.embodiment,
            observation={k: np.stack([o[k] for o in self.observation]) for k in self.observation[0]},
            action=np.stack(self.action).astype(np.float32),
            discount=np.array(self.discount, np.float32),
            reward=reward,
            controller=controller.copy(),
            policy_version=np.array(self.version, np.int64),
            source=source,
            id=id,
            stats=stats,
        )


class Rollout:
    """Owns E environments and their episodes. Every episode is decided by (seed, episode number) alone."""

    def __init__(
        self,
        environments: Sequence[Environment],
        policy: ActingPolicy,
        guidance: GuidanceConfig,
        has_prior: bool,
        seed: int,
        run: str = "run",
        sample: bool = True,
    ) -> None:
        self.environments = list(environments)
        self.policy, self.guidance, self.has_prior = policy, guidance, has_prior
        self.seed, self.run, self.sample = seed, run, sample
        self.version = -1  # of the weights that act
        self.episodes: list[Episode | None] = [None] * len(environments)
        spec = environments[0].spec
        self._blank = {k: np.zeros(v.shape, v.dtype) for k, v in spec.observation.items()}
        self._idle_rng = np.random.default_rng(0)  # draws for empty slots are thrown away

    @property
    def free_slots(self) -> list[int]:
        return [slot for slot, episode in enumerate(self.episodes) if episode is None]

    def begin(self, slot: int, lease: Lease) -> None:
        """Starts the leased episode in a free slot. Raises EnvironmentFault; the slot then stays free."""
        environment = self.environments[slot]
        rng = np.random.default_rng((self.seed, lease.episode))
        plan = episode_plan(self.guidance, lease, environment.episode_steps, self.has_prior, rng)
        observation = environment.reset(int(rng.integers(2**31)))
        self.policy.begin(slot)
        self.episodes[slot] = Episode(lease, plan, rng, [observation])

    def act(self) -> np.ndarray:
        """Actions [E, A] for every slot; those of free slots mean nothing."""
        observation = {k: np.stack([self._last(s)[k] for s in range(len(self.episodes))]) for k in self._blank}
        controller = np.array([e.plan[len(e.action)] if e else Controller.RANDOM for e in self.episodes], np.uint8)
        rngs = [e.rng if e else self._idle_rng for e in self.episodes]
        return self.policy.act(observation, controller, rngs, self.sample)

    def step(self, slot: int, action: np.ndarray) -> Trajectory | None:
        """One agent step in a slot; the trajectory if the episode ends with it.

        Raises EnvironmentFault; the episode is then dropped and the slot is free.
        """
        episode, environment = self.episodes[slot], self.environments[slot]
        assert episode is not None, "the slot is free"
        self.episodes[slot] = None  # stays so if the environment raises
        step = environment.step(action)
        episode.observation.append(step.observation)
        episode.action.append(step.action)
        episode.reward.append(step.reward)
        episode.discount.append(step.discount)
        episode.version.append(self.version)
        episode.success = step.success
        if step.last or len(episode.action) == episode.lease.max_steps:
            id = f"{self.run}-{episode.lease.episode:08d}"
            return episode.trajectory(environment, f"{environment.task.name}/online", id)
        self.episodes[slot] = episode
        return None

    def state(self) -> dict[str, Any]:
        """What continues the rollout exactly, between two steps."""
        episodes = [None if episode is None else episode.state() for episode in self.episodes]
        return {"version": self.version, "episodes": episodes, "policy": self.policy.memory()}

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
        self.version = int(state["version"])
        return lost

    def _replay(self, slot: int, saved: Mapping[str, Any]) -> bool:
        """Whether the saved episode could be played again to where it stood, reward for reward."""
        try:
            self.begin(slot, Lease(**saved["lease"]))
            for action, version in zip(saved["action"], saved["version"], strict=True):
                self.version = int(version)
                if self.step(slot, action) is not None:
                    return False
        except EnvironmentFault:
            return False
        episode = self.episodes[slot]
        assert episode is not None
        episode.rng.bit_generator.state = saved["rng"]
        return np.array_equal(episode.reward, saved["reward"])

    def drop(self) -> None:
        """Forgets every episode under way."""
        self.episodes = [None] * len(self.episodes)

    def _last(self, slot: int) -> Observation:
        episode = self.episodes[slot]
        return episode.observation[-1] if episode else self._blank
