"""Where offline trajectories come from: a task and a behaviour with one number, "metaworld/reach-v3/scripted-0.5".

scripted-S    Meta-World's scripted policy plus Gaussian noise of standard deviation S
noise-B       coloured Gaussian noise with spectrum 1/f^B: 0 white, 1 pink, 2 brown; any task
planner-Q     DMControl: sampling-based control towards the task's reward, quality Q from 0 to 1
objectives-Q  DMControl: the same, towards an objective drawn anew for each episode
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from actors import tasks
from actors.environment import Environment
from actors.tasks import Task
from gsa.errors import UsageError, unknown

KINDS = {"scripted": "S", "noise": "B", "planner": "Q", "objectives": "Q"}
SUITE_OF = {"scripted": "metaworld", "planner": "dmc", "objectives": "dmc"}
NOISE_SCALE = 0.6  # standard deviation of coloured noise before it is clipped


class Behaviour(Protocol):
    """Chooses the actions of one episode after another in one environment."""

    def begin(self, rng: np.random.Generator) -> None:
        """A new episode starts; the environment is reset. Every random draw comes from `rng`."""

    def act(self) -> np.ndarray:
        """The next action [A]; the environment clips it. The last one has been executed."""


@dataclass(frozen=True)
class Source:
    """A behaviour on a task."""

    task: Task
    kind: str
    level: float

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.kind}-{self.level:g}"

    @property
    def folder(self) -> str:
        """Relative folder of its files, in the layout of the published pools: dmcontrol/walker/walk/noise-1."""
        if self.task.suite == "dmc":
            domain, task = self.task.local_name.split("-", 1)
            return f"dmcontrol/{domain}/{task}/{self.kind}-{self.level:g}"
        return self.name


def parse(name: str, imports: Iterable[str] = ()) -> Source:
    """The source of that name; `parse(s).name` is its canonical spelling. UsageError says what is wrong with it.

    `imports` are modules that register Gymnasium environments.
    """
    found = re.fullmatch(r"(.+)/([a-z]+)-([0-9]*\.?[0-9]+)", name)
    if not found:
        examples = ", ".join(f"{kind}-{letter}" for kind, letter in KINDS.items())
        raise UsageError(f"'{name}' is not a source: write <task>/<behaviour> with a behaviour of {examples}.")
    task, kind, level = tasks.find(found[1], imports), found[2], float(found[3])
    if kind not in KINDS:
        raise unknown("behaviour", kind, KINDS)
    if SUITE_OF.get(kind, task.suite) != task.suite:
        raise UsageError(f"{name}: {kind} works on {SUITE_OF[kind]} tasks only.")
    if KINDS[kind] == "Q" and level > 1:
        raise UsageError(f"{name}: the quality must be from 0 to 1.")
    return Source(task, kind, level)


def behaviour(source: Source, environment: Environment) -> Behaviour:
    """The behaviour of `source` in `environment`, which is of its task."""
    if source.kind == "noise":
        return ColouredNoise(environment, source.level)
    if source.kind == "scripted":
        from actors.metaworld import MetaWorld, Scripted

        return Scripted(cast(MetaWorld, environment.simulation), source.task, source.level)
    from actors.dmc import DMControl
    from actors.planner import Planner, random_objective, task_objective

    simulation = cast(DMControl, environment.simulation)
    if source.kind == "planner":
        objective = task_objective(source.task.local_name)
        return Planner(simulation, source.level, lambda rng: objective)
    return Planner(simulation, source.level, lambda rng: random_objective(simulation.domain, rng))


class ColouredNoise:
    """Actions are Gaussian noise whose power falls with frequency as 1/f^exponent, independent in each dimension."""

    def __init__(self, environment: Environment, exponent: float) -> None:
        self._shape = (environment.episode_steps, environment.task.action_dim)
        self._exponent = exponent

    def begin(self, rng: np.random.Generator) -> None:
        self._actions = iter(NOISE_SCALE * coloured_noise(*self._shape, self._exponent, rng))

    def act(self) -> np.ndarray:
        return next(self._actions)


def coloured_noise(steps: int, dims: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """[steps, dims] of unit variance on average (Timmer & König 1995). The mean is random too, as for white noise."""
    rows = 2 * max(steps, 2)  # twice the length, as a spectrum makes its two ends meet
    frequency = np.fft.rfftfreq(rows)
    frequency[0] = frequency[1]
    amplitude = frequency ** (-exponent / 2)
    phases = rng.standard_normal((len(amplitude), dims)) + 1j * rng.standard_normal((len(amplitude), dims))
    noise = np.fft.irfft(amplitude[:, None] * phases, rows, axis=0)[:steps]
    # The expected variance of irfft, from its definition: both halves of the spectrum but for its two real ends.
    power = 2 * amplitude**2
    power[[0, -1]] /= 2
    return noise / np.sqrt(2 * power[1:-1].sum() + power[0] + power[-1]) * rows
