"""Execution guidance: which steps of an episode the prior actor takes over. Pure; numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gsa.schedule import schedule_value
from gsa.schema import Controller, Lease


@dataclass(frozen=True)
class GuidanceConfig:
    """When the prior acts. Only methods with a prior actor read it, but for the warm-up."""

    schedule: str = "linear(1,0,50000)"
    """Probability that an episode is guided, over agent steps: constant(P), linear(FROM,TO,STEPS),
    piecewise(STEP:P,…). With placement=prefix: the share of each episode that the prior begins."""
    placement: Literal["random", "prefix"] = "random"
    """random: a stretch anywhere in the episode (GSA). prefix: the prior begins, the policy ends (JSRL)."""

    def __post_init__(self) -> None:
        schedule_value(self.schedule, 0)


def episode_plan(
    config: GuidanceConfig, lease: Lease, episode_steps: int, has_prior: bool, rng: np.random.Generator
) -> np.ndarray:
    """Who controls each step of a leased episode: [max_steps] uint8 of Controller.

    A guided episode has one guided stretch: its length uniform over {10 %, 20 %, …, 100 %} of the episode,
    its start uniform over what remains (section 3.3 of the paper).
    """
    plan = np.full(episode_steps, Controller.POLICY, np.uint8)
    if lease.warmup:
        plan[:] = Controller.PRIOR if has_prior else Controller.RANDOM
    elif has_prior:
        value = schedule_value(config.schedule, lease.agent_steps)
        if config.placement == "prefix":
            plan[: round(value * episode_steps)] = Controller.PRIOR
        elif rng.random() < value:
            length = max(1, round(episode_steps * int(rng.integers(1, 11)) / 10))
            start = int(rng.integers(0, episode_steps - length + 1))
            plan[start : start + length] = Controller.PRIOR
    return plan[: lease.max_steps]
