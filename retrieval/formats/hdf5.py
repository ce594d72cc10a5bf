"""HDF5 from anywhere: nothing is followed out of the file, and sizes are known before anything is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import FormatError
from retrieval.formats.extras import need
from retrieval.formats.source import MAX_BYTES, MAX_STEPS

AT_A_TIME = 1 << 26  # bytes of rows read at a time
MAX_CHUNK = 1 << 28  # bytes of a chunk unpacked: HDF5 holds one in memory
MAX_TEXT = 1 << 24
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnicodeError, OverflowError)


class Node:
    """A group of a file. Only what is in the file itself can be reached: links elsewhere are refused."""

    def __init__(self, group: Any, path: str) -> None:
        self._group, self.path = group, path

    @classmethod
    def open(cls, path: Path) -> Node:
        """The root. FormatError for what is not HDF5."""
        h5py = need("h5py", "robomimic")
        try:
            return cls(h5py.File(path, "r"), path.name)
        except UNREADABLE as error:
            raise FormatError(f"{path.name} is not readable HDF5: {error}.") from None

    def names(self) -> list[str]:
        return self._guarded(lambda: [str(name) for name in self._group])

    def __contains__(self, name: str) -> bool:
        return self._guarded(lambda: name in self._group)

    def node(self, name: str) -> Node:
        """A group in it."""
        found = self._get(name)
        if not isinstance(found, need("h5py", "robomimic").Group):
            raise FormatError(f"{self.path}/{name} is not a group.")
        return Node(found, f"{self.path}/{name}")

    def array(self, name: str) -> Array:
        """A dataset in it whose layout is sound: checked, not yet read."""
        found = self._get(name)
        if not isinstance(found, need("h5py", "robomimic").Dataset):
            raise FormatError(f"{self.path}/{name} is not a dataset.")
        return self._guarded(lambda: Array(found, f"{self.path}/{name}"))

    def is_group(self, name: str) -> bool:
        return isinstance(self._get(name), need("h5py", "robomimic").Group)

    def attribute(self, name: str) -> Any:
        """A number or text; None where there is none."""

        def read() -> Any:
            if name not in self._group.attrs:
                return None
            if self._group.attrs.get_id(name).get_storage_size() > MAX_TEXT:
                raise FormatError(f"The attribute {name} of {self.path} is too large.")
            return self._group.attrs[name]

        return self._guarded(read)

    def close(self) -> None:
        self._group.file.close()

    def _get(self, name: str) -> Any:
        h5py = need("h5py", "robomimic")
        if "/" in name or name in ("", ".", ".."):
            raise FormatError(f"'{name}' is not a name in {self.path}.")

        def get() -> Any:
            if name not in self._group:
                raise FormatError(f"{self.path} has no {name}.")
            if not isinstance(self._group.get(name, getlink=True), h5py.HardLink):
                raise FormatError(f"{self.path}/{name} is a link to elsewhere; links are not followed.")
            return self._group[name]

        return self._guarded(get)

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except UNREADABLE as error:
            raise FormatError(f"{self.path} cannot be read: {error}.") from None


class Array:
    """A dataset: [rows, …] numbers, or rows of bytes of any length."""

    def __init__(self, dataset: Any, path: str) -> None:
        h5py = need("h5py", "robomimic")
        self._dataset, self.path = dataset, path
        if dataset.external or dataset.is_virtual:
            raise FormatError(f"{path} lies in another file; that is not followed.")
        self.ragged = h5py.check_vlen_dtype(dataset.dtype) == np.uint8 and dataset.ndim == 1
        self.shape, self.dtype = tuple(int(n) for n in dataset.shape or ()), dataset.dtype
        if not self.ragged and (self.dtype.kind not in "fuib" or self.dtype.itemsize > 8 or not self.shape):
            raise FormatError(f"{path} is {list(self.shape)} {self.dtype}; rows of numbers are needed.")
        if not 0 < self.shape[0] <= MAX_STEPS or any(n < 1 for n in self.shape):
            raise FormatError(f"{path} has the shape {list(self.shape)}.")
        if dataset.chunks is not None and math.prod(dataset.chunks) * self.dtype.itemsize > MAX_CHUNK:
            raise FormatError(f"{path} is in chunks of {list(dataset.chunks)}; they are too large.")

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All of it: [rows, …], at most MAX_BYTES."""
        if self.ragged or self.shape[0] * self.row_bytes > MAX_BYTES:
            raise FormatError(f"{self.path} is {list(self.shape)} {self.dtype}: too much, or of no fixed size.")
        return self._rows(0, self.shape[0])

    def blocks(self, last: int | None = None) -> Iterator[np.ndarray]:
        """Its rows, or the first `last` of them, a block of bounded size at a time."""
        if self.row_bytes > AT_A_TIME:
            raise FormatError(f"{self.path} has rows of {self.row_bytes} bytes.")
        step = 1 if self.ragged else max(1, AT_A_TIME // self.row_bytes)
        chunk = (self._dataset.chunks or (1,))[0]
        step = max(step // chunk, 1) * chunk  # a chunk is unpacked once
        stop = self.shape[0] if last is None else min(last, self.shape[0])
        for start in range(0, stop, step):
            yield self._rows(start, min(start + step, stop))

    def tail(self) -> np.ndarray:
        """Its last row: [1, …]."""
        return self._rows(self.shape[0] - 1, self.shape[0])

    def _rows(self, start: int, stop: int) -> np.ndarray:
        try:
            return self._dataset[start:stop]
        except UNREADABLE as error:
            raise FormatError(f"{self.path} cannot be read: {error}.") from None
