"""A shard: many trajectories of one embodiment in one Arrow IPC file. Only this module knows where its bytes are.

A trajectory of T steps is T+1 rows: row t holds observation t and, for t < T, what was done after seeing it. The last
row's action, discount, … are null. Without a codec a trajectory is one record batch, so each of its columns is one
run of bytes in the file, and whoever knows where it starts reads any slice without Arrow. With a codec a trajectory
is cut into record batches of `Layout.chunk_rows` rows, each buffer of which is decompressed on its own.

The first record batch of a trajectory carries a note (JSON, custom metadata) that says what the catalog says: a
shard alone suffices to rebuild its part of the catalog. A shard whose writer died has no Arrow footer; it is still
an Arrow stream after its first 8 bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32

from gsa.errors import FormatError
from gsa.schema import Spec, Trajectory
from retrieval import message
from retrieval.files import BlockFile
from retrieval.layout import MAX_BYTES, SPEC_KEY, Column, Layout, arrays_of, has_column, require_codec

Wanted = Mapping[str, tuple[int, np.ndarray]]  # column → (first row, array [n, …] for n rows from there on)
Copy = Callable[[], None]
SHORT_BYTES = 1 << 14  # a copy that is faster than what it takes to put it off
MAX_SCHEMA_BYTES = 1 << 24
MAGIC_BYTES = 8  # "ARROW1" and padding, before the first message
NOTE_KEY = b"gsa:trajectory"
_SIZE = struct.Struct("<q")
_CODECS = {name: pa.Codec(name) for name in ("lz4", "zstd")}


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
        self.file = BlockFile(path)
        self.writer = pa.ipc.new_file(self.file, layout.schema, options=options)
        self.end = 0  # whole trajectories end here

    def write(self, trajectory: Trajectory, note: bytes) -> tuple[Extent, int]:
        """Appends a trajectory; some of it may be held back until `sync`.

        Returns where its record batches are, for `locate` after that, and the CRC-32 of the file's bytes up to its
        end, from the end of the trajectory before it or, for the first, from the beginning.
        """
        arrays, rows = arrays_of(trajectory), len(trajectory) + 1
        step = rows if self.codec == "none" else self.layout.chunk_rows
        starts = []
        if self.end:
            self.file.crc = 0
        for start in range(0, rows, step):
            batch = self._batch(arrays, start, min(start + step, rows))
            before = self.file.tell()
            self.writer.write_batch(batch, custom_metadata={NOTE_KEY: note} if start == 0 else None)
            starts.append(before)
        self.end = self.file.tell()
        return Extent(starts[0], self.end, tuple(starts)), self.file.crc

    def sync(self) -> None:
        self.file.flush()
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
            try:
                self.file.flush()
            finally:
                os.ftruncate(self.file.fileno(), min(end, os.fstat(self.file.fileno()).st_size))
                os.fsync(self.file.fileno())

    def _batch(self, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> pa.RecordBatch:
        columns = []
        for column in self.layout.columns:
            if column.name in arrays:
                columns.append(_to_arrow(column, arrays[column.name][start:stop], stop - start))
            else:
                columns.append(pa.nulls(stop - start, column.arrow_type))
        return pa.record_batch(columns, schema=self.layout.schema)


def first_message(memory: mmap.mmap) -> int:
    """Where the first record batch of a shard starts: after the magic and the schema message."""
    return MAGIC_BYTES + 8 + int.from_bytes(memory[MAGIC_BYTES + 4 : MAGIC_BYTES + 8], "little")


def locate(memory: mmap.mmap, layout: Layout, starts: Sequence[int], end: int, codec: str) -> Extent:
    """The extent of a trajectory whose record batches begin at `starts` (0: after the head of the shard) and end at
    `end`. Reads headers only; one of message.MALFORMED where there are none."""
    starts = (starts[0] or first_message(memory), *starts[1:])
    if codec != "none":
        return Extent(starts[0], end, tuple(starts))
    found = message.buffers(memoryview(memory), starts[0], end)
    return Extent(starts[0], end, tuple(found[i][0] for i in layout.buffers))


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
    columns = [c for c in layout.columns if has_column(has, c.name)]
    if codec == "none":
        return {c.name: view(memory, layout, extent.offsets, c.name, 0, c.rows(steps)) for c in columns}
    if (steps + 1) * sum(c.step_bytes for c in columns) > MAX_BYTES:
        raise FormatError(f"A trajectory of {steps} steps is larger than the {MAX_BYTES} bytes that are read at once.")
    out = {c.name: np.empty((c.rows(steps), *c.shape), c.dtype) for c in columns}
    _unpack(memory, layout, steps, extent, codec, {name: (0, array) for name, array in out.items()})
    return out


def view(memory: mmap.mmap, layout: Layout, offsets: Sequence[int], name: str, start: int, rows: int) -> np.ndarray:
    """Rows of a column of an uncompressed trajectory as an array on the mapped file; nothing is copied or read."""
    place = layout.place[name]
    column = layout.columns[place]
    first = offsets[place] + start * column.step_bytes if place < len(offsets) else -1
    if not 0 <= first <= first + rows * column.step_bytes <= len(memory):  # numpy's own check overflows
        raise FormatError(f"A trajectory's {name} lies outside its shard.")
    return np.ndarray((rows, *column.shape), column.dtype, memory, first)


def copies(memory: mmap.mmap, layout: Layout, steps: int, extent: Extent, codec: str, wanted: Wanted) -> list[Copy]:
    """Copies rows of columns that the trajectory has into the arrays given, if these are short; returns what does it
    for the others, to be called in any thread. With a codec it decompresses only the record batches and buffers that
    hold them. Raises FormatError, now or then."""
    if codec != "none":
        return [partial(_unpack, memory, layout, steps, extent, codec, wanted)]
    left: list[Copy] = []
    for name, (start, out) in wanted.items():
        source = view(memory, layout, extent.offsets, name, start, len(out))
        if out.nbytes <= SHORT_BYTES:
            out[...] = source
        else:
            left.append(partial(out.__setitem__, ..., source))
    return left


def _unpack(memory: mmap.mmap, layout: Layout, steps: int, extent: Extent, codec: str, wanted: Wanted) -> None:
    size, bounds, raw = layout.chunk_rows, (*extent.offsets, extent.end), memoryview(memory)
    first = min(start for start, _ in wanted.values()) // size
    last = -(-max(start + len(out) for start, out in wanted.values()) // size)
    for i in range(first, last):
        before, rows = i * size, min(size, steps + 1 - i * size)
        try:
            found = message.buffers(raw, bounds[i], bounds[i + 1])
            for name, (start, out) in wanted.items():
                low, high = max(start, before), min(start + len(out), before + rows)
                if low < high:
                    place = layout.place[name]
                    values = _decompress(raw, found[layout.buffers[place]], layout.columns[place], rows, codec)
                    out[low - start : high - start] = values[low - before : high - before]
        except (*message.MALFORMED, OSError, pa.ArrowException) as error:
            raise FormatError(f"Record batch {i} of a trajectory is damaged: {error}.") from None


def spec_of(path: Path) -> Spec | None:
    """The embodiment of a shard; None where its head is not whole."""
    try:
        return Spec.from_json(json.loads(schema_of(path).metadata[SPEC_KEY]))
    except (pa.ArrowException, OSError, EOFError, KeyError, TypeError, ValueError, RecursionError, FormatError):
        return None


def schema_of(path: Path) -> pa.Schema:
    """The schema at the head of a shard. FormatError, or what Arrow raises, where it is not whole; a size in it that is
    not true costs no memory."""
    with path.open("rb") as file:
        head = file.read(MAGIC_BYTES + 8)[MAGIC_BYTES:]
        size = int.from_bytes(head[4:], "little")
        if size > MAX_SCHEMA_BYTES:  # Arrow would make room for it first
            raise FormatError(f"{path} claims a schema of {size} bytes.")
        whole = pa.BufferReader(head + file.read(size))
    try:
        return pa.ipc.read_schema(whole)
    except MemoryError:  # another size in it that is not true
        raise FormatError(f"The schema of {path} is damaged.") from None


def scan(path: Path, layout: Layout, start: int, codec: str) -> Iterator[tuple[dict[str, Any], Extent, int]]:
    """The whole trajectories of a shard from byte `start` on (0: from the first): note, extent, CRC-32 as `write`
    gives them.

    Ends silently at the first thing that is not a whole trajectory: a footer, or what a dying writer left.
    """
    if start >= os.stat(path).st_size:
        return
    memory = map_file(path)
    begin, start = start, start or first_message(memory)
    while found := _next_trajectory(memory, layout, start, codec):
        note, extent = found
        yield note, extent, checksum(memory, begin, extent.end)
        begin = start = extent.end


def checksum(memory: mmap.mmap, start: int, end: int) -> int:
    """CRC-32 of bytes of a shard."""
    return crc32(memoryview(memory)[start:end])


def is_finished(path: Path, end: int) -> bool:
    """Whether the shard, whose last trajectory ends at byte `end`, has its footer."""
    with path.open("rb") as file:
        file.seek(end)
        after = file.read(8)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 6))
        return after == message.CONTINUATION + bytes(4) and file.read() == b"ARROW1"


def footer_problem(path: Path) -> str:
    """What keeps other readers of Arrow from opening a finished shard; nothing if nothing does."""
    memory = map_file(path)
    raw, end = memoryview(memory), first_message(memory)
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            if not reader.schema.equals(schema_of(path), check_metadata=True):
                return "its schema is not that of the shard"
        for place in message.blocks(raw):
            batch = message.record_batch(raw, end)
            if place != (batch.start, batch.end):
                return f"it has a record batch at byte {place[0]} instead of {batch.start}"
            end = batch.end
        return "" if raw[end : end + 8] == message.CONTINUATION + bytes(4) else "it lacks a record batch"
    except (pa.ArrowException, OSError, EOFError, FormatError, *message.MALFORMED) as error:
        return str(error)


def _next_trajectory(memory: mmap.mmap, layout: Layout, start: int, codec: str) -> tuple[dict[str, Any], Extent] | None:
    """The trajectory whose first record batch is at byte `start`, and its note; None where there is no whole one."""
    raw = memoryview(memory)
    try:
        batch = message.record_batch(raw, start)
        note, starts, rows = json.loads(batch.metadata[NOTE_KEY]), [start], batch.rows
        while codec != "none" and rows <= note["length"] and batch.rows == layout.chunk_rows:
            batch = message.record_batch(raw, batch.end)
            rows += batch.rows
            starts.append(batch.start)
        return (note, locate(memory, layout, starts, batch.end, codec)) if rows == note["length"] + 1 else None
    except (*message.MALFORMED, KeyError, TypeError, RecursionError):
        return None


def _decompress(raw: memoryview, place: tuple[int, int], column: Column, rows: int, codec: str) -> np.ndarray:
    """The values of a column in one record batch. The buffer begins with its size; −1 if it is not compressed."""
    (start, end), expected = place, rows * column.step_bytes
    (unpacked,) = _SIZE.unpack_from(raw, start)
    packed = raw[start + _SIZE.size : end]
    if unpacked == -1:
        values = packed
    elif unpacked == expected:
        values = _CODECS[codec].decompress(packed, expected)
    else:
        raise ValueError(f"{column.name} has {unpacked} bytes instead of {expected}")
    return np.ndarray((rows, *column.shape), column.dtype, values)


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
