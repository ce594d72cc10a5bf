"""Where offline trajectories come from: a task and a behaviour with one number, "metaworld/reach-v3/scripted-0.5".

scripted-S    Meta-World's scripted policy plus Gaussian noise of standard deviation S
noise-B       coloured Gaussian noise with spectrum 1/f^B: 0 white, 1 pink, 2 brown; any task
planner-Q     DMControl: sampling-based control towards the task's reward, quality Q from 0 to 1
objectives-Q  DMControl: the same, towards an objective drawn anew for each episode
agent:FOLDER  the policy of an agent's folder, drawing its actions; agent-mean:FOLDER acts by their mean
mixed         all that a suite has, from fair to aimless, in equal shares

Several tasks at once: "metaworld/*-v3/mixed".
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from actors import tasks
from actors.environment import Environment, Observation
from actors.tasks import Task
from gsa.errors import SpecMismatch, UsageError, unknown
from gsa.schema import Controller

KINDS = {"scripted": "S", "noise": "B", "planner": "Q", "objectives": "Q"}
SUITE_OF = {"scripted": "metaworld", "planner": "dmc", "objectives": "dmc"}
AGENT, AGENT_MEAN = "agent", "agent-mean"
MIXED = {
    "metaworld": ("scripted-0.5", "scripted-1", "scripted-1.5", "scripted-2", "noise-1"),
    "dmc": ("planner-0.7", "planner-0.3", "objectives-0.5", "noise-1", "noise-2"),
    "gym": ("noise-0", "noise-1", "noise-2"),
}
NOISE_SCALE = 0.6  # standard deviation of coloured noise before it is clipped


class Behaviour(Protocol):
    """Chooses the actions of one episode after another in one environment."""

    def begin(self, rng: np.random.Generator) -> None:
        """A new episode starts; the environment is reset. Every random draw comes from `rng`."""

    def act(self, observation: Observation) -> np.ndarray:
        """The next action [A], having seen `observation`; the environment clips it. The last one has been executed."""


@dataclass(frozen=True)
class Source:
    """A behaviour on a task. Small: it crosses to another process."""

    task: Task
    kind: str
    level: float = 0.0
    agent: str = ""  # folder
    digest: str = ""  # of the agent's files: its name in the pool, wherever it lies

    @property
    def behaviour(self) -> str:
        return f"{self.kind}-{self.digest or f'{self.level:g}'}"

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.behaviour}"

    @property
    def folder(self) -> str:
        """Relative folder of its files, in the layout of the published pools: dmcontrol/walker/walk/noise-1."""
        if self.task.suite == "dmc":
            domain, task = self.task.local_name.split("-", 1)
            return f"dmcontrol/{domain}/{task}/{self.behaviour}"
        return self.name

    @property
    def controller(self) -> Controller | None:
        """Who chooses, where a store has a word for it."""
        return {"noise": Controller.RANDOM, AGENT: Controller.POLICY, AGENT_MEAN: Controller.POLICY}.get(self.kind)


def parse(name: str, imports: Iterable[str] = ()) -> Source:
    """The source of that name; `parse(s).name` is its canonical spelling. UsageError says what is wrong with it.

    `imports` are modules that register Gymnasium environments.
    """
    if by_agent := re.fullmatch(f"(.+?)/({AGENT}|{AGENT_MEAN}):(.+)", name):
        return _of_agent(tasks.find(by_agent[1], imports), by_agent[2], Path(by_agent[3]))
    found = re.fullmatch(r"(.+)/([a-z]+)-([0-9]*\.?[0-9]+)", name)
    if not found:
        examples = ", ".join([*(f"{kind}-{letter}" for kind, letter in KINDS.items()), f"{AGENT}:FOLDER", "mixed"])
        raise UsageError(f"'{name}' is not a source: write <task>/<behaviour> with a behaviour of {examples}.")
    task, kind, level = tasks.find(found[1], imports), found[2], float(found[3])
    if kind not in KINDS:
        raise unknown("behaviour", kind, [*KINDS, AGENT, AGENT_MEAN, "mixed"])
    if SUITE_OF.get(kind, task.suite) != task.suite:
        raise UsageError(f"{name}: {kind} works on {SUITE_OF[kind]} tasks only.")
    if KINDS[kind] == "Q" and level > 1:
        raise UsageError(f"{name}: the quality must be from 0 to 1.")
    return Source(task, kind, level)


def expand(name: str, episodes: int) -> list[tuple[str, int]]:
    """What "metaworld/*-v3/mixed" and its like stand for, `episodes` of each task. UsageError if for no task."""
    found = re.fullmatch(rf"(.+?)/((?:{AGENT}|{AGENT_MEAN}):.+|[^/]*)", name)
    task, behaviour = found.groups() if found else (name, "")
    named = [task]
    if set(task) & set("*?["):
        named = fnmatch.filter((t.name for t in tasks.ALL), task)
        if not named:
            raise UsageError(f"No task is like '{task}'; gsa tasks lists them.")
    if behaviour != "mixed":
        return [(f"{one}/{behaviour}" if found else one, episodes) for one in named]
    return [pair for one in named for pair in _shares(one, episodes)]


def _shares(task: str, episodes: int) -> list[tuple[str, int]]:
    """`episodes` over the behaviours of MIXED, as evenly as can be."""
    suite = task.split("/", 1)[0]
    if suite not in MIXED:
        raise unknown("suite", suite, MIXED)
    shares = [len(part) for part in np.array_split(np.empty(episodes), len(MIXED[suite]))]
    return [(f"{task}/{kind}", share) for kind, share in zip(MIXED[suite], shares, strict=True) if share]


def _of_agent(task: Task, kind: str, folder: Path) -> Source:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise UsageError(f"There is no agent in {folder}; name the folder 'agent' of a run.")
    content = hashlib.blake2b(digest_size=4)
    for path in files:
        content.update(path.read_bytes())
    return Source(task, kind, agent=str(folder.resolve()), digest=content.hexdigest())


def behaviour(source: Source, environment: Environment) -> Behaviour:
    """The behaviour of `source` in `environment`, which is of its task."""
    if source.agent:
        return AgentActs(source, environment)
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
        return Planner(simulation, source.level, lambda model, rng: objective)
    return Planner(simulation, source.level, random_objective)


class AgentActs:
    """The policy of an agent's folder. SpecMismatch if it is one for other observations or actions."""

    def __init__(self, source: Source, environment: Environment) -> None:
        from gsa.agent.agent import Agent
        from gsa.agent.policy import GuidedPolicy

        agent = Agent.load(Path(source.agent))
        if agent.action_dim != environment.spec.action_dim:
            raise SpecMismatch(
                f"The agent in {source.agent} has {agent.action_dim} actions, {source.task.name} has "
                f"{environment.spec.action_dim}."
            )
        self._policy = GuidedPolicy(agent.world_model.config, agent.config, agent.action_dim)
        self._policy.load_tensors(agent.acting_tensors())
        self._sample = source.kind == AGENT

    def begin(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._policy.begin(0)

    def act(self, observation: Observation) -> np.ndarray:
        seen = {name: value[None] for name, value in observation.items()}
        return self._policy.act(seen, np.array([Controller.POLICY], np.uint8), [self._rng], self._sample)[0]


class ColouredNoise:
    """Actions are Gaussian noise whose power falls with frequency as 1/f^exponent, independent in each dimension."""

    def __init__(self, environment: Environment, exponent: float) -> None:
        self._shape = (environment.episode_steps, environment.task.action_dim)
        self._exponent = exponent

    def begin(self, rng: np.random.Generator) -> None:
        self._actions = iter(NOISE_SCALE * coloured_noise(*self._shape, self._exponent, rng))

    def act(self, observation: Observation) -> np.ndarray:
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
