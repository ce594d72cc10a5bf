"""What trials of a suite say about the method: pure, results in, numbers out. Whatever is not there yet is left out.

A trial is a result of `gsa suite run`, as plain data, with what `benchmarks.sample_efficiency` adds: "retrieval", the
precision of what it rehearsed, "shift", how far that is from what it met, and "model_error", how well its world model
fits what it met, its body's part of the pool and an expert. Scores are normalised by the suite's scales; 1 is the
expert on Meta-World, and the highest return there can be on DMControl. A trial that was run again is compared with the
first ones, and enters nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploy.suite_config import Scale, SuiteConfig
from reports import statistics

Trial = Mapping[str, Any]
Runs = dict[str, dict[str, list[float]]]  # method → task → a number for each seed

PAPER_GAIN = 1.028  # of gsa over scratch, at 150k frames
ORDER = ("scratch", "naive", "rehearsal", "gsa")  # of the paper's ablation, the lowest first
SCRATCH = (0.15, 0.5)  # a gain over nothing says nothing; over much there is little to gain
MEASURES = ("score", "return")
LARGER = "larger-budget"  # the variant under which scratch may catch up
PARTS = 5  # of a run, that guided steps are counted in


def analyse(trials: Sequence[Trial], suite: SuiteConfig, repeated: Sequence[Trial] = ()) -> dict[str, Any]:
    """All of the page's numbers. `repeated` are trials of the plan that were run again, in another folder."""
    main = comparable([t for t in trials if not t["variant"] and t["method"] in suite.methods])
    return {
        "trials": len(trials),
        "seeds": {task: sorted({t["seed"] for t in main if t["task"] == task}) for task in _in(main, "task")},
        "measures": {measure: _measure(main, suite, measure) for measure in MEASURES} if main else {},
        "whole_run": {measure: _measure(main, suite, measure, True) for measure in MEASURES} if main else {},
        "curves": {task: curves(_of(main, task=task), _scale(suite, task)) for task in _in(main, "task")},
        "frames_to_scratch": {task: frames_to_scratch(_of(main, task=task)) for task in _in(main, "task")},
        "guided_share": guided_share(trials),
        "retrieval": _first(trials, "retrieval", ("rehearsal", "gsa", "random-rehearsal")),
        "shift": {task: shift(_of(trials, task=task, variant="")) for task in _in(trials, "task")},
        "model_error": {task: model_error(_of(trials, task=task, variant="")) for task in _in(trials, "task")},
        "others": others(trials, suite),
        "sensitivity": sensitivity(trials, suite),
        "larger_budget": larger_budget(trials, suite),
        "again": again(trials, repeated, suite),
        "processors": sorted({t["machine"]["processor"] for t in trials}),
        "hours": sum(t["seconds"] for t in trials) / 3600,
    }


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of those seeds of a task for which every method that has begun is done: the same for all of them."""
    methods = set(_in(trials, "method"))
    done = {(t["task"], t["seed"], t["method"]) for t in trials}
    return [t for t in trials if all((t["task"], t["seed"], method) in done for method in methods)]


def runs_of(trials: Sequence[Trial], suite: SuiteConfig, measure: str, whole: bool = False) -> Runs:
    """The normalised results by method and task, in the order of the seeds: final ones, or means over the evaluations
    of the `whole` run, of those that have any."""
    found: Runs = {}
    for t in sorted(trials, key=lambda t: t["seed"]):
        if whole and not t["curve"]:
            continue
        result = float(np.mean([row[measure] for row in _curve(t)])) if whole else t[measure]
        value = normalised(result, measure, _scale(suite, t["task"]))
        found.setdefault(t["method"], {}).setdefault(t["task"], []).append(value)
    return found


def normalised(value: float, measure: str, scale: Scale) -> float:
    """A score or a return on the task's scale."""
    low, high = scale.score if measure == "score" else scale.returns or scale.score
    return float(statistics.normalised(value, low, high))


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Relative gain and probability of improvement, each with its stratified bootstrap interval."""
    return {
        "gain": _estimate(statistics.relative_gain, ours, theirs),
        "better": _estimate(statistics.probability_of_improvement, ours, theirs),
    }


def curves(trials: Sequence[Trial], scale: Scale) -> dict[str, dict[str, list[float]]]:
    """Method → frames and the mean over seeds of what evaluations gave there, normalised; the last is the final one."""
    found = {}
    for method in _in(trials, "method"):
        own = [_curve(t) for t in _of(trials, method=method) if t["curve"]]
        if not own:
            continue
        frames = sorted({row["frames"] for row in own[0]})
        values = {}
        for measure in MEASURES:
            on = [statistics.curve_on(frames, *_xy(curve, measure)) for curve in own]
            values[measure] = [normalised(v, measure, scale) for v in np.mean(on, 0)]
        found[method] = {"frames": frames, **values}
    return found


def frames_to_scratch(trials: Sequence[Trial]) -> dict[str, Any]:
    """When each method's mean curve is first at the mean of scratch's final results; None: not in the run.

    By return, in which every episode counts: scores of few episodes come in large steps.
    """
    final = [t["return"] for t in _of(trials, method="scratch")]
    if not final:
        return {}
    target = float(np.mean(final))
    found: dict[str, Any] = {}
    for method, curve in curves(trials, Scale(returns=(0.0, 1.0))).items():
        found[method] = statistics.frames_to_reach(curve["frames"], curve["return"], target)
    return {"return": target, "frames": found}


def guided_share(trials: Sequence[Trial]) -> dict[str, list[float]]:
    """Task and method → the mean share of steps that the prior took, in each fifth of the budget."""
    found: dict[str, list[float]] = {}
    for method in ("gsa", "jsrl"):
        for task in _in(_of(trials, method=method, variant=""), "task"):
            own = _of(trials, method=method, task=task, variant="")
            parts: list[list[float]] = [[] for _ in range(PARTS)]
            for t in own:
                for row in t["episodes"]:
                    at = min(PARTS - 1, int(PARTS * (row["frames"] - 1) / t["frames"]))
                    parts[at].append(row.get("guided_share", 0.0))
            found[f"{task} {method}"] = [float(np.mean(part)) if part else 0.0 for part in parts]
    return found


def shift(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The distances from each place to each set, and their share of the whole pool's, as means over the runs."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for t in trials:
        for row in t.get("shift", ()):
            found.setdefault((row["from"], row["to"]), []).append(row)
    return [
        {
            "from": place, "to": to, "runs": len(rows), "distance": np.mean([r["distance"] for r in rows], 0).tolist(),
            "of_the_pools": float(np.mean([r["of_the_pools"] for r in rows])),
        }
        for (place, to), rows in found.items()
    ]  # fmt: skip


def model_error(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Method, or "pre-trained", → its runs and on each of the three [squared error, KL in nats], means over the runs.

    The pre-trained model's on what was met is that on what these runs met, whose methods differ.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for t in trials:
        for row in t.get("model_error", ()):
            name = t["method"] if row["model"] == "final" else row["model"]
            found.setdefault(name, {}).setdefault(row["on"], []).append([row["recon"], row["kl"]])
    return {
        name: {"runs": max(map(len, of.values())), **{on: np.mean(rows, 0).tolist() for on, rows in of.items()}}
        for name, of in found.items()
    }


def others(trials: Sequence[Trial], suite: SuiteConfig) -> dict[str, Any]:
    """Methods that only some tasks have (jsrl), beside gsa on the same tasks and seeds."""
    found = {}
    plain = _of(trials, variant="")
    for method in [m for m in _in(plain, "method") if m not in suite.methods]:
        tasks = _in(_of(plain, method=method), "task")
        both = comparable([t for t in plain if t["task"] in tasks and t["method"] in (method, "gsa")])
        if len(_in(both, "method")) == 2:
            found[method] = {m: runs_of(both, suite, m) for m in MEASURES}
    return found


def sensitivity(trials: Sequence[Trial], suite: SuiteConfig) -> dict[str, Any]:
    """Variant → its results, and those of the same method, task and seeds under the suite's own settings."""
    found = {}
    for variant in [v for v in _in(trials, "variant") if v and v != LARGER]:
        own = _of(trials, variant=variant)
        keys = {(t["task"], t["method"], t["seed"]) for t in own}
        base = [t for t in _of(trials, variant="") if (t["task"], t["method"], t["seed"]) in keys]
        task, method = own[0]["task"], own[0]["method"]
        found[variant] = {
            "task": task,
            **{m: runs_of(own, suite, m)[method][task] for m in MEASURES},
            **{f"default_{m}": runs_of(base, suite, m).get(method, {}).get(task, []) for m in MEASURES},
        }
    return found


