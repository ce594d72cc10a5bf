"""An episode under way: what was seen and done so far, and what becomes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from actors.environment import Observation, Step
from actors.tasks import Task
from gsa.errors import EnvironmentFault
from gsa.schema import Controller, Lease, Trajectory

GUIDES = (Controller.PRIOR, Controller.HUMAN)


@dataclass
class Episode:
    """One episode under way in a slot: what was seen and done so far."""

    lease: Lease
    plan: np.ndarray  # [max_steps] who is to control each step
    rng: np.random.Generator  # every random draw of the episode
    observation: Observation  # name → [max_steps + 1, …]; rows are filled as they are seen
    action: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    discount: list[float] = field(default_factory=list)
    controller: list[int] = field(default_factory=list)  # who did control it
    version: list[int] = field(default_factory=list)
    success: float | None = None

    @property
    def newest(self) -> Observation:
        return {name: rows[len(self.action)] for name, rows in self.observation.items()}

    def see(self, observation: Observation) -> None:
        step = len(self.action)
        for name, rows in self.observation.items():
            rows[step] = observation[name]

    def record(self, step: Step, controller: int, version: int) -> None:
        self.action.append(step.action)
        self.see(step.observation)
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

    def trajectory(self, task: Task, id: str) -> Trajectory:
        reward = np.array(self.reward, np.float32)
        controller = np.array(self.controller, np.uint8)
        total = float(reward.sum(dtype=np.float64))
        stats = {
            "return": total,
            "score": task.score(total, self.success),
            "guided_share": float(np.isin(controller, GUIDES).mean()),
            "length": float(len(self.action)),
        }
        return Trajectory(
            embodiment=task.embodiment,
            observation={name: rows[: len(self.action) + 1] for name, rows in self.observation.items()},
            action=np.stack(self.action).astype(np.float32),
            discount=np.array(self.discount, np.float32),
            reward=reward,
            controller=controller,
            policy_version=np.array(self.version, np.int64),
            source=f"{task.name}/online",
            id=id,
            stats=stats,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one slot's step: nothing more, the end of its episode, or a fault that lost it."""

    lease: Lease
    trajectory: Trajectory | None = None
    fault: EnvironmentFault | None = None
