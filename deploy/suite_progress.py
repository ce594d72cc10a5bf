"""How a suite stands, by its folder alone: while it runs, here or elsewhere, and after."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.table import Table

from deploy.progress import LINE_EVERY_S, console
from deploy.suite_config import SuiteConfig, Trial
from deploy.suite_forecast import in_words
from deploy.trial import SUITE
from gsa import config as configs
from gsa.errors import UsageError
from retrieval.files import is_locked

State = Literal["done", "running", "failed", "begun", "waiting"]
TOLD_FROM = 0.02  # of the hours ahead, done: before, nothing tells how long the rest takes
LOOK_S = 2.0  # between two looks at the folder
TAIL_BYTES = 16_384  # of a log: its last rows


@dataclass(frozen=True)
class Standing:
    """How one trial stands."""

    trial: Trial
    state: State
    frames: int = 0  # collected, of a trial that is not done
    score: float | None = None  # the result, or the last evaluation
    said: str = ""  # why it failed

    @property
    def share(self) -> float:
        """Of the budget that is collected."""
        return 1.0 if self.state == "done" else min(1.0, self.frames / self.trial.config.budget_frames)


def load(path: Path, out: Path | None = None) -> tuple[SuiteConfig, Path]:
    """A suite and its folder, by its file or by its folder. UsageError where there is none."""
    if path.is_dir():
        if not (path / SUITE).is_file():
            raise UsageError(f"{path} has no suite in it: it lacks {SUITE}.")
        return configs.load(SuiteConfig, path / SUITE), path.resolve()
    suite = configs.load(SuiteConfig, path)
    return suite, (out or Path("runs") / suite.name).resolve()


def standing(folder: Path, trial: Trial) -> Standing:
    """How a trial stands, by what it left in the suite's folder."""
    result, failure = (folder / kind / f"{trial.name}.json" for kind in ("results", "failures"))
    run = folder / "trials" / trial.name
    if result.exists():
        return Standing(trial, "done", score=json.loads(result.read_text())["score"])
    frames, score = _last_logged(run / "metrics.jsonl")
    if is_locked(run, "lock"):
        return Standing(trial, "running", frames, score)
    if failure.exists():
        return Standing(trial, "failed", frames, score, json.loads(failure.read_text())["reason"])
    return Standing(trial, "begun" if run.exists() else "waiting", frames, score)


class Standings:
    """How all trials stand, whenever asked: what is done is read once."""

    def __init__(self, folder: Path, trials: Sequence[Trial]) -> None:
        self._folder, self._trials = folder, trials
        self._done: dict[str, Standing] = {}

    def __call__(self) -> list[Standing]:
        now = [self._done.get(trial.name) or standing(self._folder, trial) for trial in self._trials]
        self._done = {each.trial.name: each for each in now if each.state == "done"}
        return now


def status(suite: SuiteConfig, folder: Path) -> int:
    """Prints how the suite stands."""
    if not folder.is_dir():
        raise UsageError(f"{suite.name} has not been begun: there is no {folder}.")
    now = Standings(folder, suite.trials(folder))()
    out = console.__class__(highlight=False)  # what was asked for goes to standard output
    out.print(scores(now))
    out.print(summary(now), soft_wrap=True)
    for each in now:
        if each.state in ("running", "begun"):
            out.print(f"{each.state}: {each.trial.name}: {_how_far(each)}", soft_wrap=True, markup=False)
        if each.state == "failed":
            out.print(f"failed: {each.trial.name}: {each.said}", soft_wrap=True, markup=False)
    return 0


def summary(now: Sequence[Standing]) -> str:
    counts = Counter(str(each.state) for each in now)
    order = ("done", "running", "failed", "begun", "waiting")
    return f"Trials: {len(now)}; " + ", ".join(f"{counts[state]} {state}" for state in order if counts[state]) + "."


def scores(now: Sequence[Standing]) -> Table:
    """Task × method, whichever are more as rows: the mean score of the trials that are done, and how many are."""
    tasks = dict.fromkeys(each.trial.task for each in now)
    methods = dict.fromkeys(each.trial.label for each in now)
    down, across = (methods, tasks) if len(methods) > len(tasks) else (tasks, methods)
    table = Table(title="score, and trials done", title_justify="left")
    table.add_column("method" if down is methods else "task", overflow="fold")
    for column in across:
        table.add_column(column, justify="right", overflow="fold")
    for row in down:
        pairs = [{row, column} for column in across]
        table.add_row(row, *(_cell([e for e in now if {e.trial.task, e.trial.label} == pair]) for pair in pairs))
    return table


