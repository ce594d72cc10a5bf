"""What a suite has found so far, read leniently, and what its methods are to each other: numbers only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gsa.errors import UsageError
from reports import statistics

Measure = Literal["score", "return"]
BASELINE = "scratch"
DEFAULT_SCALE = {"dmc": {"score": (0.0, 100.0), "return": (0.0, 1000.0)}, "metaworld": {"score": (0.0, 100.0)}}


@dataclass(frozen=True)
class Result:
    """One finished trial."""

    task: str
    method: str
    variant: str
    seed: int
    score: float
    returns: float
    frames: int
    seconds: float
    curve: tuple[tuple[float, float], ...]  # frames, score: of the evaluations on the way, and the last one

    @property
    def label(self) -> str:
        """Method and variant."""
        return f"{self.method} {self.variant}".strip()

    def value(self, measure: Measure) -> float:
        return self.score if measure == "score" else self.returns


@dataclass(frozen=True)
class SuiteRecord:
    """The results in a suite's folder."""

    name: str
    results: tuple[Result, ...]
    scales: Mapping[str, Mapping[Measure, tuple[float, float]]]  # task → measure → what counts as 0 and as 1
    failed: Mapping[str, str]  # trial → why
    notes: tuple[str, ...]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(r.task for r in self.results))

    @cached_property
    def labels(self) -> list[str]:
        """Methods, then their variants."""
        order = sorted(self.results, key=lambda r: bool(r.variant))
        return list(dict.fromkeys(r.label for r in order))

    @property
    def methods(self) -> list[str]:
        """Those that are not variants of another: only these are compared over tasks."""
        return list(dict.fromkeys(r.label for r in self.results if not r.variant))

    def of(self, label: str, task: str) -> list[Result]:
        return [r for r in self.results if (r.label, r.task) == (label, task)]

    def values(self, label: str, measure: Measure = "score") -> dict[str, np.ndarray]:
        """task → [R], as they are."""
        found = {task: np.array([r.value(measure) for r in self.of(label, task)]) for task in self.tasks}
        return {task: values for task, values in found.items() if len(values)}

    def normalised(self, label: str, measure: Measure = "score") -> dict[str, np.ndarray]:
        """task → [R], 0 to 1 on the task's scale; tasks without a scale are left out."""
        return {
            task: statistics.normalised(values, *self.scales[task][measure])
            for task, values in self.values(label, measure).items()
            if measure in self.scales.get(task, {})
        }

    def curve(self, label: str, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Frames [N] and the scores of each run there [R, N], straight between a run's evaluations."""
        runs = [r for r in self.of(label, task) if r.curve]
        grid = np.array(sorted({frames for r in runs for frames, _ in r.curve}))
        scores = [statistics.curve_on(grid, *zip(*r.curve, strict=True)) for r in runs]
        whole = ~np.isnan(scores).any(0) if runs else np.zeros(0, bool)
        return grid[whole], np.array(scores)[:, whole] if runs else np.zeros((0, 0))


def read_suite(folder: Path) -> SuiteRecord:
    """Reads a suite's folder, finished or not. A damaged result becomes a note. UsageError where there is none."""
    import yaml

    if not (folder / "suite.yaml").is_file():
        raise UsageError(f"{folder} has no suite in it: it lacks suite.yaml.")
    about = yaml.safe_load((folder / "suite.yaml").read_text())
    results, notes = [], []
    for path in sorted((folder / "results").glob("*.json")):
        try:
            results.append(_result(json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path.name} cannot be read: {error!r}")
    failed = {
        p.stem: str(json.loads(p.read_text()).get("reason")) for p in sorted((folder / "failures").glob("*.json"))
    }
    order = [(str(t), str(m)) for t in about["tasks"] for m in about["methods"]]
    ranks = {pair: at for at, pair in enumerate(order)}
    results.sort(key=lambda r: (ranks.get((r.task, r.method), len(ranks)), r.variant, r.seed))
    scales = {r.task: _scale(r.task, about.get("scale", {}).get(r.task)) for r in results}
    notes += [f"{task} has no scale, and is left out of what is over all tasks." for task, s in scales.items() if not s]
    return SuiteRecord(str(about["name"]), tuple(results), scales, failed, tuple(notes))


def comparison(record: SuiteRecord) -> dict[str, Any]:
    """What the report says, as plain data: per task and method, over all tasks, against learning from scratch."""
    measures: tuple[Measure, ...] = ("score", "return")
    return {
        "suite": record.name,
        "per_task": {task: {label: _on_task(record, label, task) for label in record.labels if record.of(label, task)}
                     for task in record.tasks},
        "aggregate": {measure: _aggregates(record, measure) for measure in measures},
        "trials": len(record.results), "failed": dict(record.failed),
        "hours": round(sum(r.seconds for r in record.results) / 3600, 2), "notes": list(record.notes),
    }  # fmt: skip


def estimate(statistic: Callable[..., Any], *groups: statistics.Scores) -> dict[str, float | None]:
    """A statistic with its 95 % interval, as plain data: null where there is none."""
    low, high = statistics.interval(statistic, *groups)
    return {"value": _finite(statistics.value(statistic, *groups)), "low": _finite(low), "high": _finite(high)}


def _on_task(record: SuiteRecord, label: str, task: str) -> dict[str, Any]:
    runs = record.of(label, task)
    scores, returns = {task: np.array([r.score for r in runs])}, {task: np.array([r.returns for r in runs])}
    return {
        "score": estimate(statistics.mean, scores), "return": estimate(statistics.mean, returns),
        "scores": scores[task].tolist(), "returns": returns[task].tolist(), "seeds": [r.seed for r in runs],
        "frames_to_scratch": _frames_to_baseline(record, label, task),
    }  # fmt: skip


def _frames_to_baseline(record: SuiteRecord, label: str, task: str) -> float | None:
    """Frames after which the mean curve is where that of scratch ends; None where it never is."""
    base = record.of(BASELINE, task)
    frames, scores = record.curve(label, task)
    if not base or not len(frames):
        return None
    return statistics.frames_to_reach(frames.tolist(), scores.mean(0).tolist(), float(np.mean([r.score for r in base])))


def _aggregates(record: SuiteRecord, measure: Measure) -> dict[str, Any]:
    """Method → aggregates over its tasks, and against scratch over the tasks of both."""
    base = record.normalised(BASELINE, measure)
    found = {}
    for label in record.methods:
        ours = record.normalised(label, measure)
        if not ours:
            continue
        row: dict[str, Any] = {"tasks": len(ours), "runs": sum(map(len, ours.values()))}
        row |= {"mean": estimate(statistics.mean, ours), "iqm": estimate(statistics.iqm, ours)}
        both = [task for task in ours if task in base]
        if label != BASELINE and both:
            pair = {t: ours[t] for t in both}, {t: base[t] for t in both}
            row |= {
                "tasks_with_scratch": len(both),
                "gain_over_scratch": estimate(statistics.relative_gain, *pair),
                "probability_of_improvement": estimate(statistics.probability_of_improvement, *pair),
            }
        found[label] = row
    return found


def _result(data: Mapping[str, Any]) -> Result:
    curve = [(float(row["frames"]), float(row["score"])) for row in data["curve"] if row.get("score") is not None]
    last, score = float(data["frames"]), float(data["score"])
    if data["method"] != "prior":  # the last evaluation has the most episodes: it stands at the end of the curve
        curve = [point for point in curve if point[0] < last] + [(last, score)]
    return Result(
        str(data["task"]), str(data["method"]), str(data["variant"]), int(data["seed"]), score, float(data["return"]),
        int(last), float(data["seconds"]), tuple(curve),
    )  # fmt: skip


def _scale(task: str, given: Mapping[str, Sequence[float]] | None) -> dict[Measure, tuple[float, float]]:
    scale: dict[Any, Any] = dict(DEFAULT_SCALE.get(task.split("/")[0], {}))
    for measure, key in (("score", "score"), ("return", "returns")):
        if given and given.get(key):
            scale[measure] = tuple(map(float, given[key]))
    return scale


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
