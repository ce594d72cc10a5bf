"""Comparing methods over several tasks and few seeds: aggregates, stratified bootstrap intervals, probability of
improvement, after "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (Agarwal et al., 2021).

Scores are {task: [R]}, a number for each run (seed); tasks may have unlike numbers of runs. Every statistic takes the
runs of each task as an array [..., R] and works on the last axis, so that a bootstrap is one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gsa.errors import UsageError

Scores = Mapping[str, ArrayLike]  # task → [R]
Runs = Mapping[str, np.ndarray]  # task → [..., R] float64
LEVEL, DRAWS = 0.95, 2_000
TRIMMED = 0.25  # of the runs at either end, by the interquartile mean


def normalised(score: ArrayLike, low: float, high: float) -> np.ndarray:
    """`score` with `low` as 0 and `high` as 1, not clipped: what is below chance or above the expert shows as such."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        raise UsageError(f"Scores are normalised between a lower and a higher number, not {low} and {high}.")
    return (np.asarray(score, np.float64) - low) / (high - low)


def mean(runs: Runs) -> np.ndarray:
    """The mean over tasks of each task's mean: every task weighs the same, however many runs it has."""
    return np.mean([values.mean(-1) for values in runs.values()], 0)


def iqm(runs: Runs) -> np.ndarray:
    """The interquartile mean of all runs of all tasks: the mean without the lowest and the highest quarter."""
    values = np.sort(np.concatenate(list(runs.values()), -1), -1)
    cut = int(TRIMMED * values.shape[-1])
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def probability_of_improvement(ours: Runs, theirs: Runs) -> np.ndarray:
    """How likely a run of ours beats one of theirs on a task drawn at random; a tie counts one half."""
    return np.mean([_beats(ours[task], theirs[task]) for task in _shared(ours, theirs)], 0)


def relative_gain(ours: Runs, theirs: Runs) -> np.ndarray:
    """By how much the aggregate mean of ours is above that of theirs: 1 is twice as good. NaN where theirs is not
    above 0, for then there is nothing to be better than."""
    tasks = _shared(ours, theirs)
    base = mean({task: theirs[task] for task in tasks})
    gain = mean({task: ours[task] for task in tasks}) / np.where(base > 0, base, np.nan) - 1
    return np.asarray(gain)


def value(statistic: Callable[..., Any], *groups: Scores) -> float:
    """The statistic of the scores as they are. UsageError where a group has no run."""
    return float(statistic(*map(_runs, groups)))


def interval(
    statistic: Callable[..., Any], *groups: Scores, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the stratified bootstrap: within each task, and each group, runs are drawn anew.

    (nan, nan) where a task has a single run, which no drawing could vary: an interval would be too narrow, not short.
    """
    rng, given = np.random.default_rng(seed), [_runs(group) for group in groups]
    if any(len(values) < 2 for runs in given for values in runs.values()):
        return math.nan, math.nan
    drawn = [{task: _drawn(values, draws, rng) for task, values in runs.items()} for runs in given]
    low, high = np.quantile(statistic(*drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def frames_to_reach(frames: Sequence[float], scores: Sequence[float], target: float) -> float | None:
    """Where a learning curve, drawn straight between its points, first is at `target`; None where it never is."""
    x, y = np.asarray(frames, np.float64), np.asarray(scores, np.float64)
    above = np.flatnonzero(y >= target)
    if not len(above):
        return None
    at = int(above[0])
    if at == 0:
        return float(x[0])
    share = (target - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + share * (x[at] - x[at - 1]))


def curve_on(grid: ArrayLike, frames: Sequence[float], scores: Sequence[float]) -> np.ndarray:
    """A learning curve at the frames of `grid`, straight between its points; NaN before the first, after the last."""
    x = np.asarray(grid, np.float64)
    return np.interp(x, frames, scores, left=math.nan, right=math.nan) if len(frames) else np.full(len(x), np.nan)


def _runs(scores: Scores) -> dict[str, np.ndarray]:
    runs = {task: np.asarray(values, np.float64) for task, values in scores.items()}
    if not runs or not all(values.ndim == 1 and len(values) for values in runs.values()):
        raise UsageError("There is nothing to compare: each task needs at least one run.")
    return runs


def _drawn(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    return values[rng.integers(len(values), size=(draws, len(values)))]


def _beats(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[..., R] and [..., S] → [...]: the share of the pairs that ours wins (the Mann-Whitney U over its largest)."""
    difference = ours[..., :, None] - theirs[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-2, -1))


def _shared(ours: Runs, theirs: Runs) -> list[str]:
    """The tasks of both. UsageError if there is none."""
    if not (tasks := [task for task in ours if task in theirs]):
        raise UsageError("The two methods have no task in common.")
    return tasks
