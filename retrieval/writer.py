"""Appending to a store: shards first, then the catalog, each synced before the next."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsa.errors import SpecMismatch, Unavailable, UsageError
from gsa.schema import Spec, Trajectory
from retrieval.catalog import Catalog
from retrieval.files import sync_folder
from retrieval.layout import MAX_BYTES, Layout, arrays_of, has_of
from retrieval.log import Log, Record
from retrieval.manifest import Manifest
from retrieval.recovery import SNAPSHOT, shard_numbers, shard_path
from retrieval.shard import ShardWriter, locate, map_file

SHARD_BYTES = 4 << 30  # a shard is finished once it is this long: large, as readers map only so many at a time
GROUP_BYTES = 1 << 28  # pending trajectories are committed once they are this much
SNAPSHOT_ROWS, MAX_SNAPSHOT_ROWS = 4096, 65536  # rows that the log may be ahead of the snapshot
PLACE = {"shard", "stored_crc", "start", "end", "offsets"}  # what a record says about where, rather than what


class Writer:
    """The appending half of a store. Not thread-safe: its store takes care of that."""

    def __init__(self, folder: Path, manifest: Manifest, catalog: Catalog, log: Log) -> None:
        self.folder, self.manifest, self.catalog, self.log = folder, manifest, catalog, log
        self._shards: dict[str, tuple[int, ShardWriter]] = {}  # embodiment → its open shard
        self._committed: dict[int, int] = {}  # shard → where its last committed trajectory ends
        self._pending: dict[str, Record] = {}  # id → written, not yet committed
        self._pending_bytes = 0
        self._next_shard = max(shard_numbers(folder), default=-1) + 1

    def append(self, trajectory: Trajectory, spec: Spec | None, content: int | None = None) -> int:
        """Writes a trajectory; it is in the store once `commit` returns. Returns its row.

        Appending the same trajectory again gives the row it has. UsageError: the id is taken by another one, or the
        embodiment is unknown and no spec given. SpecMismatch: it is not of its embodiment. Unavailable: the disk
        refused.
        """
        layout = self._layout(trajectory, spec)
        arrays = arrays_of(trajectory)
        if (size := sum(a.nbytes for a in arrays.values())) > MAX_BYTES:
            raise UsageError(f"{trajectory.name} has {size} bytes; a trajectory has at most {MAX_BYTES}: split it.")
        content = layout.checksum(arrays) if content is None else content
        if (row := self._known(trajectory, content)) is not None:
            return row
        record = Record(
            len(self.catalog) + len(self._pending), trajectory.id, trajectory.embodiment, trajectory.source,
            len(trajectory), has_of(arrays), content, stats={k: float(v) for k, v in trajectory.stats.items()},
        )  # fmt: skip
        try:
            number, writer = self._shard(layout)
            extent, stored = writer.write(trajectory, _note(record))
        except OSError as error:
            self._leave(trajectory.embodiment)
            raise self._refused(error) from error
        record = dataclasses.replace(
            record, shard=number, stored_crc=stored, start=extent.start, end=extent.end, offsets=extent.offsets
        )
        self._pending[record.id] = record
        self._pending_bytes += record.end - record.start
        if self._pending_bytes >= GROUP_BYTES:
            self.commit()
        return record.row

    def commit(self) -> None:
        """Makes what was appended durable, then visible: all of it, or none and an Unavailable."""
        if not self._pending:
            return
        records = list(self._pending.values())
        try:
            for number, writer in self._shards.values():
                if writer.end > self._committed.get(number, 0):
                    writer.sync()
            records = self._located(records)
            self.log.append(b"".join(r.line() for r in records))
        except OSError as error:
            self._give_up()
            raise self._refused(error) from error
        for record in records:
            self.catalog.put(record, self.manifest.code(record.embodiment))
            self._committed[record.shard] = record.end
        self._forget_pending()
        for embodiment in [e for e, (_, writer) in self._shards.items() if writer.end >= SHARD_BYTES]:
            _finish(self._shards.pop(embodiment)[1])
        self._snapshot(min(max(SNAPSHOT_ROWS, len(self.catalog) // 4), MAX_SNAPSHOT_ROWS))

    def _located(self, records: list[Record]) -> list[Record]:
        """What was written, with where each column is, which the files tell."""
        found, maps = [], {n: map_file(shard_path(self.folder, n)) for n in {r.shard for r in records}}
        for record in records:
            layout = self.manifest.layouts[self.manifest.code(record.embodiment)]
            extent = locate(maps[record.shard], layout, record.offsets, record.end, self.manifest.codec)
            found.append(dataclasses.replace(record, start=extent.start, offsets=extent.offsets))
        return found

    def _snapshot(self, rows: int) -> None:
        """Writes a new snapshot if the log is more than `rows` ahead."""
        if self.catalog.rows_since_snapshot > rows:
            with contextlib.suppress(OSError):  # it only helps to open fast
                self.catalog.save(self.folder / SNAPSHOT, self.log)

    def close(self) -> None:
        """Commits, and finishes the open shards."""
        try:
            self.commit()
            self._snapshot(SNAPSHOT_ROWS)
        finally:
            for _, writer in self._shards.values():
                _finish(writer)
            self._shards.clear()

    def add_spec(self, spec: Spec) -> None:
        """Makes an embodiment known. SpecMismatch if it is known with another spec."""
        try:
            self.manifest.add(spec, self.folder)
        except OSError as error:
            raise self._refused(error) from error

    def _layout(self, trajectory: Trajectory, spec: Spec | None) -> Layout:
        if spec is not None:
            if spec.embodiment != trajectory.embodiment:
                raise SpecMismatch(
                    f"Trajectory {trajectory.name} is of {trajectory.embodiment}, not {spec.embodiment}."
                )
            self.add_spec(spec)
        known = self.manifest.specs.get(trajectory.embodiment)
        if known is None:
            raise UsageError(f"The store {self.folder} does not know {trajectory.embodiment} yet; give its spec.")
        trajectory.check(known)
        return self.manifest.layouts[self.manifest.code(trajectory.embodiment)]

    def _known(self, trajectory: Trajectory, content: int) -> int | None:
        if trajectory.id in self._pending:
            row, crc = self._pending[trajectory.id].row, self._pending[trajectory.id].crc
        elif (found := self.catalog.find(trajectory.id)) is not None:
            row, crc = found, int(self.catalog.crc[found])
        else:
            return None
        if crc != content:
            raise UsageError(
                f"The store {self.folder} has another trajectory with the id {trajectory.id} in row {row}."
            )
        return row

    def _shard(self, layout: Layout) -> tuple[int, ShardWriter]:
        embodiment = layout.spec.embodiment
        if embodiment not in self._shards:
            number, self._next_shard = self._next_shard, self._next_shard + 1
            self._shards[embodiment] = number, ShardWriter(shard_path(self.folder, number), layout, self.manifest.codec)
            sync_folder(self.folder / "shards")
        return self._shards[embodiment]

    def _leave(self, embodiment: str) -> None:
        """After a failed write: leaves the shard with what is whole in it; the next trajectory begins another."""
        if embodiment not in self._shards:
            return
        _, writer = self._shards.pop(embodiment)
        try:
            writer.abandon(writer.end)
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """After a failed sync: forgets what was pending, and leaves the open shards as they were committed."""
        self._forget_pending()
        for number, writer in self._shards.values():
            with contextlib.suppress(OSError):
                writer.abandon(self._committed.get(number, 0))
        self._shards.clear()

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0

    def _refused(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"The store {self.folder} cannot be written to: {error.strerror or error}. "
            "What was acknowledged is safe; make room and try again."
        )


def _finish(writer: ShardWriter) -> None:
    """Gives a shard its footer, or, on a full disk, leaves it without: what is in it is durable either way."""
    try:
        writer.close()
    except OSError:
        with contextlib.suppress(OSError):
            writer.abandon(writer.end)


def _note(record: Record) -> bytes:
    content: Mapping[str, Any] = dataclasses.asdict(record)
    return json.dumps({k: v for k, v in content.items() if k not in PLACE}).encode()
