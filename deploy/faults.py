"""What failed in a run and was replaced: counted, kept in the run folder, and the first of each cause said aloud."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from deploy.progress import console
from gsa.errors import cause_of

FILE = "faults.jsonl"


class FaultLog:
    """Owns a run's faults.jsonl: a row a fault, {"frames", "time_s", "who", "fault"}."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._causes: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self._causes.total()

    def write(self, frames: int, who: str, fault: str) -> None:
        """`fault` is a sentence, `who` the worker it happened in, `frames` what the run had collected."""
        row = {"frames": frames, "time_s": round(time.time(), 3), "who": who, "fault": fault}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._causes[cause_of(fault)] += 1
        if self._causes[cause_of(fault)] == 1:
            console.print(f"{who}: {fault} Its episode is dropped; it is replaced and the run goes on.", soft_wrap=True)
