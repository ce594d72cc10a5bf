"""Another store as a source: its trajectories keep their ids, rewards, controllers and stats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gsa.errors import UsageError
from retrieval.formats.source import Entry, Loaded, Options, stored_bytes
from retrieval.scales import Scales
from retrieval.store import TrajectoryStore


class StoreSource:
    """The readable trajectories of a store."""

    notes: Sequence[str] = ()

    def __init__(self, path: Path, options: Options) -> None:
        if replace(options, drop_rewards=False) != Options():
            raise UsageError("A store is taken as it is: of the options only --drop-rewards can be given.")
        self._path, self._options = path, options
        self._store = TrajectoryStore.open(path)
        self._rows = self._store.rows().tolist()
        self._scales = Scales(path)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self._path} row {self._rows[index]}"

    def entry(self, index: int) -> Entry:
        row = self._rows[index]
        size = stored_bytes(self._store.spec(row), int(self._store.catalog.length[row]))
        return Entry(self.name(index), self._store.catalog.id(row), size)

    def load(self, index: int) -> Loaded:
        row = self._rows[index]
        trajectory = self._store.read(row)
        if self._options.drop_rewards:
            trajectory = replace(trajectory, reward=None)
        return Loaded(trajectory, self._store.spec(row), bounds=self._scales.of(trajectory.embodiment))

    def close(self) -> None:
        self._store.close()
