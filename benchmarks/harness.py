"""What every benchmark shares: interleaved timing, the machine it ran on, goals, the line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploy.provenance import surroundings

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None, numbers: Mapping[str, float] | None = None) -> argparse.Namespace:
    """`--quick` for a run of seconds; `--save` keeps the result in benchmarks/results. `numbers`: flags of the
    benchmark's own and their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that it works")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    for flag, default in (numbers or {}).items():
        parser.add_argument(flag, type=float, default=default)
    return parser.parse_args()


def interleaved(
    rivals: Mapping[str, Callable[[], object]], rounds: int, settle_s: float = 0.0,
    clean: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each rival in each round, in turns, so that the machine's moods fall on all. Round 0 is left out.

    After each turn `clean` is called, and `settle_s` pass, for rivals whose processes work on in the background.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, call in rivals.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            clean()
            time.sleep(settle_s)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of theirs / ours: how many times faster we are."""
    return float(np.median(np.asarray(theirs) / np.asarray(ours)))


def at_least(value: float, goal: float) -> dict[str, Any]:
    return {"value": round(value, 3), "goal": f">= {goal}", "holds": bool(value >= goal)}


def at_most(value: float, goal: float) -> dict[str, Any]:
    return {"value": round(value, 3), "goal": f"<= {goal}", "holds": bool(value <= goal)}


def finish(
    name: str, result: Mapping[str, Any], goals: Mapping[str, Mapping[str, Any]], options: argparse.Namespace
) -> int:
    """Prints the result as the last line; keeps it if asked to. Returns the exit code: 1 if a goal does not hold."""
    report = {
        "benchmark": name,
        "quick": options.quick,
        **surroundings(),
        "result": dict(result),
        "goals": dict(goals),
    }
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if all(goal["holds"] for goal in goals.values()) else 1
