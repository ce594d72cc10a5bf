"""Execution guidance: which steps of an episode a guide takes over, the prior actor or one that is plugged in.

The schedule is pure: numbers in, numbers out.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from actors.tasks import Task
from gsa.errors import GsaError, UsageError
from gsa.schedule import schedule_value
from gsa.schema import Controller, Lease


@dataclass(frozen=True)
class GuidanceConfig:
    """When the prior acts. Only methods with a prior actor read it, but for the warm-up, and runs with a --guide."""

    schedule: str = "linear(1,0,50000)"
    """Probability that an episode is guided, over agent steps: constant(P), linear(FROM,TO,STEPS) or
    piecewise(STEP:P,…); with " frames" behind it, over frames. With placement=prefix: the share of each episode that
    the prior begins."""
    placement: Literal["random", "prefix"] = "random"
    """random: a stretch anywhere in the episode (GSA). prefix: the prior begins, the policy ends (JSRL)."""

    def __post_init__(self) -> None:
        schedule_value(self.schedule, 0)


class Guide(Protocol):
    """Whoever may take over from the policy: a person at a device, a scripted policy. One for each environment."""

    def __call__(self, observation: Mapping[str, np.ndarray], step: int, scheduled: bool) -> np.ndarray | None:
        """The action [A] in [-1, 1] to take after `observation` of agent step `step` (0: the episode begins), or None
        to leave it to the others. `scheduled`: the schedule gives this step to the guide."""


def episode_plan(
    config: GuidanceConfig,
    lease: Lease,
    episode_steps: int,
    guide: Controller | None,
    rng: np.random.Generator,
    action_repeat: int = 1,
) -> np.ndarray:
    """Who controls each step of a leased episode: [max_steps] uint8 of Controller. `guide`: who guides, if anybody.

    A guided episode has one guided stretch: its length uniform over {10 %, 20 %, …, 100 %} of the episode,
    its start uniform over what remains (section 3.3 of the paper).
    """
    plan = np.full(episode_steps, Controller.POLICY, np.uint8)
    if lease.warmup:
        plan[:] = Controller.RANDOM if guide is None else guide
    elif guide is not None:
        value = schedule_value(config.schedule, lease.agent_steps, action_repeat)
        if config.placement == "prefix":
            plan[: round(value * episode_steps)] = guide
        elif rng.random() < value:
            length = max(1, round(episode_steps * int(rng.integers(1, 11)) / 10))
            start = int(rng.integers(0, episode_steps - length + 1))
            plan[start : start + length] = guide
    return plan[: lease.max_steps]


def find_guide(name: str) -> Callable[[Task], Guide]:
    """The factory that "module:function" names. UsageError where there is none."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise UsageError(f"A guide is named module:function, not '{name}'.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"The guide '{name}' cannot be imported ({error}): is its module on PYTHONPATH?") from error
    if not callable(factory):
        raise UsageError(f"The guide '{name}' must be a function of the task that returns a guide.")
    return factory


def guided_action(
    guide: Guide, observation: Mapping[str, np.ndarray], step: int, scheduled: bool, action_dim: int
) -> np.ndarray | None:
    """What the guide does, [A] in [-1, 1], or None. GsaError names a guide that fails or answers otherwise."""
    try:
        chosen = guide(observation, step, scheduled)
        action = None if chosen is None else np.asarray(chosen, np.float32)
    except Exception as error:
        raise GsaError(f"The guide failed in step {step}: {type(error).__name__}: {str(error).rstrip('.')}.") from error
    if action is not None and (action.shape != (action_dim,) or not np.all(np.isfinite(action))):
        raise GsaError(f"The guide must give {action_dim} finite numbers or None, not {chosen!r}.")
    return None if action is None else np.clip(action, -1, 1)
