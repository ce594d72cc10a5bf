"""What a suite will take, said before it starts: hours, disk, memory. From steps timed here, and from trials done."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from actors import tasks
from deploy.forecast import Forecast, available_memory, existing, gb
from deploy.forecast import forecast as run_forecast
from deploy.progress import console
from deploy.suite_config import SuiteConfig, Trial
from gsa.agent.sizes import preset
from gsa.errors import UsageError
from gsa.schema import ArraySpec, Batch, Spec

if TYPE_CHECKING:
    from deploy.config import FinetuneConfig
    from learner.finetune import FineTuner

LARGE = 50_000_000  # weights: of a larger model only parts of a batch are timed
PARTS = (8, 24)  # rows of the two sequences that are timed then; the rest follows by a straight line
STEPS = 20  # agent steps that are timed


@dataclass(frozen=True)
class Work:
    """What a trial does."""

    updates: int
    steps: int  # agent steps, evaluations included

    @classmethod
    def of(cls, trial: Trial) -> Work:
        config, task = trial.config, tasks.find(trial.task, trial.config.imports)
        evaluated = config.final_episodes * (1 + config.guides + (trial.method != "prior"))
        if trial.method == "prior":
            return cls(0, evaluated * task.episode_steps)
        replay = config.replay(task.action_repeat, task.episode_steps)
        updates = replay.limiter().samples_due(replay.budget, replay.sample_steps) // replay.sample_steps
        evaluated += config.eval_episodes * (config.budget_frames // config.eval_every_frames)
        return cls(updates, replay.budget + evaluated * task.episode_steps)


class Hours:
    """How long trials take: by those of the suite that are done, else by what a step takes on this machine."""

    def __init__(self, suite: SuiteConfig, trials: Sequence[Trial], folder: Path) -> None:
        self._suite = suite
        self._recorded: dict[tuple[str, str], list[float]] = {}
        self._updates: dict[tuple[object, ...], float] = {}
        self._steps: dict[str, float] = {}
        for trial in trials:
            result = folder / "results" / f"{trial.name}.json"
            if result.exists():
                self._recorded.setdefault(_kind(trial), []).append(json.loads(result.read_text())["seconds"])

    def of(self, trial: Trial) -> float:
        """Hours of one trial."""
        if seconds := self._recorded.get(_kind(trial)):
            return float(np.mean(seconds)) / 3600
        work = Work.of(trial)
        update_s = self.update_s(trial.config) if work.updates else 0.0
        return (work.updates * update_s + work.steps * self.step_s(trial)) / 3600

    def update_s(self, config: FinetuneConfig) -> float:
        """Seconds of an update."""
        if self._suite.speed is not None:
            return self._suite.speed.update_s
        key = (config.model, config.batch, config.length, config.imagination_starts)
        if key not in self._updates:
            self._updates[key] = time_update(config)
        return self._updates[key]

    def step_s(self, trial: Trial) -> float:
        """Seconds of an agent step of the task's suite."""
        if self._suite.speed is not None:
            return self._suite.speed.step_s
        name = trial.task.split("/")[0]
        if name not in self._steps:
            self._steps[name] = time_step(trial.config)
        return self._steps[name]