def larger_budget(trials: Sequence[Trial], suite: SuiteConfig) -> dict[str, Any]:
    """The curves and final results of the methods at the larger budget, and when scratch catches up: is first at the
    mean return that gsa, with the same seeds, ended with at the suite's own budget (None: not in the run)."""
    own = comparable(_of(trials, variant=LARGER))
    if not own:
        return {}
    task, seeds = own[0]["task"], {t["seed"] for t in own}
    of = curves(own, _scale(suite, task))
    found: dict[str, Any] = {
        "task": task,
        "frames": own[0]["frames"],
        "curves": of,
        "final": {measure: runs_of(own, suite, measure) for measure in MEASURES},
        "whole_run": {measure: runs_of(own, suite, measure, True) for measure in MEASURES},
    }
    base = runs_of([t for t in _of(trials, variant="", task=task, method="gsa") if t["seed"] in seeds], suite, "return")
    if base and "scratch" in of:
        target = float(np.mean(base["gsa"][task]))
        frames = statistics.frames_to_reach(of["scratch"]["frames"], of["scratch"]["return"], target)
        found["catches_up"] = {"return": target, "frames": frames}
    return found


def again(trials: Sequence[Trial], repeated: Sequence[Trial], suite: SuiteConfig) -> list[dict[str, Any]]:
    """For each task and method of which trials were run again, by score and return, at the end and over the whole run:
    their results, those of the first trials with the same seeds, the interval of the mean over all first trials, and
    whether the mean of the repeated ones is inside. Also the seeds that ran on the same kind of processor both times,
    and those that came out equal in every episode."""
    found = []
    for task, method in dict.fromkeys((t["task"], t["method"]) for t in _of(repeated, variant="")):
        new = sorted(_of(repeated, task=task, method=method, variant=""), key=lambda t: t["seed"])
        first = _of(trials, task=task, method=method, variant="")
        seeds = [t["seed"] for t in new]
        same = [t for t in first if t["seed"] in seeds]
        pairs = [(a, b) for a in new for b in same if a["seed"] == b["seed"]]
        about = {
            "task": task,
            "method": method,
            "seeds": seeds,
            "same_processor": [a["seed"] for a, b in pairs if a["machine"]["processor"] == b["machine"]["processor"]],
            "equal": [a["seed"] for a, b in pairs if all(a[k] == b[k] for k in (*MEASURES, "episodes", "curve"))],
        }
        for whole, measure in itertools.product((False, True), MEASURES):
            values, of_same, of_first = (
                runs_of(those, suite, measure, whole).get(method, {}).get(task, []) for those in (new, same, first)
            )
            if not values:  # the prior alone has no curve
                continue
            low, high = statistics.interval(statistics.mean, {task: of_first}) if of_first else (math.nan, math.nan)
            found.append({
                **about, "measure": measure, "whole_run": whole,
                "again": values, "first": of_same, "interval": [_finite(low), _finite(high)],
                "inside": low <= float(np.mean(values)) <= high,
            })  # fmt: skip
    return found


