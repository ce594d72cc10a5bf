"""Flat metrics, `part/metric` → float: what every part counts and what a run writes down."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import Unavailable

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
    after the first `resume_rows`, and in TensorBoard too, so that a resumed run writes each row once. Nothing is
    buffered: what `write` returned from outlives this process.
    """

    def __init__(self, folder: str | Path, resume_frames: int | None = None, resume_rows: int | None = None) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, purge = 0, None
        if self.path.exists():
            rows = [r for r in read_log(folder)[:resume_rows] if resume_frames is None or r["frames"] <= resume_frames]
            self.rows = len(rows)
            if resume_frames is not None or resume_rows is not None:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
                os.replace(temporary, self.path)
                purge = rows[-1]["frames"] + 1 if rows else 0
        self._file = self.path.open("ab", buffering=0)
        self._board = Board(self.path.parent / "tensorboard", purge)

    def write(self, frames: int, values: Mapping[str, float]) -> None:
        """One row. A value that is not finite is kept as null in the file and left out of TensorBoard. Raises
        Unavailable where the disk refuses; without TensorBoard's file the run goes on."""
        numbers = {k: _finite(v) for k, v in values.items()}
        row = {"frames": int(frames), "time_s": round(time.time(), 3), **numbers}
        line = json.dumps(row).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Unavailable(f"Cannot write the log {self.path}: {error.strerror}. Free some space.") from error
        self.rows += 1
        self._board.write(int(frames), {k: v for k, v in numbers.items() if v is not None})

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Board:
    """A folder's TensorBoard events, written and flushed by whoever calls, a row an event.

    tensorboardX's SummaryWriter does it in a thread, which ends without a word where the disk is full or the clock is
    set back by weeks; from then on it blocks its caller.
    """

    def __init__(self, folder: Path, purge: int | None) -> None:
        """`purge`: events of earlier files from this step on are void; None: none are."""
        self._folder, self._purge = folder, purge
        self._file: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """What cannot be written is left out; once there is room again a new file goes on."""
        from tensorboardX.proto.event_pb2 import Event  # only where a run is written
        from tensorboardX.proto.summary_pb2 import Summary

        if not values:
            return
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        try:
            file = self._opened()
            file.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            file.flush()
        except OSError:
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _opened(self) -> Any:
        if self._file is None:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._folder.mkdir(exist_ok=True)
            self._file = EventsWriter(str(self._folder / "events"), f".{os.getpid()}-{time.monotonic_ns()}")
            if self._purge is not None:
                started = SessionLog(status=SessionLog.START)
                self._file.write_event(Event(step=self._purge, file_version="brain.Event:2"))
                self._file.write_event(Event(step=self._purge, session_log=started))
                self._purge = None
        return self._file


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
