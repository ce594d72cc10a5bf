"""What a run left behind, read leniently: a missing or damaged part becomes a note, never a failure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gsa.errors import FormatError, UsageError, cause_of
from gsa.metrics import bootstrap_interval, read_log

T = TypeVar("T")
POLICIES = {"random": "random policy", "prior": "prior alone", "finetuned": "fine-tuned policy"}


@dataclass(frozen=True)
class PolicyResult:
    """How one policy did in its final evaluation. An interval is NaN with fewer than two episodes."""

    name: str
    score: float  # mean over episodes, 0…100 but for gym tasks
    interval: tuple[float, float]  # 95 % bootstrap over episodes, of the mean score
    returns: float  # mean over episodes
    episodes: int
    frames: int | None  # environment frames of the task it learned from

    @property
    def label(self) -> str:
        return POLICIES.get(self.name, self.name)


@dataclass(frozen=True)
class Series:
    """One metric over the run: values [N] at frames [N]."""

    frames: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Retrieved:
    """What the run rehearses."""

    kind: str
    embodiment: str
    asked: int
    distances: tuple[float, ...]  # nearest first
    sources: Mapping[str, int]  # source → trajectories, most first
    of_task: float | None = None  # share of them that the sources say is of the task
    chance: float | None = None  # that share in the pool

    @property
    def taken(self) -> int:
        return sum(self.sources.values())


@dataclass(frozen=True)
class RunRecord:
    """A run folder's contents, as far as they are there."""

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    task: str
    policies: Sequence[PolicyResult]
    log: Sequence[Mapping[str, Any]]
    retrieved: Retrieved | None
    stages: Sequence[tuple[str, float]]  # stage, seconds
    faults: Mapping[str, int]  # what failed and was replaced: the first sentence of each cause → how often
    notes: Sequence[str] = field(default_factory=tuple)  # what is missing or unreadable, in sentences

    @property
    def score_ends_at_100(self) -> bool:
        """Whether the task's score is 0…100; a gym task's is its return."""
        return not self.task.startswith("gym/")

    @property
    def frames(self) -> int:
        """Environment frames collected so far."""
        return max((int(row["frames"]) for row in self.log), default=0)

    @property
    def seconds(self) -> float:
        """Wall-clock time from the first row of metrics to the last."""
        times = [float(row["time_s"]) for row in self.log if "time_s" in row]
        return max(times) - min(times) if times else 0.0

    def policy(self, name: str) -> PolicyResult | None:
        return next((p for p in self.policies if p.name == name), None)

    def series(self, metric: str) -> Series:
        """The finite values of a metric, in the order they were written."""
        pairs = [(row["frames"], row[metric]) for row in self.log if _is_number(row.get(metric))]
        frames, values = zip(*pairs, strict=True) if pairs else ((), ())
        return Series(np.asarray(frames, np.float64), np.asarray(values, np.float64))

    def last_values(self) -> dict[str, float]:
        """The last finite value of every metric."""
        values: dict[str, float] = {}
        for row in self.log:
            values |= {k: v for k, v in row.items() if k not in ("frames", "time_s") and _is_number(v)}
        return dict(sorted(values.items()))


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run folder, finished or not. Raises UsageError when nothing in it is a run's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"There is no run folder {folder}.")
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "evaluation.json")):
        raise UsageError(f"{folder} is not a run: it has no config.yaml, metrics.jsonl or evaluation.json.")
    notes: list[str] = []

    def part(name: str, read: Callable[[Path], T], missing: str) -> T | None:
        """One file's contents, or None and a note."""
        if not (folder / name).exists():
            notes.extend([missing] if missing else [])
            return None
        try:
            return read(folder / name)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, FormatError) as error:
            notes.append(f"{name} cannot be read: {error}")
            return None

    log = part("metrics.jsonl", _log, "No metrics yet: the run has not written metrics.jsonl.") or []
    task, policies = part("evaluation.json", _evaluation, "Not evaluated yet: there is no evaluation.json.") or ("", [])
    config, text = part("config.yaml", _config, "No config.yaml: the run's settings are unknown.") or ({}, "")
    retrieved = part("rehearsal.json", _retrieved, "Nothing was retrieved in this run: there is no rehearsal.json.")
    stages = part("stages.json", _stages, "") or []
    faults = part("faults.jsonl", _faults, "") or {}
    found = {p.name for p in policies}
    if policies and (absent := [label for name, label in POLICIES.items() if name not in found]):
        notes.append(f"Not among the evaluated: {', '.join(absent)}.")
    task = task or str(config.get("task", ""))
    return RunRecord(folder, config, text, task, policies, log, retrieved, stages, faults, tuple(notes))


def _log(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(path.parent) if isinstance(row, dict) and _is_number(row.get("frames"))]


def _config(path: Path) -> tuple[dict[str, Any], str]:
    import yaml

    text = path.read_text()
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return (data if isinstance(data, dict) else {}), text


def _evaluation(path: Path) -> tuple[str, list[PolicyResult]]:
    data = json.loads(path.read_text())
    given = data["policies"]
    order = [*(n for n in POLICIES if n in given), *(n for n in given if n not in POLICIES)]
    return str(data.get("task", "")), [_result(name, given[name]) for name in order]


def _result(name: str, data: Mapping[str, Any]) -> PolicyResult:
    scores, returns = np.asarray(data["scores"], np.float64), np.asarray(data["returns"], np.float64)
    if scores.ndim != 1 or returns.shape != scores.shape:
        raise ValueError(f"scores and returns of '{name}' must be lists of one length")
    if not len(scores):
        raise ValueError(f"'{name}' has no episode")
    interval = bootstrap_interval(scores) if len(scores) > 1 else (math.nan, math.nan)
    frames = int(data["frames"]) if _is_number(data.get("frames")) else None
    return PolicyResult(name, float(scores.mean()), interval, float(returns.mean()), len(scores), frames)


def _retrieved(path: Path) -> Retrieved:
    from retrieval.retriever import RehearsalSet  # brings the index's library: only where a run has a rehearsal set

    rehearsal = RehearsalSet.load(path)
    names = [source or "unknown source" for source in rehearsal.sources]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    by_count = dict(sorted(counts.items(), key=lambda item: -item[1]))
    distances = tuple(float(d) for d in rehearsal.distances)
    of_task = rehearsal.precision[-1].task if rehearsal.precision else None
    return Retrieved(
        rehearsal.kind, rehearsal.embodiment, rehearsal.k, distances, by_count, of_task, rehearsal.task_share
    )


def _stages(path: Path) -> list[tuple[str, float]]:
    return [(str(row["stage"]), float(row["seconds"])) for row in json.loads(path.read_text())]


def _faults(path: Path) -> dict[str, int]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sentences = [str(row["fault"]) for row in rows if "back_after_s" not in row]
    first = {cause_of(sentence): sentence for sentence in reversed(sentences)}
    counts = Counter(map(cause_of, sentences))
    return {first[cause]: n for cause, n in counts.most_common()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
