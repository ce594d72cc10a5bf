"""The catalog: one row a trajectory. Columns in memory; on disk a log (log.py) and, to open fast, its snapshot.

The log is the truth. The snapshot, `catalog.arrow`, holds the rows of the log's first `log_bytes` bytes as columns;
it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gsa.errors import FormatError
from retrieval.files import replace_file
from retrieval.layout import has_column
from retrieval.log import Log, Record
from retrieval.shard import Extent

SNAPSHOT_VERSION = b"1"
COLUMNS = {
    "length": np.dtype(np.int32),  # T, agent steps
    "embodiment": np.dtype(np.int16),  # index into the store's specs; -1 where the row is lost
    "source_code": np.dtype(np.int32),  # index into `sources`
    "has": np.dtype(np.uint8),  # which optional arrays there are, as bits
    "crc": np.dtype(np.uint32),  # of the content
    "shard": np.dtype(np.int32),
    "start": np.dtype(np.int64),
    "end": np.dtype(np.int64),
}
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
        self._ragged = _Ragged(None)
        self._rows_by_id: dict[str, int] | None = None  # made when it is first needed

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
        return self._ragged.id(row)

    def source(self, row: int) -> str:
        return self.sources[self._columns["source_code"][row]]

    def stats(self, row: int) -> dict[str, float]:
        return self._ragged.stats(row)

    def has(self, row: int, name: str) -> bool:
        """Whether the trajectory has that array."""
        return has_column(int(self._columns["has"][row]), name)

    def extent(self, row: int) -> Extent:
        start, end = int(self._columns["start"][row]), int(self._columns["end"][row])
        return Extent(start, end, tuple(self._ragged.offsets(row)))

    def find(self, id: str) -> int | None:
        """The readable row with that id."""
        if self._rows_by_id is None:
            self._rows_by_id = {known: row for row, known in enumerate(self._ragged.ids())}
        row = self._rows_by_id.get(id)
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
            self._ragged.replace(record)

    def record(self, row: int, embodiments: Sequence[str]) -> Record:
        """The row as the log has it."""
        number = {name: int(self._columns[name][row]) for name in COLUMNS}
        code = number["embodiment"]
        return Record(
            row, self.id(row), embodiments[code] if code >= 0 else "", self.source(row), number["length"],
            number["has"], number["crc"], number["shard"], number["start"], number["end"],
            tuple(self._ragged.offsets(row)), self.stats(row),
        )  # fmt: skip

    @property
    def rows_since_snapshot(self) -> int:
        return len(self._ragged.tail)

    def save(self, path: Path, log: Log) -> None:
        """Writes the snapshot, which stands for the log as it is now."""
        ragged = self._ragged.table().combine_chunks()
        columns = {name: pa.array(self.column(name)) for name in COLUMNS}
        table = pa.table(columns | {name: ragged[name] for name in ragged.column_names})
        meta = {
            b"version": SNAPSHOT_VERSION,
            b"log_bytes": str(log.position).encode(),
            b"log_end": log.before(log.position),
            b"sources": json.dumps(self.sources).encode(),
            b"crc": str(_crc(table)).encode(),
        }
        with replace_file(path) as file, pa.ipc.new_file(file, table.schema.with_metadata(meta)) as writer:
            writer.write_table(table.replace_schema_metadata(meta))
        self._ragged = _Ragged(_read(path))  # what was in memory is now on disk

    @classmethod
    def load(cls, path: Path, log: Log) -> Catalog:
        """The catalog of a snapshot; the log is to be read on from there. FormatError where it cannot be used."""
        try:
            table = _read(path)
            meta = table.schema.metadata
            if meta[b"version"] != SNAPSHOT_VERSION or int(meta[b"crc"]) != _crc(table):
                raise FormatError(f"{path} is damaged or of another version.")
            position = int(meta[b"log_bytes"])
            if log.size() >= position and log.before(position) != meta[b"log_end"]:
                raise FormatError(f"{path} stands for another log.")
            catalog = cls()
            for source in json.loads(meta[b"sources"]):
                catalog._source_code(source)
            catalog._columns = {name: table[name].to_numpy().astype(dtype) for name, dtype in COLUMNS.items()}
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path} cannot be read: {error}.") from None
        catalog._columns[READABLE] = catalog._columns["embodiment"] >= 0
        catalog.rows, catalog._ragged, log.position = len(table), _Ragged(table), position
        return catalog

    def _append(self, record: Record, code: int) -> None:
        if self.rows == len(self._columns[READABLE]):
            room = max(64, self.rows // 2)
            self._columns = {k: np.concatenate([v, np.zeros(room, v.dtype)]) for k, v in self._columns.items()}
        self._set(record, code)
        self._ragged.append(record)
        if self._rows_by_id is not None:
            self._rows_by_id[record.id] = record.row
        self.rows += 1  # last: who reads in another thread sees the row whole or not at all

    def _set(self, record: Record, code: int) -> None:
        columns, row = self._columns, record.row
        columns["length"][row] = record.length
        columns["embodiment"][row] = code
        columns["source_code"][row] = self._source_code(record.source)
        columns["has"][row] = record.has
        columns["crc"][row] = record.crc
        columns["shard"][row] = record.shard
        columns["start"][row] = record.start
        columns["end"][row] = record.end
        columns[READABLE][row] = code >= 0

    def _source_code(self, source: str) -> int:
        if source not in self._source_codes:
            self._source_codes[source] = len(self.sources)
            self.sources.append(source)
        return self._source_codes[source]


class _Ragged:
    """What has no fixed size: id, stats and offsets. The rows of the snapshot stay on disk, mapped; `tail` are those
    after it."""

    def __init__(self, snapshot: pa.Table | None) -> None:
        self.tail: list[Record] = []
        self._first = 0 if snapshot is None else len(snapshot)
        self._snapshot = None if snapshot is None else snapshot.select(["id", "stats", "offsets"]).combine_chunks()
        if self._snapshot is not None and self._first:
            (lists,) = self._snapshot["offsets"].chunks
            self._bounds, self._values = lists.offsets.to_numpy(), lists.values.to_numpy()

    def id(self, row: int) -> str:
        return self.tail[row - self._first].id if row >= self._first else self._of_snapshot("id", row)

    def stats(self, row: int) -> dict[str, float]:
        if row >= self._first:
            return dict(self.tail[row - self._first].stats)
        return json.loads(self._of_snapshot("stats", row))

    def offsets(self, row: int) -> Sequence[int]:
        if row >= self._first:
            return self.tail[row - self._first].offsets
        return self._values[self._bounds[row] : self._bounds[row + 1]].tolist()

    def ids(self) -> list[str]:
        known = [] if self._snapshot is None else self._snapshot["id"].to_pylist()
        return known + [record.id for record in self.tail]

    def append(self, record: Record) -> None:
        self.tail.append(record)

    def replace(self, record: Record) -> None:
        """Only of rows after the snapshot: it is written when nothing is in doubt."""
        if record.row >= self._first:
            self.tail[record.row - self._first] = record

    def table(self) -> pa.Table:
        tail = pa.table(
            {
                "id": pa.array([record.id for record in self.tail], pa.large_string()),
                "stats": pa.array([json.dumps(dict(record.stats)) for record in self.tail], pa.large_string()),
                "offsets": pa.array([record.offsets for record in self.tail], pa.large_list(pa.int64())),
            }
        )
        return tail if self._snapshot is None else pa.concat_tables([self._snapshot, tail])

    def _of_snapshot(self, name: str, row: int) -> str:
        assert self._snapshot is not None
        return self._snapshot[name][row].as_py()


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _crc(table: pa.Table) -> int:
    buffers = (b for column in table.columns for chunk in column.chunks for b in chunk.buffers() if b is not None)
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc
