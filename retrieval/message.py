"""Arrow's record batch messages as they lie in a file, read without Arrow: it would decompress what is not wanted, and
take memory for whatever sizes a file claims.

A message is `ff ff ff ff`, the bytes of its header, the header, the body. The header is a flatbuffer (Message.fbs in
Arrow's `format/`): each table begins with its distance to a list that says where its fields are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

CONTINUATION = b"\xff\xff\xff\xff"
RECORD_BATCH = 3  # in Message.header_type
MALFORMED = (struct.error, ValueError, IndexError)  # what reading garbage ends in
_U16, _I32, _I64 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<q")


@dataclass(slots=True)
class Buffers:
    """Where the buffers of a record batch are."""

    body: int
    end: int
    numbers: tuple[int, ...]  # place from `body` and bytes, in turns

    def __getitem__(self, i: int) -> tuple[int, int]:
        """The first byte of the i-th in the file, and the one after its last. One of MALFORMED if it is not there."""
        first, size = self.numbers[2 * i : 2 * i + 2]
        if first < 0 or size < 0 or self.body + first + size > self.end:
            raise ValueError("a buffer lies outside of it")
        return self.body + first, self.body + first + size


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """What the header at byte `start` says. Sizes are within the file; what they hold is not checked."""

    start: int
    end: int  # of the body
    rows: int
    metadata: dict[bytes, bytes]


def record_batch(raw: memoryview, start: int) -> RecordBatch:
    """The record batch message at byte `start` of a file, `raw`. One of MALFORMED where there is no whole one."""
    message, body = _message(raw, start)
    (end,) = _I64.unpack_from(raw, _field(raw, message, 3))
    end += body
    if not body <= end <= len(raw):
        raise ValueError("it is not whole")
    batch = _follow(raw, _field(raw, message, 2))
    (rows,) = _I64.unpack_from(raw, _field(raw, batch, 0))
    return RecordBatch(start, end, rows, _metadata(raw, message))


def buffers(raw: memoryview, start: int, end: int) -> Buffers:
    """The buffers of the record batch message at bytes start…end. One of MALFORMED where there is none."""
    message, body = _message(raw, start)
    batch = _follow(raw, _field(raw, message, 2))
    vector = _follow(raw, _field(raw, batch, 2))
    (count,) = _I32.unpack_from(raw, vector)
    if not (start < vector < body <= end <= len(raw) and 0 <= count <= (body - vector) // 16):
        raise ValueError("its header is not one")
    numbers = struct.unpack_from(f"<{2 * count}q", raw, vector + 4)
    return Buffers(body, end, numbers)


def blocks(raw: memoryview) -> list[tuple[int, int]]:
    """Where the footer of a whole Arrow file says that its record batches are: (first byte, end) of each."""
    (size,) = _I32.unpack_from(raw, len(raw) - 10)
    footer = _follow(raw, len(raw) - 10 - size)
    vector = _follow(raw, _field(raw, footer, 3))
    (count,) = _I32.unpack_from(raw, vector)
    if not 0 <= count <= (len(raw) - vector) // 24:
        raise ValueError("its footer is none")
    found = [struct.unpack_from("<qi4xq", raw, vector + 4 + 24 * i) for i in range(count)]
    return [(offset, offset + header + body) for offset, header, body in found]


def _message(raw: memoryview, start: int) -> tuple[int, int]:
    """Where the table of the message at byte `start` is, and where its body begins."""
    (size,) = _I32.unpack_from(raw, start + 4)
    root = start + 8
    if raw[start : start + 4] != CONTINUATION or not 0 < size <= len(raw) - root:
        raise ValueError("no message begins here")
    message = _follow(raw, root)
    if raw[_field(raw, message, 1)] != RECORD_BATCH:
        raise ValueError("it is no record batch")
    return message, root + size


def _metadata(raw: memoryview, message: int) -> dict[bytes, bytes]:
    try:
        vector = _follow(raw, _field(raw, message, 4))
    except _Absent:
        return {}
    (count,) = _I32.unpack_from(raw, vector)
    if not 0 <= count <= 64:
        raise ValueError("its metadata is none")
    pairs = [_follow(raw, vector + 4 + 4 * i) for i in range(count)]
    return {_string(raw, _field(raw, pair, 0)): _string(raw, _field(raw, pair, 1)) for pair in pairs}


def _string(raw: memoryview, at: int) -> bytes:
    at = _follow(raw, at)
    (size,) = _I32.unpack_from(raw, at)
    if not 0 <= size <= len(raw) - at - 4:
        raise ValueError("a text is longer than the file")
    return bytes(raw[at + 4 : at + 4 + size])


def _follow(raw: memoryview, at: int) -> int:
    """Where the reference at byte `at` leads: always onward."""
    (distance,) = _I32.unpack_from(raw, at)
    if distance <= 0:
        raise ValueError("its header is not one")
    return at + distance


def _field(raw: memoryview, table: int, number: int) -> int:
    """Where a field of a table is. _Absent if the table does not have it."""
    places = table - _I32.unpack_from(raw, table)[0]
    if places < 0:
        raise ValueError("its header is not one")
    at = 4 + 2 * number
    place = _U16.unpack_from(raw, places + at)[0] if at < _U16.unpack_from(raw, places)[0] else 0
    if not place:
        raise _Absent("its header lacks a field")
    return table + place


class _Absent(ValueError):
    pass