class TimeLeft:
    """How long a suite will still run: by the forecast, held to how that has fared so far."""

    def __init__(self, hours: Mapping[str, float], now: Sequence[Standing]) -> None:
        self._hours = hours
        self._started, self._first = time.monotonic(), self._ahead(now)

    def __call__(self, now: Sequence[Standing]) -> str:
        """In words; empty while too little is done to tell."""
        ahead = self._ahead(now)
        done = self._first - ahead
        if not ahead or done < TOLD_FROM * self._first:
            return ""
        return f"About {in_words((time.monotonic() - self._started) / 3600 * ahead / done)} left."

    def _ahead(self, now: Sequence[Standing]) -> float:
        """Hours of trials, one after the other."""
        return sum(self._hours.get(e.trial.name, 0.0) * (1 - e.share) for e in now if e.state != "failed")


@contextmanager
def watching(folder: Path, trials: Sequence[Trial], hours: Mapping[str, float]) -> Iterator[Callable[[], None]]:
    """Yields what to call now and then: a live table on a terminal; elsewhere a line now and then, and one for each
    trial that ends."""
    standings = Standings(folder, trials)
    left = TimeLeft(hours, standings())
    if not console.is_terminal:
        yield _Lines(standings, left)
        return
    with Live(console=console, auto_refresh=False) as live:
        next_look = 0.0

        def look() -> None:
            nonlocal next_look
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_S
                live.update(_view(standings(), left), refresh=True)

        yield look
        next_look = 0.0
        look()


class _Lines:
    """For logs."""

    def __init__(self, standings: Standings, left: TimeLeft) -> None:
        self.standings, self.left = standings, left
        self.look, self.line = 0.0, 0.0
        self.ended = {each.trial.name for each in standings() if each.state == "done"}

    def __call__(self) -> None:
        if time.monotonic() < self.look:
            return
        self.look = time.monotonic() + LOOK_S
        now = self.standings()
        for each in now:
            if each.state == "done" and each.trial.name not in self.ended:
                self.ended.add(each.trial.name)
                console.print(f"done: {each.trial.name}: score {each.score:.1f}", soft_wrap=True, markup=False)
        if time.monotonic() >= self.line:
            self.line = time.monotonic() + LINE_EVERY_S
            running = "; ".join(f"{e.trial.name}: {_how_far(e)}" for e in now if e.state == "running")
            told = filter(None, (summary(now), self.left(now), running))
            console.print(" ".join(told), soft_wrap=True, markup=False)


def _view(now: Sequence[Standing], left: TimeLeft) -> Group:
    running = Table(show_header=False, box=None)
    for each in now:
        if each.state == "running":
            running.add_row(each.trial.name, _how_far(each))
    return Group(scores(now), f"{summary(now)} {left(now)}", running)


def _how_far(each: Standing) -> str:
    """In words: "4,000 of 8,000 frames, score 31.0"."""
    if not each.frames:
        return "being prepared" if each.state == "running" else "nothing collected yet"
    score = "" if each.score is None else f", score {each.score:.1f}"
    return f"{each.frames:,} of {each.trial.config.budget_frames:,} frames{score}"


def _cell(those: Sequence[Standing]) -> str:
    done = [each.score for each in those if each.state == "done" and each.score is not None]
    if not those:
        return ""
    failed = any(each.state == "failed" for each in those)
    mean = f"{np.mean(done):.1f} " if done else ""
    return f"{mean}{len(done)}/{len(those)}{' failed' if failed else ''}"


def _last_logged(log: Path) -> tuple[int, float | None]:
    """Frames and score in the last rows of a run's log."""
    frames, score = 0, None
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in lines:
        try:
            row = json.loads(line)
            frames, score = int(row["frames"]), row.get("eval/score", score)
        except (ValueError, KeyError, TypeError):
            continue  # torn, at either end
    return frames, score