def goals(found: Mapping[str, Any], planned: int) -> dict[str, dict[str, Any]]:
    """What is claimed, and whether it holds, on score: success on Meta-World, return on DMControl."""
    score = found["measures"].get("score", {})
    means = {method: row["mean"]["value"] for method, row in score.get("aggregate", {}).items()}
    gain = score.get("gsa over scratch", {}).get("gain", {}).get("value")
    row = [means.get(method) for method in ORDER]
    rising = all(a is not None and b is not None and a < b for a, b in itertools.pairwise(row))
    again = [row for row in found["again"] if row["measure"] == "score" and not row["whole_run"]]
    scratch, random, nearest = (means.get(m) for m in ("scratch", "random-rehearsal", "rehearsal"))
    return {
        "gain of gsa over scratch": _goal(gain, f">= {PAPER_GAIN}", gain is not None and gain >= PAPER_GAIN),
        "order": _goal(row, " < ".join(ORDER), rising),
        "random control": _goal(
            [random, nearest], "random-rehearsal < rehearsal",
            random is not None and nearest is not None and random < nearest,
        ),
        "scratch": _goal(
            scratch, f"{SCRATCH[0]} to {SCRATCH[1]}", scratch is not None and SCRATCH[0] <= scratch <= SCRATCH[1]
        ),
        "trials": _goal(found["trials"], f">= {planned}", found["trials"] >= planned),
        "run again": _goal(
            [float(np.mean(row["again"])) for row in again] or None, "inside the interval of the first trials",
            bool(again) and all(row["inside"] for row in again),
        ),
    }  # fmt: skip


