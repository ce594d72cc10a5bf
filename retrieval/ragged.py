"""Values of no fixed size, one a row, without an object for each: ten million rows cost what their bytes do."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator

import numpy as np


class Ragged:
    """Byte strings by row, end to end in one run of memory. Those of a snapshot stay where they are, mapped; those
    appended since are behind them."""

    def __init__(self, ends: np.ndarray | None = None, data: np.ndarray | None = None) -> None:
        """`ends` [N] int64, where each value ends in `data` [bytes] uint8; both may be mapped."""
        self._ends = np.zeros(0, np.int64) if ends is None else ends
        self._data = np.zeros(0, np.uint8) if data is None else data
        self._new_ends, self._new = array("q"), bytearray()
        self._replaced: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._ends) + len(self._new_ends)

    @property
    def appended(self) -> int:
        """Values that are not in the snapshot."""
        return len(self._new_ends)

    def __getitem__(self, row: int) -> bytes:
        if row in self._replaced:
            return self._replaced[row]
        new = row - len(self._ends)
        if new >= 0:
            return bytes(self._new[self._new_ends[new - 1] if new else 0 : self._new_ends[new]])
        return self._data[self._ends[row - 1] if row else 0 : self._ends[row]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        if self._replaced:
            return (self[row] for row in range(len(self)))
        ends, data = (np.concatenate(parts) for parts in self.parts())
        bounds = itertools.pairwise(itertools.chain([0], map(int, ends)))
        whole = memoryview(data)
        return (bytes(whole[start:end]) for start, end in bounds)

    def append(self, value: bytes) -> None:
        self._new += value
        self._new_ends.append(len(self._new))

    def replace(self, row: int, value: bytes) -> None:
        self._replaced[row] = value

    def check(self) -> None:
        """Raises ValueError where `ends` and `data` of a snapshot do not fit together."""
        if np.any(np.diff(self._ends, prepend=0) < 0) or (self._ends[-1] if len(self._ends) else 0) != len(self._data):
            raise ValueError("ends that do not fit")

    def parts(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """`ends` and `data` of all rows, each as arrays to be joined."""
        if self._replaced:
            values = [self[row] for row in range(len(self))]
            return [np.cumsum([len(v) for v in values], dtype=np.int64)], [np.frombuffer(b"".join(values), np.uint8)]
        new = np.array(self._new_ends, np.int64) + len(self._data)
        return [self._ends, new], [self._data, np.frombuffer(bytes(self._new), np.uint8)]


class Rows:
    """The row of each value of a Ragged: a hash table of two sorted arrays, 16 bytes a row. The last of equal values
    wins."""

    FRESH = 1 << 16  # values kept aside before the arrays are made anew

    def __init__(self, values: Ragged) -> None:
        self.values = values
        self._hashes, self._rows = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._fresh: dict[bytes, int] = {}
        self._fold(np.fromiter(map(hash, values), np.int64, len(values)), np.arange(len(values)))

    def add(self, value: bytes, row: int) -> None:
        self._fresh[value] = row
        if len(self._fresh) > self.FRESH:
            fresh, self._fresh = self._fresh, {}
            rows = np.fromiter(fresh.values(), np.int64, len(fresh))
            self._fold(np.fromiter(map(hash, fresh), np.int64, len(fresh)), rows)

    def find(self, value: bytes) -> int | None:
        if value in self._fresh:
            return self._fresh[value]
        first = np.searchsorted(self._hashes, hash(value), "left")
        end = np.searchsorted(self._hashes, hash(value), "right")
        rows = self._rows[first:end].tolist()
        return max((row for row in rows if self.values[row] == value), default=None)

    def _fold(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        hashes, rows = np.concatenate([self._hashes, hashes]), np.concatenate([self._rows, rows])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], rows[order]
