"""Flat metrics, `part/metric` → float: what every part counts and what a run writes down."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Progress = Callable[[int, int, Mapping[str, float]], None]  # done, total, numbers worth showing


class Meter:
    """What one part counts: totals that only rise, means over what came since the last reading, and rates."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.totals: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._gauges: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._read_at = time.monotonic()

    def count(self, name: str, n: float = 1, rate: bool = False) -> None:
        """Adds to a total; with `rate`, stats() also reports `name_per_s` since the last reading."""
        self.totals[name] = self.totals.get(name, 0) + n
        if rate:
            self._rates[name] = self._rates.get(name, 0) + n

    def mean(self, values: Mapping[str, float]) -> None:
        """Adds observations; stats() reports their mean since the last reading."""
        for name, value in values.items():
            total, n = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value), n + 1)

    def gauge(self, name: str, value: float) -> None:
        """The value as it now stands."""
        self._gauges[name] = float(value)

    def stats(self) -> dict[str, float]:
        """All of it, flat; means and rates start anew."""
        now = time.monotonic()
        elapsed = max(now - self._read_at, 1e-9)
        sums, self._sums = self._sums, {}  # swapped first: another thread may be counting
        rates, self._rates = self._rates, dict.fromkeys(self._rates, 0.0)
        self._read_at = now
        out = {**self.totals, **self._gauges, **{k: s / n for k, (s, n) in sums.items()}}
        out |= {f"{k}_per_s": n / elapsed for k, n in rates.items()}
        return {f"{self.part}/{k}": float(v) for k, v in out.items()}

    def state(self) -> dict[str, Any]:
        """Plain data: what was counted, but for rates."""
        sums = {k: list(v) for k, v in self._sums.items()}
        return {"totals": dict(self.totals), "sums": sums, "gauges": dict(self._gauges)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from `state`."""
        self.totals, self._gauges = dict(state["totals"]), dict(state["gauges"])
        self._sums = {k: (float(total), int(n)) for k, (total, n) in state["sums"].items()}


class RunLog:
    """A run's metrics.jsonl and its TensorBoard twin. Opening a folder that has one continues it.

    A row is {"frames": …, "time_s": …, metric: value}. On opening, rows past `resume_frames` are cut, or those
    after the first `resume_rows`, and in TensorBoard too, so that a resumed run writes each row once.
    """

    def __init__(self, folder: str | Path, resume_frames: int | None = None, resume_rows: int | None = None) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self._purge = 0, None
        if self.path.exists():
            rows = [r for r in read_log(folder)[:resume_rows] if resume_frames is None or r["frames"] <= resume_frames]
            self.rows = len(rows)
            if resume_frames is not None or resume_rows is not None:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
                os.replace(temporary, self.path)
                self._purge = rows[-1]["frames"] + 1 if rows else 0
        self._file = self.path.open("a", buffering=1)
        self._board: Any = None

    def write(self, frames: int, values: Mapping[str, float]) -> None:
        """One row. A value that is not finite is kept as null in the file and left out of TensorBoard."""
        row = {"frames": int(frames), "time_s": round(time.time(), 3)}
        self._file.write(json.dumps({**row, **{k: _finite(v) for k, v in values.items()}}) + "\n")
        self.rows += 1
        for key, value in values.items():
            if math.isfinite(float(value)):
                self._writer().add_scalar(key, float(value), int(frames))

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _writer(self) -> Any:
        if self._board is None:
            from tensorboardX import SummaryWriter  # only where a run is written

            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self._purge)
        return self._board


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a torn last line is left out."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def bootstrap_interval(values: Any, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N]; (nan, nan) for none."""
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
