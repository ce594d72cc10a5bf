"""Execution guidance: which steps of an episode the prior actor takes over. Pure; numbers in, numbers out."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gsa.errors import UsageError
from gsa.schema import Controller, Lease

FORMS = "constant(P), linear(FROM,TO,STEPS) or piecewise(STEP:P,STEP:P,…)"


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


def schedule_value(schedule: str, step: int) -> float:
    """The schedule's value at `step`; linear between its points, constant outside them."""
    points = _points(schedule)
    return float(np.interp(step, [s for s, _ in points], [p for _, p in points]))


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


def _points(schedule: str) -> list[tuple[float, float]]:
    match = re.fullmatch(r"\s*(constant|linear|piecewise)\s*\(([^()]*)\)\s*", schedule)
    try:
        kind, arguments = (match[1], match[2].split(",")) if match else ("", [])
        if kind == "constant":
            (value,) = map(float, arguments)
            points = [(0.0, value)]
        elif kind == "linear":
            first, last, steps = map(float, arguments)
            points = [(0.0, first), (steps, last)]
        elif kind == "piecewise":
            points = [(float(s), float(p)) for s, p in (a.split(":") for a in arguments)]
        else:
            raise ValueError
    except ValueError:
        raise UsageError(f"Not a guidance schedule: '{schedule}'. Write {FORMS}.") from None
    steps_rise = all(a[0] < b[0] for a, b in itertools.pairwise(points))
    if not steps_rise or not all(0 <= p <= 1 for _, p in points):
        raise UsageError(f"In the guidance schedule '{schedule}' steps must rise and probabilities lie in [0, 1].")
    return points
