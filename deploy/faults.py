"""What failed in a run and what was done about it: kept in the run folder, and said aloud."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter, deque
from pathlib import Path

from deploy.progress import console
from deploy.provenance import PACKAGES
from gsa.errors import cause_of

FILE = "faults.jsonl"
REPLACED = "Its episode is dropped; it is replaced and the run goes on."
KEPT = 100  # warnings that nobody has asked for yet


class FaultLog:
    """Owns a run's faults.jsonl: a row a fault, {"frames", "time_s", "who", "fault", "did"}, and one for each part that
    is back, {"frames", "time_s", "who", "back_after_s"}."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._causes: Counter[str] = Counter()
        self._lost: dict[str, float] = {}  # parts of the run that are away, and since when

    @property
    def count(self) -> int:
        return self._causes.total()

    def write(self, frames: int, who: str, fault: str, did: str = REPLACED, aloud: bool = False) -> None:
        """`fault` and `did` are sentences, `who` the part that failed, `frames` what the run had collected. Printed if
        `aloud`, or the first of its cause."""
        self._keep({"frames": frames, "who": who, "fault": fault, "did": did})
        self._causes[cause_of(fault)] += 1
        if aloud or self._causes[cause_of(fault)] == 1:
            console.print(f"{who}: {fault} {did}".rstrip(), soft_wrap=True)

    def lost(self, frames: int, part: str, fault: str, did: str, again: bool = False) -> None:
        """A process of the run is away; told once until it is back, or, if it failed `again` meanwhile, each time."""
        if part not in self._lost or again:
            self._lost.setdefault(part, time.monotonic())
            self.write(frames, part, fault, did, aloud=True)

    def back(self, frames: int, part: str) -> None:
        """A process answers; told if it was away."""
        if part in self._lost:
            seconds = round(time.monotonic() - self._lost.pop(part), 1)
            self._keep({"frames": frames, "who": part, "back_after_s": seconds})
            console.print(f"{part}: back after {seconds:.0f} s.", soft_wrap=True)

    def _keep(self, row: dict[str, object]) -> None:
        with (
            contextlib.suppress(OSError),
            self._path.open("a") as file,
        ):  # where the disk is full it is printed at least
            file.write(json.dumps({**row, "time_s": round(time.time(), 3)}) + "\n")


class Warnings(logging.Handler):
    """What the parts in this process warn of, kept until somebody asks: in a process of Ray's nobody would read it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[str] = deque(maxlen=KEPT)
        for package in PACKAGES:
            logging.getLogger(package).addHandler(self)
            logging.getLogger(package).propagate = False  # to where a library, such as dm_control, prints it once more

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())

    def take(self) -> list[str]:
        """The sentences since the last call."""
        return [self._kept.popleft() for _ in range(len(self._kept))]

    def close(self) -> None:
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(self)
            logging.getLogger(package).propagate = True
        super().close()
