"""The catalog's log: a line a trajectory, `<crc-32 of the rest> <JSON>`.

A line that is torn or damaged is known by its checksum, and as each line carries its row number, rows never move,
whatever is lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from retrieval.files import WholeFile, replace_file
from retrieval.shard import Extent

MAX_LINE = 16 << 20  # bytes: a log without an end of line does not fill memory
MIN_LINE = 64  # no line is shorter, so that a row's number is bounded by the log's length
LIMITS = {
    "row": (0, 2**62), "length": (0, 2**31), "has": (0, 2**8), "crc": (0, 2**32), "stored_crc": (0, 2**32),
    "shard": (-1, 2**31), "start": (0, 2**62), "end": (0, 2**62),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the catalog. `embodiment` is empty where the row is lost and nothing else is known of it."""

    row: int
    id: str = ""
    embodiment: str = ""
    source: str = ""
    length: int = 0
    has: int = 0
    crc: int = 0  # of the content
    stored_crc: int = 0  # of the bytes in the shard
    shard: int = -1
    start: int = 0
    end: int = 0
    offsets: tuple[int, ...] = ()
    stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def extent(self) -> Extent:
        return Extent(self.start, self.end, self.offsets)

    def line(self) -> bytes:
        text = json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)

    @classmethod
    def parse(cls, line: bytes) -> Record | None:
        """The record of a whole line; None where it is torn or damaged."""
        crc, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            return None
        try:
            return cls.of(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None

    @classmethod
    def of(cls, data: Mapping[str, object]) -> Record:
        """The record of a JSON object from a file. ValueError or TypeError where it is none."""
        if not isinstance(data, dict):
            raise TypeError("not a record")
        offsets, stats = data.get("offsets", []), data.get("stats", {})
        if not isinstance(offsets, list) or not isinstance(stats, dict):
            raise TypeError("not a record")
        record = cls(**{**data, "offsets": tuple(offsets), "stats": stats})
        numbers = [(getattr(record, name), *limits) for name, limits in LIMITS.items()]
        numbers += [(offset, 0, 2**62) for offset in offsets]
        if not all(type(n) is int and low <= n < high for n, low, high in numbers):
            raise ValueError("a number is out of its range")
        if not all(type(text) is str for text in (record.id, record.embodiment, record.source, *stats)):
            raise TypeError("a text is none")
        if not all(type(value) in (int, float) for value in stats.values()):
            raise TypeError("a statistic is not a number")
        return record


class Log:
    """The catalog's file: reads whole lines from where it stopped, appends durably."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self._inode = os.stat(path).st_ino

    def read(self) -> Iterator[tuple[Record | None, int]]:
        """Each whole line after `position`, as (record, its first byte); None for a damaged one. A torn last line
        is not read: it may still be growing."""
        for line, start in self.lines(self.position):
            self.position = start + len(line)
            record = Record.parse(line)
            yield record if record is None or record.row * MIN_LINE <= start else None, start

    def lines(self, start: int = 0) -> Iterator[tuple[bytes, int]]:
        """The lines from byte `start` on that have an end, each with its first byte."""
        with self.path.open("rb") as file:
            file.seek(start)
            while (line := file.readline(MAX_LINE)) and (line.endswith(b"\n") or len(line) == MAX_LINE):
                yield line, start
                start += len(line)

    def size(self) -> int:
        return os.stat(self.path).st_size

    def replaced(self) -> bool:
        """Whether the file is no longer the one that was read."""
        now = os.stat(self.path)
        return now.st_ino != self._inode or now.st_size < self.position

    def before(self, position: int) -> bytes:
        """The last bytes before `position`: the end of a line that no other log has there."""
        with self.path.open("rb") as file:
            file.seek(max(0, position - 256))
            return file.read(min(256, position))

    def cut(self) -> int:
        """Cuts a torn last line; returns its bytes."""
        torn = max(0, self.size() - self.position)
        if torn:
            os.truncate(self.path, self.position)
        return torn

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Puts a new log in the place of this one."""
        with replace_file(self.path) as file:
            file.writelines(lines)
        self.position, self._inode = self.size(), os.stat(self.path).st_ino

    def append(self, lines: bytes) -> None:
        """Durable when it returns; on failure the log is as it was."""
        with WholeFile(self.path, "r+") as file:
            try:
                file.seek(self.position)
                file.write(lines)
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), self.position)
                raise
        self.position += len(lines)