def forecast(
    suite: SuiteConfig, trials: Sequence[Trial], left: Sequence[Trial], folder: Path, dry_run: bool = False
) -> dict[str, float]:
    """Says what is ahead, and returns the hours of each trial. UsageError if the disk has no room."""
    at_a_time = suite.resources.at_a_time
    hours = Hours(suite, trials, folder)
    each = {trial.name: hours.of(trial) for trial in left}
    total = sum(each.values())
    table = Table(title="Forecast", title_justify="left")
    for column in ("method", "trials", "each", "all"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label in dict.fromkeys(t.label for t in left):
        those = [each[t.name] for t in left if t.label == label]
        table.add_row(label, str(len(those)), in_words(float(np.mean(those))), in_words(sum(those)))
    console.print(table)
    console.print(
        f"About {in_words(total)} of trials, {in_words(total / at_a_time)} with {at_a_time} at a time; what they share "
        "comes on top: the pool, the world model, a prior actor for each task.",
        soft_wrap=True,
    )
    _room(suite, left, folder, dry_run)
    return each


def time_update(config: FinetuneConfig) -> float:
    """Seconds of one update of a model of the config's size, on this machine, now."""
    tuner = _tuner(config)
    if sum(p.numel() for p in tuner.agent.parameters()) < LARGE:
        return _time(partial(tuner.update, _batch(config, config.batch, config.length)))
    starts = tuner.agent.config.imagination_starts or config.batch * config.length
    times = []
    for rows in PARTS:
        states = max(1, round(starts * 2 * rows / (config.batch * config.length)))
        tuner.agent.config = replace(tuner.agent.config, imagination_starts=states)
        times.append(_time(partial(tuner.update, _batch(config, 2, rows))))
    slope = max(0.0, times[1] - times[0]) / (2 * (PARTS[1] - PARTS[0]))
    return times[1] + slope * (config.batch * config.length - 2 * PARTS[1])


def time_step(config: FinetuneConfig) -> float:
    """Seconds of one agent step of the config's task, on this machine, now: simulator, rendering and a small policy."""
    from deploy import parts

    with closing(parts.host(config)) as host:
        host.reset(0)
        action = np.zeros(host.spec.action_dim, np.float32)
        started = time.perf_counter()
        for _ in range(min(STEPS, host.task.episode_steps)):
            host.ask_step(action)
            host.answer()
        return (time.perf_counter() - started) / min(STEPS, host.task.episode_steps)


def _kind(trial: Trial) -> tuple[str, str]:
    """Trials that take about as long: of one task under one set of settings."""
    settings = {k: v for k, v in trial.settings().items() if k not in ("seed", "clone")}
    return trial.method, json.dumps(settings, sort_keys=True)


def _tuner(config: FinetuneConfig) -> FineTuner:
    from gsa.agent.agent import Agent
    from gsa.agent.world_model import WorldModel
    from learner.finetune import FineTuner

    size = preset(config.model)
    behaviour = size.behaviour
    if config.imagination_starts is not None:
        behaviour = replace(behaviour, imagination_starts=config.imagination_starts)
    model = WorldModel.create(replace(size.world_model, max_action_dim=config.max_action_dim), 0)
    return FineTuner(Agent.create(model, behaviour, min(4, config.max_action_dim)), config.learner)


def _batch(config: FinetuneConfig, sequences: int, rows: int) -> Batch:
    """Random images and actions, three quarters of them with rewards."""
    rng, shape = np.random.default_rng(0), (sequences, rows)
    first = np.zeros(shape, bool)
    first[:, 0] = True
    rewarded = np.ones(shape, bool)
    rewarded[: sequences // 4] = False
    mask = np.ones((sequences, config.max_action_dim), np.float32)
    return Batch(
        {"pixels": rng.integers(0, 256, (*shape, 64, 64, 3), np.uint8)},
        rng.uniform(-1, 1, (*shape, config.max_action_dim)).astype(np.float32), mask, np.ones(shape, np.float32),
        rewarded, np.ones(shape, np.float32), first, np.ones(shape, bool), (),
    )  # fmt: skip


def _time(call: Callable[[], object]) -> float:
    """Seconds of a call; the first one warms up, unless it takes long."""
    for _ in range(2):
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        if seconds > 5:
            break
    return seconds


def _room(suite: SuiteConfig, left: Sequence[Trial], folder: Path, dry_run: bool) -> None:
    """Says what disk and memory the trials need. UsageError if the disk has no room, but for a dry run, which may be of
    another machine."""
    runs = [_of_run(trial) for trial in left]
    at_a_time = suite.resources.at_a_time
    disk = at_a_time * max(one.disk for one in runs)
    disk += sum(one.on_disk["episodes"] for one in runs) if "online" in suite.keep else 0
    disk += sum(one.on_disk["agent"] for one in runs) if "agent" in suite.keep else 0
    memory = at_a_time * max(one.memory for one in runs)
    free, available = shutil.disk_usage(existing(folder)).free, available_memory()
    console.print(
        f"At most about {gb(disk)} of disk, {gb(free)} are free; at least {gb(memory)} of memory, activations on top.",
        soft_wrap=True,
    )
    if disk > free:
        said = f"The trials need about {gb(disk)} of disk and {gb(free)} are free: make room, or keep less of each."
        if not dry_run:
            raise UsageError(said)
        console.print(f"Warning: {said}", soft_wrap=True)
    if available is not None and memory > available:
        console.print(f"Warning: {gb(available)} of memory are available here; fewer at a time need less.")


def _of_run(trial: Trial) -> Forecast:
    """The forecast of a trial's run, as of a task seen by one camera."""
    config, task = trial.config, tasks.find(trial.task, trial.config.imports)
    spec = Spec(task.embodiment, {"pixels": ArraySpec((64, 64, 3), "uint8")}, task.action_dim, task.action_repeat)
    model = replace(preset(config.model).world_model, max_action_dim=config.max_action_dim)
    return run_forecast(config, model, config.model, spec, task.episode_steps)


def in_words(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
