"""The catalog: one row a trajectory. Columns in memory; on disk a log (log.py) and, to open fast, its snapshot.

The log is the truth. The snapshot, `catalog.snapshot`, holds the rows of the log's first `log_bytes` bytes as columns;
it can be deleted at any time. It is a line of JSON (versions, what it stands for, names, dtypes and lengths of the
columns), the columns as they lie in memory, each on a multiple of 64 bytes, and a CRC-32 of all that.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import FormatError
from retrieval.files import replace_file
from retrieval.layout import has_column
from retrieval.log import Log, Record
from retrieval.ragged import Ragged, Rows
from retrieval.shard import Extent, map_file

SNAPSHOT_VERSION = 1
ALIGN = 64
COLUMNS: dict[str, np.dtype] = {
    "length": np.dtype(np.int32),  # T, agent steps
    "embodiment": np.dtype(np.int16),  # index into the store's specs; -1 where the row is lost
    "source_code": np.dtype(np.int32),  # index into `sources`
    "has": np.dtype(np.uint8),  # which optional arrays there are, as bits
    "crc": np.dtype(np.uint32),  # of the content
    "stored_crc": np.dtype(np.uint32),  # of its bytes in the shard
    "shard": np.dtype(np.int32),
    "start": np.dtype(np.int64),
    "end": np.dtype(np.int64),
}
RAGGED = ("id", "stats", "offsets")
READABLE = "readable"  # beside them, not kept on disk: False where a row is known, but lost


class Catalog:
    """The rows of a store as columns. Rows are only ever added; a lost row keeps its number.

    Public columns, numpy, one value a row: `length` (agent steps), `embodiment` (code), `source_code`, `has_reward`,
    `crc`, `readable`. Strings by row: `id(row)`, `source(row)`; numbers of an episode: `stats(row)`.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.sources: list[str] = []
        self._source_codes: dict[str, int] = {}
        self._columns = {name: np.zeros(64, dtype) for name, dtype in (COLUMNS | {READABLE: np.dtype(bool)}).items()}
        self._ragged = {name: Ragged() for name in RAGGED}
        self._rows_by_id: Rows | None = None  # made when it is first needed

    def __len__(self) -> int:
        return self.rows

    @property
    def length(self) -> np.ndarray:
        return self.column("length")

    @property
    def embodiment(self) -> np.ndarray:
        return self.column("embodiment")

    @property
    def source_code(self) -> np.ndarray:
        return self.column("source_code")

    @property
    def crc(self) -> np.ndarray:
        return self.column("crc")

    @property
    def readable(self) -> np.ndarray:
        return self.column(READABLE)

    @property
    def has_reward(self) -> np.ndarray:
        return (self.column("has") & 1).astype(bool)

    def column(self, name: str) -> np.ndarray:
        """The values of all rows; a view that does not grow with the catalog."""
        return self._columns[name][: self.rows]

    def id(self, row: int) -> str:
        try:
            return self._ragged["id"][row].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # of a foreign snapshot
            return self._ragged["id"][row].decode("utf-8", "backslashreplace")

    def source(self, row: int) -> str:
        return self.sources[self._columns["source_code"][row]]

    def stats(self, row: int) -> dict[str, float]:
        try:
            return dict(json.loads(self._ragged["stats"][row]))
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"The statistics of row {row} cannot be read: {error}.") from None

    def has(self, row: int, name: str) -> bool:
        """Whether the trajectory has that array."""
        return has_column(int(self._columns["has"][row]), name)

    def extent(self, row: int) -> Extent:
        start, end = int(self._columns["start"][row]), int(self._columns["end"][row])
        return Extent(start, end, _unpack(self._ragged["offsets"][row]))

    def find(self, id: str) -> int | None:
        """The readable row with that id."""
        if self._rows_by_id is None:
            self._rows_by_id = Rows(self._ragged["id"])
        row = self._rows_by_id.find(_utf8(id))
        return row if row is not None and self._columns[READABLE][row] else None

    def fingerprint(self, rows: int) -> str:
        """Of the content of the first `rows` rows: it stays as the store grows, and changes with anything else."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("crc", "length", "embodiment"):
            digest.update(np.ascontiguousarray(self.column(name)[:rows]))
        return digest.hexdigest()

    def put(self, record: Record, code: int) -> None:
        """Adds a row, or fills one that was lost; rows skipped over are lost. `code`: of its embodiment."""
        while self.rows < record.row:
            self._append(Record(self.rows), -1)
        if record.row == self.rows:
            self._append(record, code)
        elif self._columns["embodiment"][record.row] < 0:
            self._set(record, code)
            for name, value in _ragged_values(record):
                self._ragged[name].replace(record.row, value)
            self._rows_by_id = None

    def record(self, row: int, embodiments: Sequence[str]) -> Record:
        """The row as the log has it."""
        number = {name: int(self._columns[name][row]) for name in COLUMNS}
        code = number["embodiment"]
        return Record(
            row, self.id(row), embodiments[code] if code >= 0 else "", self.source(row), number["length"],
            number["has"], number["crc"], number["stored_crc"], number["shard"], number["start"], number["end"],
            self.extent(row).offsets, self.stats(row),
        )  # fmt: skip

    @property
    def rows_since_snapshot(self) -> int:
        return self._ragged["id"].appended

    def save(self, path: Path, log: Log) -> None:
        """Writes the snapshot, which stands for the log as it is now."""
        columns: dict[str, list[np.ndarray]] = {name: [self.column(name)] for name in COLUMNS}
        for name, ragged in self._ragged.items():
            columns[f"{name}_ends"], columns[name] = ragged.parts()
        about = {
            "version": SNAPSHOT_VERSION, "log_bytes": log.position, "log_end": log.before(log.position).hex(),
            "sources": self.sources,
            "columns": [[k, _dtype(k).str, sum(map(len, parts))] for k, parts in columns.items()],
        }  # fmt: skip
        with replace_file(path) as file:
            file.write(json.dumps(about).encode() + b"\n")
            for parts in columns.values():
                file.write(bytes(-file.tell() % ALIGN))
                for part in filter(len, parts):
                    file.write(part)
            file.write(struct.pack("<I", file.crc))
        _, mapped = _read(path)
        self._map(mapped)  # what was in memory is now on disk

    @classmethod
    def load(cls, path: Path, log: Log) -> Catalog:
        """The catalog of a snapshot; the log is to be read on from there. FormatError where it cannot be used."""
        try:
            about, columns = _read(path)
            position, end = int(about["log_bytes"]), bytes.fromhex(about["log_end"])
            if log.size() >= position and log.before(position) != end:
                raise FormatError(f"{path} stands for another log.")
            catalog = cls()
            for source in about["sources"]:
                catalog._source_code(str(source))
            catalog._columns = {name: columns[name].copy() for name in COLUMNS}
            catalog.rows = len(columns["length"])
            catalog._map(columns)
            catalog._check()
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise FormatError(f"{path} cannot be read: {error!r}.") from None
        catalog._columns[READABLE] = catalog._columns["embodiment"] >= 0
        log.position = position
        return catalog

    def _map(self, columns: dict[str, np.ndarray]) -> None:
        for name in RAGGED:
            self._ragged[name] = Ragged(columns[f"{name}_ends"], columns[name])
        if self._rows_by_id is not None:
            self._rows_by_id.values = self._ragged["id"]

    def _check(self) -> None:
        """Raises ValueError where the columns of a snapshot cannot be those of a catalog."""
        lengths = {len(column) for column in self._columns.values()} | {len(r) for r in self._ragged.values()}
        if lengths != {self.rows}:
            raise ValueError("columns of unequal length")
        least = {"length": 0, "source_code": 0, "embodiment": -1, "shard": -1, "start": 0, "end": 0}
        if any(np.any(self._columns[name] < low) for name, low in least.items()):
            raise ValueError("a number is out of its range")
        if np.any(self._columns["source_code"] >= max(len(self.sources), 1)):
            raise ValueError("a source without a name")
        for ragged in self._ragged.values():
            ragged.check()

    def _append(self, record: Record, code: int) -> None:
        if self.rows == len(self._columns[READABLE]):
            room = max(64, self.rows // 2)
            self._columns = {k: np.concatenate([v, np.zeros(room, v.dtype)]) for k, v in self._columns.items()}
        self._set(record, code)
        for name, value in _ragged_values(record):
            self._ragged[name].append(value)
        if self._rows_by_id is not None:
            self._rows_by_id.add(_utf8(record.id), record.row)
        self.rows += 1  # last: who reads in another thread sees the row whole or not at all

    def _set(self, record: Record, code: int) -> None:
        columns, row = self._columns, record.row
        columns["length"][row] = record.length
        columns["embodiment"][row] = code
        columns["source_code"][row] = self._source_code(record.source)
        columns["has"][row] = record.has
        columns["crc"][row] = record.crc
        columns["stored_crc"][row] = record.stored_crc
        columns["shard"][row] = record.shard
        columns["start"][row] = record.start
        columns["end"][row] = record.end
        columns[READABLE][row] = code >= 0

    def _source_code(self, source: str) -> int:
        if source not in self._source_codes:
            self._source_codes[source] = len(self.sources)
            self.sources.append(source)
        return self._source_codes[source]


def snapshot_problem(path: Path) -> str:
    """What is wrong with the bytes of a snapshot; nothing if they are as written."""
    try:
        _read(path)
        return ""
    except (FormatError, ValueError, KeyError, TypeError, RecursionError) as error:
        return str(error)


def _ragged_values(record: Record) -> tuple[tuple[str, bytes], ...]:
    offsets = struct.pack(f"<{len(record.offsets)}q", *record.offsets)
    return ("id", _utf8(record.id)), ("stats", json.dumps(dict(record.stats)).encode()), ("offsets", offsets)


def _utf8(id: str) -> bytes:
    return id.encode("utf-8", "surrogatepass")  # any text that JSON can hold


def _unpack(offsets: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(offsets) // 8}q", offsets)


def _dtype(name: str) -> np.dtype:
    """Of a column of the snapshot."""
    return COLUMNS[name] if name in COLUMNS else np.dtype(np.int64 if name.endswith("_ends") else np.uint8)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a snapshot says of itself, and its columns, mapped. FormatError or ValueError where it is damaged."""
    memory = map_file(path)
    whole = memoryview(memory)[:-4]
    if zlib.crc32(whole) != int.from_bytes(memoryview(memory)[-4:], "little"):
        raise FormatError(f"{path} is damaged.")
    end = memory.find(b"\n") + 1
    about = json.loads(whole[:end].tobytes())
    if about["version"] != SNAPSHOT_VERSION:
        raise FormatError(f"{path} is of another version.")
    columns = {}
    for name, dtype, count in about["columns"]:
        if np.dtype(dtype) != _dtype(name) or type(count) is not int or count < 0:
            raise FormatError(f"{path} has a column {name} of {dtype}.")
        end += -end % ALIGN
        if end + count * _dtype(name).itemsize > len(whole):
            raise FormatError(f"{path} is too short for its column {name}.")
        columns[name] = np.ndarray((count,), _dtype(name), memory, end)
        end += columns[name].nbytes
    return about, columns
