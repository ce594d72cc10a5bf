"""From which bounds the actions of a store's embodiments were scaled, in `ingested.jsonl`: a line an ingestion."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gsa.errors import UsageError
from retrieval.formats.source import Bounds

LOG = "ingested.jsonl"


class Scales:
    """For one robot always the same bounds. Actions that came as they are, in [-1, 1], go with any."""

    def __init__(self, store: Path) -> None:
        self._path = store / LOG
        self._known: dict[str, Bounds] = {}
        self._used: dict[str, Bounds] = {}
        for line in self._path.read_text(errors="replace").splitlines() if self._path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, UsageError):  # a torn line
                for embodiment, told in json.loads(line)["actions"].items():
                    bounds = Bounds(tuple(told["low"]), tuple(told["high"]), str(told["origin"]))
                    self._known.setdefault(embodiment, bounds)

    def of(self, embodiment: str) -> Bounds | None:
        return self._known.get(embodiment)

    def require(self, embodiment: str, bounds: Bounds | None) -> None:
        """UsageError if the store's actions of that embodiment were scaled from other bounds."""
        if bounds is None:
            return
        known = self._known.setdefault(embodiment, bounds)
        if (known.low, known.high) != (bounds.low, bounds.high):
            raise UsageError(
                f"The actions of {embodiment} in {self._path.parent} were scaled from {known}; these would be from "
                f"{bounds}. Give the same --action-low and --action-high, or another --embodiment."
            )
        self._used[embodiment] = bounds

    def log(self, what: Mapping[str, Any]) -> None:
        """Adds a line: what was done, and from which bounds the actions in it were scaled."""
        actions = {name: asdict(bounds) for name, bounds in self._used.items()}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._path.open("a") as file:
            file.write(json.dumps({"time": now, **what, "actions": actions}) + "\n")
