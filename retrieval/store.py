"""The trajectory store: a folder of trajectories in Arrow files that many processes read and one appends to.

    store.json      format version, id, codec, specs of the embodiments
    catalog.log     a line a trajectory (see log.py); catalog.snapshot: its columns (see catalog.py)
    shards/         Arrow IPC files of one embodiment each (see shard.py)
    writer.lock     held by the process that writes

A trajectory is written to its shard, synced, then entered in the catalog, synced: whoever sees it sees it whole.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gsa.errors import FormatError, GsaError, UsageError, unknown
from gsa.metrics import Progress
from gsa.schema import Spec, Trajectory
from retrieval import recovery, shard
from retrieval.catalog import Catalog
from retrieval.files import WriterLock, sync_folder
from retrieval.layout import Layout, has_column
from retrieval.manifest import Manifest
from retrieval.writer import Writer

MAX_MAPS = 512  # shards mapped at a time: each holds a file descriptor, of which 1024 are usual
MAX_PLACES = 4096  # trajectories of which it is kept at hand where they are, half a kilobyte each


class _Place(NamedTuple):
    """Where a trajectory is, and what it has."""

    shard: int
    layout: Layout
    steps: int
    has: int  # its optional arrays, as bits
    extent: shard.Extent


class TrajectoryStore:
    """Trajectories on disk, by row. Rows are numbered in order of arrival and never move.

    Any thread may call any method. Made by `create` and `open`; close it, or use it as a context manager.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self.recovery: list[str] = []  # what opening found lost, dropped or had back, a sentence each
        self._mutex = threading.RLock()
        self._maps: dict[int, mmap.mmap] = {}  # by shard
        self._places: dict[int, _Place] = {}  # by row
        self._groups = threading.local()  # .depth: open `batch` blocks of a thread
        self._manifest = Manifest.load(path)  # before the lock: there may be no store
        self._lock = WriterLock(path) if write else None
        self._writer: Writer | None = None
        try:
            self._load()
            if write:
                self._writer = Writer(path, self._manifest, self._catalog, self._log)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    @classmethod
    def create(cls, path: str | Path, codec: str = "none") -> TrajectoryStore:
        """A new, empty, writable store. `codec`: "none" (fastest), "lz4", "zstd" (smallest). UsageError if there
        is one already."""
        path, manifest = Path(path), Manifest.new(codec)
        if Manifest.exists(path):
            raise UsageError(f"There is a store at {path} already; open it for writing, or choose another folder.")
        (path / "shards").mkdir(parents=True, exist_ok=True)
        lock = WriterLock(path)
        try:
            if Manifest.exists(path):
                raise UsageError(f"Another process has just made a store at {path}; open it for writing.")
            (path / recovery.LOG).touch()
            manifest.save(path)  # last: what has a store.json is a store
            sync_folder(path.parent)
        finally:
            lock.release()
        return cls(path, write=True)

    @classmethod
    def open(cls, path: str | Path, write: bool = False) -> TrajectoryStore:
        """An existing store. With `write` it is repaired first, and no other process may write to it meanwhile.

        Raises UsageError (no store there, another writer), FormatError (another format version, damage).
        """
        return cls(Path(path), write)

    @property
    def id(self) -> str:
        """Unique, kept for the store's life."""
        return self._manifest.id

    @property
    def codec(self) -> str:
        return self._manifest.codec

    @property
    def specs(self) -> dict[str, Spec]:
        """Embodiment → spec."""
        return dict(self._manifest.specs)

    @property
    def catalog(self) -> Catalog:
        """What is known of every row without reading it."""
        return self._catalog

    @property
    def writable(self) -> bool:
        return self._writer is not None

    @property
    def steps(self) -> int:
        """Agent steps of all readable trajectories."""
        return int(self._catalog.length[self.rows()].sum(dtype=np.int64))

    @property
    def frames(self) -> int:
        """Simulator frames of all readable trajectories."""
        return sum(entry["steps"] * self.specs[name].action_repeat for name, entry in self.info().items())

    def __len__(self) -> int:
        """Rows, lost ones among them: the next trajectory gets this number."""
        return len(self._catalog)

    def __enter__(self) -> TrajectoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UsageError(f"A store does not travel between processes: send its path, {self.path}, and open it there.")

    # Reading

    def rows(self, embodiment: str | None = None) -> np.ndarray:
        """The readable rows, all or of one embodiment, ascending: [N] int64. UsageError for an unknown one."""
        readable = self._catalog.readable
        if embodiment is None:
            return np.flatnonzero(readable)
        if embodiment not in self._manifest.specs:
            raise unknown("embodiment", embodiment, self._manifest.specs)
        code = self._manifest.code(embodiment)
        return np.flatnonzero(readable & (self._catalog.embodiment[: len(readable)] == code))

    def find(self, id: str) -> int | None:
        """The row of the trajectory with that id, if it is readable."""
        with self._mutex:
            return self._catalog.find(id)

    def spec(self, row: int) -> Spec:
        """The spec of the trajectory in that row."""
        return self._layout(row).spec

    def columns(self, row: int) -> Mapping[str, np.ndarray]:
        """The whole arrays of a trajectory by name: observations [T+1, …], the others [T, …]; what it does not have
        is not there. Without a codec they are read-only views of the mapped file and cost next to nothing."""
        memory, place = self._open(row)
        return shard.read_columns(memory, place.layout, place.steps, place.has, place.extent, self.codec)

    def slice(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Observation rows start ≤ t < stop ≤ T+1 of a trajectory, and the steps between them.

        n = stop − start observations and the n − 1 actions, discounts, … that led from each to the next. Without a
        codec these are views; copy what is to be kept or changed.
        """
        memory, (_, layout, steps, has, extent) = self._open(row)
        if not 0 <= start < stop <= steps + 1:
            raise UsageError(f"No rows {start} to {stop} in row {row}: it has {steps} steps.")
        rows = {c.name: stop - start - (not c.is_observation) for c in layout.columns if has_column(has, c.name)}
        if self.codec == "none":
            return {name: shard.view(memory, layout, extent.offsets, name, start, n) for name, n in rows.items()}
        columns = [(layout.column(name), n) for name, n in rows.items()]
        out = {c.name: np.empty((n, *c.shape), c.dtype) for c, n in columns}
        wanted = {name: (start, array) for name, array in out.items()}
        for copy in shard.copies(memory, layout, steps, extent, self.codec, wanted):
            copy()
        return out

    def copies(self, row: int, wanted: shard.Wanted) -> list[shard.Copy]:
        """Copies rows of a trajectory's arrays into arrays: name → (first row, destination [n, …] for n rows).

        The fastest way out of a store, with or without a codec. Short copies are made at once; those returned are to
        be called, in any order and by any thread. UsageError for rows that there are not, FormatError where the
        trajectory is lost or, by a copy, damaged.
        """
        memory, (_, layout, steps, has, extent) = self._open(row)
        for name, (start, out) in wanted.items():
            if not 0 <= start <= start + len(out) <= layout.column(name).rows(steps) or not has_column(has, name):
                raise UsageError(f"Row {row} has no {name} from {start} to {start + len(out)}: it has {steps} steps.")
        return shard.copies(memory, layout, steps, extent, self.codec, wanted)

    def _layout(self, row: int) -> Layout:
        return self._manifest.layouts[self._catalog.embodiment[row]]

    def read(self, row: int, checked: bool = False) -> Trajectory:
        """The whole trajectory. Raises FormatError if it is lost; with `checked`, also if its content has changed."""
        columns = dict(self.columns(row))
        if checked and self._layout(row).checksum(columns) != self._catalog.crc[row]:
            raise FormatError(f"The content of trajectory {self._catalog.id(row)} does not have its checksum.")
        spec = self.spec(row)
        observation = {k: columns.pop(k) for k in spec.observation}
        return Trajectory(
            spec.embodiment, observation, **columns,
            source=self._catalog.source(row), id=self._catalog.id(row), stats=self._catalog.stats(row),
        )  # fmt: skip

    def refresh(self) -> int:
        """Picks up what another process appended; returns how many rows are new. A writer is always up to date."""
        if self.writable:
            return 0
        with self._mutex:
            before = len(self._catalog)
            if self._log.replaced():
                self._maps.clear()
                self._load()
            else:
                self.recovery += recovery.read_log(self._catalog, self._log, self._manifest, self.path)
            return len(self._catalog) - before

    # Writing

    def add_spec(self, spec: Spec) -> None:
        """Makes an embodiment known. SpecMismatch if it is known with another spec."""
        with self._mutex:
            self._require_writer().add_spec(spec)

    def append(self, trajectory: Trajectory, spec: Spec | None = None, content: int | None = None) -> int:
        """Adds a trajectory and returns its row; durable when it returns, or at the end of a surrounding `batch`.
        `content`: the checksum of its content by `Layout.checksum`, where it is known already.

        Appending the same trajectory again returns the row it has. UsageError: the id is taken by another one, or
        the embodiment is unknown and no spec given. SpecMismatch: it is not of its embodiment. Unavailable: the
        disk refused; the store is as before.
        """
        with self._mutex:
            writer = self._require_writer()
            row = writer.append(trajectory, spec, content)
            if not self._depth:
                writer.commit()
            return row

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Within the block, what this thread appends becomes durable and visible together, at its end or once it is
        much: two syncs for all instead of two for each."""
        writer = self._require_writer()
        self._groups.depth = self._depth + 1
        try:
            yield
        finally:
            self._groups.depth -= 1
            if not self._depth:
                with self._mutex:
                    writer.commit()

    @property
    def _depth(self) -> int:
        return getattr(self._groups, "depth", 0)

    def close(self) -> None:
        """Makes everything durable, finishes the shards and lets the next writer in. Arrays read before stay valid."""
        with self._mutex:
            self._maps.clear()
            if self._writer is not None and self._lock is not None:
                try:
                    self._writer.close()
                finally:
                    self._lock.release()
                    self._writer = self._lock = None

    # Inspecting

    def info(self) -> dict[str, dict[str, Any]]:
        """Embodiment → {"trajectories", "steps", "frames", "bytes", "sources": {source: trajectories}}."""
        catalog, out = self._catalog, {}
        for name, spec in self._manifest.specs.items():
            rows = self.rows(name)
            steps = int(catalog.length[rows].sum(dtype=np.int64))
            sources = Counter(catalog.source_code[rows].tolist())
            out[name] = {
                "trajectories": len(rows),
                "steps": steps,
                "frames": steps * spec.action_repeat,
                "bytes": int((catalog.column("end")[rows] - catalog.column("start")[rows]).sum()),
                "sources": dict(sorted((catalog.sources[code], n) for code, n in sources.items())),
            }
        return out

    def verify(self, progress: Progress | None = None) -> list[tuple[int | None, str]]:
        """Reads every byte. The rows that are lost or damaged, and what else is (row None), each with what is wrong."""
        faults: list[tuple[int | None, str]] = []
        for row in range(len(self)):
            try:
                self._verify(row)
            except GsaError as error:
                faults.append((row, str(error)))
            if progress is not None:
                progress(row + 1, len(self), {"damaged": len(faults)})
        around = recovery.faults(self.path, self._catalog, self._log, self._manifest)
        return faults + [(None, fault) for fault in around]

    def _verify(self, row: int) -> None:
        memory, place = self._open(row)
        extent = place.extent
        path = recovery.shard_path(self.path, int(self._catalog.column("shard")[row]))
        begin = 0 if extent.start == shard.first_message(memory) else extent.start
        if shard.checksum(memory, begin, extent.end) != self._catalog.column("stored_crc")[row]:
            what = f"trajectory {self._catalog.id(row)} in shards/{path.name}"
            raise FormatError(f"The bytes of {what} are not those that were written.")
        self.read(row, checked=True)

    def _open(self, row: int) -> tuple[mmap.mmap, _Place]:
        """The map of the row's shard, and where the row is in it."""
        places = self._places  # before the catalog is read, which may be another by then
        place = places.get(row) or self._find(row, places)
        memory = self._maps.get(place.shard)
        if memory is None or len(memory) < place.extent.end:
            memory = shard.map_file(recovery.shard_path(self.path, place.shard))
            if len(memory) < place.extent.end:
                raise FormatError(f"Row {row} of the store {self.path} is lost: its shard is too short.")
            with self._mutex:
                if place.shard not in self._maps and len(self._maps) >= MAX_MAPS:
                    del self._maps[next(iter(self._maps))]
                self._maps[place.shard] = memory
        return memory, place

    def _find(self, row: int, places: dict[int, _Place]) -> _Place:
        """Where the catalog says that the row is. It is put among `places`: what has a row never moves."""
        catalog = self._catalog
        if not catalog.readable[row]:
            raise FormatError(f"Row {row} of the store {self.path} (trajectory {catalog.id(row) or '?'}) is lost.")
        shard_of, steps, has = (int(catalog.column(name)[row]) for name in ("shard", "length", "has"))
        if len(places) >= MAX_PLACES:
            places.clear()
        place = places[row] = _Place(shard_of, self._layout(row), steps, has, catalog.extent(row))
        return place

    def _require_writer(self) -> Writer:
        if self._writer is None:
            raise UsageError(f"The store {self.path} is not open for writing; open it with write=True.")
        return self._writer

    # Opening

    def _load(self) -> None:
        """Specs and catalog from the disk; with the writer's lock, repaired."""
        self._manifest = Manifest.load(self.path)
        loaded = recovery.load_catalog(self.path, self._manifest, repair=self._lock is not None)
        self._catalog, self._log, notes = loaded
        self._places = {}  # after the catalog: what is found in one before it goes to those before
        self.recovery += notes
