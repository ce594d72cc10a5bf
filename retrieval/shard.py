"""A shard: many trajectories of one embodiment in one Arrow IPC file. Only this module knows where its bytes are.

A trajectory of T steps is T+1 rows: row t holds observation t and, for t < T, what was done after seeing it. The last
row's action, discount, … are null. Without a codec a trajectory is one record batch, so each of its columns is one
run of bytes in the file, and whoever knows where it starts reads any slice without Arrow. With a codec a trajectory
is cut into record batches of CHUNK_ROWS rows, so that a slice decompresses little more than itself.

The first record batch of a trajectory carries a note (JSON, custom metadata) that says what the catalog says: a
shard alone suffices to rebuild its part of the catalog. A shard whose writer died has no Arrow footer; it is still
an Arrow stream after its first 8 bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gsa.errors import FormatError
from gsa.schema import Spec, Trajectory
from retrieval.files import WholeFile
from retrieval.layout import SPEC_KEY, Column, Layout, arrays_of, has_column, require_codec

CHUNK_ROWS = 64  # rows of a record batch in a compressed shard
MAGIC_BYTES = 8  # "ARROW1" and padding, before the first message
CONTINUATION = b"\xff\xff\xff\xff"  # begins every Arrow message
NOTE_KEY = b"gsa:trajectory"


@dataclass(frozen=True)
class Extent:
    """Where a trajectory lies in its shard, in bytes.

    `offsets`, without a codec: where each column's values start, in the layout's order. With one: where each record
    batch starts.
    """

    start: int
    end: int
    offsets: tuple[int, ...]


class ShardWriter:
    """Appends trajectories to a new shard. What it wrote is durable after `sync`."""

    def __init__(self, path: Path, layout: Layout, codec: str) -> None:
        self.path, self.layout, self.codec = path, layout, require_codec(codec)
        options = pa.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
        self.file = WholeFile(path, "x+")
        self.writer = pa.ipc.new_file(self.file, layout.schema, options=options)
        self.end = 0  # whole trajectories end here

    def write(self, trajectory: Trajectory, note: bytes) -> Extent:
        """Appends a trajectory; it has reached the operating system, not yet the disk."""
        arrays, rows = arrays_of(trajectory), len(trajectory) + 1
        step = rows if self.codec == "none" else CHUNK_ROWS
        starts = []
        for start in range(0, rows, step):
            batch = self._batch(arrays, start, min(start + step, rows))
            before = self.file.tell()
            self.writer.write_batch(batch, custom_metadata={NOTE_KEY: note} if start == 0 else None)
            starts.append(before)
        starts[0] = starts[0] or first_message(self.file.fileno())
        extent = locate(self.file.fileno(), self.layout, starts, self.file.tell(), self.codec)
        self.end = extent.end
        return extent

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Writes the Arrow footer."""
        self.writer.close()
        self.sync()
        self.file.close()

    def abandon(self, end: int) -> None:
        """Cuts the shard back to `end`, durably, after a failed write, and leaves it without a footer."""
        with self.file:
            if end == 0:
                self.path.unlink()
            os.ftruncate(self.file.fileno(), end)
            os.fsync(self.file.fileno())

    def _batch(self, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> pa.RecordBatch:
        columns = []
        for column in self.layout.columns:
            if column.name in arrays:
                columns.append(_to_arrow(column, arrays[column.name][start:stop], stop - start))
            else:
                columns.append(pa.nulls(stop - start, column.arrow_type))
        return pa.record_batch(columns, schema=self.layout.schema)


def first_message(fd: int) -> int:
    """Where the first record batch of a shard starts: after the magic and the schema message."""
    head = os.pread(fd, MAGIC_BYTES + 8, 0)
    return MAGIC_BYTES + 8 + int.from_bytes(head[MAGIC_BYTES + 4 :], "little")


def locate(fd: int, layout: Layout, starts: list[int], end: int, codec: str) -> Extent:
    """The extent of a trajectory whose record batches begin at `starts` and end at `end`. Reads headers only."""
    if codec != "none":
        return Extent(starts[0], end, tuple(starts))
    aligned = starts[0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    whole = pa.py_buffer(mmap.mmap(fd, end - aligned, access=mmap.ACCESS_READ, offset=aligned))
    batch = read_batch(whole.slice(starts[0] - aligned), layout.schema)
    base = whole.address - aligned
    offsets = tuple(_values(column).address - base for column in batch.columns)
    return Extent(starts[0], end, offsets)


def extent_in_file(path: Path, layout: Layout, extent: Extent, codec: str) -> Extent | None:
    """The extent as the Arrow headers in the file have it; None where they cannot be read."""
    starts = [extent.start] if codec == "none" else list(extent.offsets)
    try:
        with path.open("rb") as file:
            return locate(file.fileno(), layout, starts, extent.end, codec)
    except (FormatError, OSError, ValueError):
        return None


def read_batch(message: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """The record batch of one encapsulated Arrow message. Raises FormatError."""
    try:
        return pa.ipc.read_record_batch(pa.ipc.read_message(message), schema)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise FormatError(f"Not an Arrow record batch: {error}.") from None


def map_file(path: Path) -> mmap.mmap:
    """The file in memory, read-only, as long as it is now. It stays mapped while any array on it lives."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise FormatError(f"{path} cannot be mapped: {error}.") from None


def read_columns(
    memory: mmap.mmap, layout: Layout, steps: int, has: int, extent: Extent, codec: str
) -> dict[str, np.ndarray]:
    """The whole columns of a trajectory: views without a codec, copies with one. Raises FormatError."""
    if codec == "none":
        return views(memory, layout, steps, has, extent.offsets)
    return decode(memory, layout, steps, has, extent, 0, steps + 1)


def views(memory: mmap.mmap, layout: Layout, steps: int, has: int, offsets: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of an uncompressed trajectory as arrays on the mapped file; nothing is copied or read."""
    out = {}
    for column, offset in zip(layout.columns, offsets, strict=True):
        if has_column(has, column.name):
            rows = column.rows(steps)
            try:
                flat = np.frombuffer(memory, column.dtype, rows * math.prod(column.shape), offset)
            except ValueError as error:
                raise FormatError(f"A trajectory's {column.name} lies outside its shard: {error}.") from None
            out[column.name] = flat.reshape(rows, *column.shape)
    return out


def decode(
    memory: mmap.mmap, layout: Layout, steps: int, has: int, extent: Extent, start: int, stop: int
) -> dict[str, np.ndarray]:
    """Rows start ≤ t < stop of a compressed trajectory, decompressing only the record batches that hold them."""
    first, last = start // CHUNK_ROWS, (stop - 1) // CHUNK_ROWS
    bounds = (*extent.offsets, extent.end)
    schema, whole = layout.schema, pa.py_buffer(memory)
    chunks = [whole.slice(bounds[i], bounds[i + 1] - bounds[i]) for i in range(first, last + 1)]
    batches = [read_batch(chunk, schema) for chunk in chunks]
    rows_before = first * CHUNK_ROWS
    out = {}
    for i, column in enumerate(layout.columns):
        if has_column(has, column.name):
            parts = [_from_arrow(column, batch.column(i)) for batch in batches]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            out[column.name] = joined[start - rows_before : min(stop, column.rows(steps)) - rows_before]
    return out


def spec_of(path: Path) -> Spec | None:
    """The embodiment of a shard; None where its head is not whole."""
    try:
        with path.open("rb") as file:
            file.seek(MAGIC_BYTES)
            schema = pa.ipc.read_schema(pa.ipc.read_message(file))
        return Spec.from_json(json.loads(schema.metadata[SPEC_KEY]))
    except (pa.ArrowException, OSError, EOFError, KeyError, TypeError, ValueError, FormatError):
        return None


def scan(path: Path, layout: Layout, start: int, codec: str) -> Iterator[tuple[dict[str, Any], Extent]]:
    """The whole trajectories of a shard from byte `start` on (0: from the first), each with its note.

    Ends silently at the first thing that is not a whole trajectory: a footer, or what a dying writer left.
    """
    with path.open("rb") as file:
        start = start or first_message(file.fileno())
        if start >= os.fstat(file.fileno()).st_size:
            return
        whole = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        while found := _next_trajectory(whole, layout, start, codec):
            note, starts, end = found
            yield note, locate(file.fileno(), layout, starts, end, codec)
            start = end


def is_finished(path: Path, end: int) -> bool:
    """Whether the shard, whose last trajectory ends at byte `end`, has its footer."""
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read()
    return tail[:8] == CONTINUATION + bytes(4) and tail.endswith(b"ARROW1")


def _next_trajectory(
    whole: pa.Buffer, layout: Layout, start: int, codec: str
) -> tuple[dict[str, Any], list[int], int] | None:
    """The trajectory whose first record batch is at byte `start`: its note, its record batches, its end."""
    header = layout.schema.serialize().to_pybytes()
    starts: list[int] = []
    note: dict[str, Any] = {}
    end, rows = start, 0
    while not starts or rows <= note["length"]:
        message = _message(whole, end)
        if message is None:
            return None
        try:
            with pa.ipc.open_stream(pa.py_buffer(header + message)) as reader:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            note = note or json.loads(metadata[NOTE_KEY])
            rows += batch.num_rows
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, StopIteration):
            return None
        starts.append(end)
        end += len(message)
    whole_batches = rows == note["length"] + 1 and (codec != "none" or len(starts) == 1)
    return (note, starts, end) if whole_batches else None


def _message(whole: pa.Buffer, start: int) -> bytes | None:
    """The encapsulated Arrow message at byte `start`; None where there is no whole one."""
    head = whole[start : start + 8].to_pybytes()
    if head[:4] != CONTINUATION or head[4:] in (b"", bytes(4)):
        return None  # garbage, or the marker that ends a finished shard
    reader = pa.BufferReader(whole[start:])
    try:
        pa.ipc.read_message(reader)
    except (pa.ArrowException, OSError, EOFError):
        return None
    return whole[start : start + reader.tell()].to_pybytes()


def _to_arrow(column: Column, values: np.ndarray, rows: int) -> pa.Array:
    """An Arrow array of `rows` rows: the values, and a null where nothing follows the last observation."""
    values = np.asarray(values, column.dtype)
    mask = None
    if len(values) < rows:
        mask = np.arange(rows) >= len(values)
        values = np.concatenate([values, np.zeros((rows - len(values), *column.shape), column.dtype)])
    if not column.shape:
        return pa.array(values, mask=mask)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    size = math.prod(column.shape)
    storage = pa.FixedSizeListArray.from_arrays(flat, size, mask=None if mask is None else pa.array(mask))
    return pa.ExtensionArray.from_storage(column.arrow_type, storage)


def _values(array: pa.Array) -> pa.Buffer:
    """The buffer that holds the values of a column."""
    primitive = array.storage.values if isinstance(array, pa.ExtensionArray) else array
    return primitive.buffers()[1]


def _from_arrow(column: Column, array: pa.Array) -> np.ndarray:
    flat = np.frombuffer(_values(array), column.dtype)
    values = flat[: len(array) * math.prod(column.shape)]
    try:
        return values.reshape(len(array), *column.shape)
    except ValueError:
        raise FormatError(f"A record batch has too few values of {column.name}.") from None
