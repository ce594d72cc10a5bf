"""Opening a store, and what a crash or a bad disk did to it: what can be had back, the names of what cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gsa.errors import FormatError
from retrieval.catalog import Catalog, snapshot_problem
from retrieval.files import is_locked
from retrieval.log import Log, Record
from retrieval.manifest import Manifest
from retrieval.shard import footer_problem, is_finished, map_file, read_columns, scan, spec_of

LOG, SNAPSHOT = "catalog.log", "catalog.snapshot"
MIN_TRAJECTORY = 256  # bytes: no trajectory takes fewer in a shard, so that row numbers in notes are bounded


def load_catalog(folder: Path, manifest: Manifest, repair: bool) -> tuple[Catalog, Log, list[str]]:
    """The catalog, its log, and what was found amiss, a sentence each. `repair` needs the writer's lock.

    Raises FormatError where there is no catalog at all.
    """
    try:
        log = Log(folder / LOG)
    except OSError as error:
        raise FormatError(f"The store {folder} has no readable {LOG}: {error.strerror}.") from None
    catalog, notes = _snapshot(folder, log, manifest)
    notes += read_log(catalog, log, manifest, folder)
    if repair:
        notes += _repair(folder, catalog, log, manifest, damaged=bool(notes))
    elif log.size() > log.position and not is_locked(folder):
        notes.append(f"{LOG} ends in an unfinished line; opening the store for writing repairs it.")
    return catalog, log, notes + mark_lost(catalog, folder)


def read_log(catalog: Catalog, log: Log, manifest: Manifest, folder: Path) -> list[str]:
    """Enters what the log has grown by into the catalog; says which lines are damaged. Their rows are lost."""
    notes = []
    codes = {name: code for code, name in enumerate(manifest.specs)} | {"": -1}
    for record, start in log.read():
        if record is None:
            notes.append(f"Damaged: the line at byte {start} of {LOG}, row {len(catalog)}.")
            record = Record(len(catalog))
        elif record.embodiment not in codes:
            manifest.reload(folder)
            codes |= {name: code for code, name in enumerate(manifest.specs)}
        catalog.put(record, codes.get(record.embodiment, -1))
    return notes


def _snapshot(folder: Path, log: Log, manifest: Manifest) -> tuple[Catalog, list[str]]:
    if not (folder / SNAPSHOT).exists():
        return Catalog(), []
    try:
        catalog = Catalog.load(folder / SNAPSHOT, log)
        if catalog.embodiment.max(initial=-1) >= len(manifest.specs):
            manifest.reload(folder)
        if catalog.embodiment.max(initial=-1) >= len(manifest.specs):
            raise FormatError(f"{folder / SNAPSHOT} has an embodiment that the store does not know.")
    except FormatError:
        log.position = 0
        return Catalog(), []  # nothing is lost: the log has it all
    shorter = log.size() < log.position
    return catalog, [f"Damaged: {LOG} is shorter than its snapshot."] if shorter else []


def _repair(folder: Path, catalog: Catalog, log: Log, manifest: Manifest, damaged: bool) -> list[str]:
    """Brings catalog and shards to agree again, on disk too."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    notes = []
    if log.size() > log.position:
        notes.append(f"Dropped: the last {log.cut()} bytes of {LOG}, an unfinished line.")
    before, names = len(catalog), list(manifest.specs)
    for record in found_again(folder, catalog, manifest, whole=damaged):
        catalog.put(record, manifest.code(record.embodiment))
        notes.append(f"Found again: trajectory {record.id} of {record.source or 'no source'} (row {record.row}).")
    if damaged:
        (folder / SNAPSHOT).unlink(missing_ok=True)
        log.rewrite(catalog.record(row, names).line() for row in range(len(catalog)))
        return notes  # where the catalog is in doubt no shard is cut
    if len(catalog) > before:
        log.append(b"".join(catalog.record(row, names).line() for row in range(before, len(catalog))))
    return notes + cut_unfinished(folder, catalog)


def faults(folder: Path, catalog: Catalog, log: Log, manifest: Manifest) -> list[str]:
    """What is wrong around the trajectories: in the log, its snapshot, the ends of shards. Reads all of it."""
    lines = [at for line, at in log.lines() if Record.parse(line) is None]
    remedy = f"Opening the store for writing without {SNAPSHOT} repairs it."
    found = [f"Damaged: the line at byte {at} of {LOG}. {remedy}" for at in lines]
    if (folder / SNAPSHOT).exists() and (problem := snapshot_problem(folder / SNAPSHOT)):
        found.append(f"Damaged: {problem} It is not used and may be deleted.")
    if is_locked(folder):
        return found  # what its writer is at is not yet whole
    for shard, end in _catalogued_ends(folder, catalog).items():
        path = shard_path(folder, shard)
        size = file_size(path)
        if end < size and not is_finished(path, end):
            found.append(
                f"Damaged: the last {size - end} bytes of shards/{path.name} are neither trajectory nor footer."
            )
        elif end < size and (problem := footer_problem(path)):
            found.append(f"Damaged: the Arrow footer of shards/{path.name}: {problem}.")
    return found


def mark_lost(catalog: Catalog, folder: Path) -> list[str]:
    """Marks the rows whose shard ends before they do as unreadable; says which."""
    shards, place = np.unique(catalog.column("shard"), return_inverse=True)
    sizes = np.array([file_size(shard_path(folder, shard)) for shard in shards.tolist()], np.int64)
    lost = catalog.readable & (catalog.column("end") > sizes[place])
    catalog.readable[lost] = False
    return [_lost_row(catalog, row) for row in np.flatnonzero(lost).tolist()]


def found_again(folder: Path, catalog: Catalog, manifest: Manifest, whole: bool) -> list[Record]:
    """Whole trajectories in the shards that the catalog does not have, by row.

    Looks at what comes after the last catalogued trajectory of each shard; with `whole`, at all of it.
    """
    ends = _catalogued_ends(folder, catalog)
    records: dict[int, Record] = {}
    most = len(catalog) + sum(file_size(shard_path(folder, shard)) for shard in ends) // MIN_TRAJECTORY
    for shard in sorted(ends):
        for record in _uncatalogued(shard_path(folder, shard), shard, manifest, 0 if whole else ends[shard]):
            known = record.row < len(catalog) and catalog.column("shard")[record.row] >= 0
            if not known and record.row < most:
                records[record.row] = record
    return [records[row] for row in sorted(records)]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:06d}.arrow"


def shard_numbers(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in (folder / "shards").glob("*.arrow") if p.stem.isdecimal())


def file_size(path: Path) -> int:
    """In bytes; -1 where there is no such file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def cut_unfinished(folder: Path, catalog: Catalog) -> list[str]:
    """Cuts what a dying writer left at the end of its shards; says what was dropped.

    A shard of which nothing is catalogued is put aside rather than removed, unless it has no more than a beginning
    of a header: its trajectories may be whole but for their first byte.
    """
    notes = []
    ends = _catalogued_ends(folder, catalog)
    for shard, end in ends.items():
        path = shard_path(folder, shard)
        size = file_size(path)
        if end == 0 and spec_of(path) is None:
            path.unlink()
            notes.append(f"Dropped: shards/{path.name}, {size} bytes without a trajectory.")
        elif end == 0:
            path.rename(path.with_suffix(".dropped"))
            notes.append(
                f"Dropped: shards/{path.name}, {size} bytes of trajectories never acknowledged; it is now "
                f"{path.stem}.dropped and can be deleted."
            )
        elif size > end and not is_finished(path, end):
            os.truncate(path, end)
            notes.append(
                f"Dropped: the last {size - end} bytes of shards/{path.name}, of a trajectory never acknowledged."
            )
    return notes


def _catalogued_ends(folder: Path, catalog: Catalog) -> dict[int, int]:
    """Shard on disk → where its last catalogued trajectory ends; 0 where it has none."""
    shards, place = np.unique(catalog.column("shard"), return_inverse=True)
    last = np.zeros(len(shards), np.int64)
    np.maximum.at(last, place, catalog.column("end"))
    ends = dict(zip(shards.tolist(), last.tolist(), strict=True))
    return {shard: ends.get(shard, 0) for shard in shard_numbers(folder)}


def _uncatalogued(path: Path, shard: int, manifest: Manifest, start: int) -> Iterator[Record]:
    """The trajectories of a shard from byte `start` on that are whole and have their checksum."""
    spec = spec_of(path)
    if spec is None or spec.embodiment not in manifest.specs:
        return
    layout, codec = manifest.layouts[manifest.code(spec.embodiment)], manifest.codec
    for note, extent, stored in scan(path, layout, start, codec):
        place = {"shard": shard, "stored_crc": stored, "start": extent.start, "end": extent.end}
        try:
            record = Record.of({**note, **place, "offsets": list(extent.offsets)})
            content = read_columns(map_file(path), layout, record.length, record.has, extent, codec)
        except (FormatError, TypeError, ValueError):
            return
        if layout.checksum(content) == record.crc:
            yield record


def _lost_row(catalog: Catalog, row: int) -> str:
    shard, end = int(catalog.column("shard")[row]), int(catalog.column("end")[row])
    return (
        f"Lost: trajectory {catalog.id(row)} of {catalog.source(row) or 'no source'} (row {row}): "
        f"shards/{shard:06d}.arrow is missing or ends before byte {end}."
    )