def _measure(trials: Sequence[Trial], suite: SuiteConfig, measure: str, whole: bool = False) -> dict[str, Any]:
    runs = runs_of(trials, suite, measure, whole)
    found: dict[str, Any] = {
        "runs": runs,
        "aggregate": {
            method: {"mean": _estimate(statistics.mean, of), "iqm": _estimate(statistics.iqm, of)}
            for method, of in runs.items()
        },
    }
    for ours, theirs in [("gsa", m) for m in runs if m != "gsa"] + [("rehearsal", "random-rehearsal")]:
        if ours in runs and theirs in runs:
            found[f"{ours} over {theirs}"] = compare(runs[ours], runs[theirs])
    return found


def _estimate(statistic: Any, *groups: Mapping[str, Any]) -> dict[str, Any]:
    low, high = statistics.interval(statistic, *groups)
    return {"value": _finite(statistics.value(statistic, *groups)), "low": _finite(low), "high": _finite(high)}


def _goal(value: Any, goal: str, holds: bool) -> dict[str, Any]:
    return {"value": value, "goal": goal, "holds": bool(holds)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _scale(suite: SuiteConfig, task: str) -> Scale:
    return suite.scale.get(task, Scale())


def _curve(trial: Trial) -> list[dict[str, Any]]:
    """The evaluations in the run, and the final one, of more episodes, at its end."""
    end = trial["frames"]
    before = [{k: row[k] for k in ("frames", *MEASURES)} for row in trial["curve"] if row["frames"] < end]
    return [*before, {k: trial[k] for k in ("frames", *MEASURES)}]


def _xy(curve: Sequence[Mapping[str, Any]], measure: str) -> tuple[list[float], list[float]]:
    rows = sorted(curve, key=lambda row: row["frames"])
    return [row["frames"] for row in rows], [row[measure] for row in rows]


def _in(trials: Sequence[Trial], key: str) -> list[str]:
    return list(dict.fromkeys(t[key] for t in trials))


def _of(trials: Sequence[Trial], **wanted: Any) -> list[Trial]:
    return [t for t in trials if all(t[key] == value for key, value in wanted.items())]


def _first(trials: Sequence[Trial], key: str, methods: Sequence[str]) -> dict[str, Any]:
    """Task and method → what the first such trial has under `key`: it is the same for all seeds."""
    found: dict[str, Any] = {}
    for t in _of(trials, variant=""):
        if t["method"] in methods and t.get(key):
            found.setdefault(f"{t['task']} {t['method']}", t[key])
    return found
