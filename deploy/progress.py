"""Progress bars: rich on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gsa.metrics import Progress as Report

LINE_EVERY_S = 15.0
console = Console(stderr=True, highlight=False)


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """Yields progress(done, total, numbers); shows the rate, what remains and the numbers."""
    if console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )  # fmt: skip
        with Progress(*columns, console=console, refresh_per_second=4) as progress:
            task = progress.add_task(title, total=None, rate="", numbers="")
            start = _Start()

            def report(done: int, total: int, numbers: Mapping[str, float]) -> None:
                progress.update(
                    task,
                    completed=done,
                    total=total,
                    rate=start.rate(done),
                    numbers=_short(numbers),
                    refresh=done >= total,
                )

            yield report
    else:
        yield _Lines(title)


class _Start:
    """Where the counting began: a resumed stage does not begin at nought, and its rate should not pretend so."""

    def __init__(self) -> None:
        self.time, self.done = time.monotonic(), -1

    def rate(self, done: int) -> str:
        if self.done < 0:
            self.time, self.done = time.monotonic(), done
        seconds = time.monotonic() - self.time
        return f"{(done - self.done) / seconds:.1f}/s" if seconds > 0.5 else ""

    def left(self, done: int, total: int) -> str:
        """What remains at the rate so far, as "0:12:30 left"."""
        if done <= self.done or done >= total:
            return ""
        seconds = (time.monotonic() - self.time) / (done - self.done) * (total - done)
        return f"{datetime.timedelta(seconds=round(seconds))} left"


class _Lines:
    """For logs: the first report, one every 15 s, and the last."""

    def __init__(self, title: str) -> None:
        self.title, self.start, self.next, self.finished = title, _Start(), 0.0, False

    def __call__(self, done: int, total: int, numbers: Mapping[str, float]) -> None:
        rate = self.start.rate(done)
        now, last = time.monotonic(), done >= total
        if now < self.next and (not last or self.finished):
            return
        self.next, self.finished = now + LINE_EVERY_S, last
        told = (f"{self.title}: {done}/{total}", rate, self.start.left(done, total), _short(numbers))
        console.print(" ".join(filter(None, told)), soft_wrap=True)


def _short(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
