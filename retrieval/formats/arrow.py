"""Minari's Arrow and parquet episodes: a folder each, of files whose columns have T+1 rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gsa.errors import FormatError
from retrieval.formats.source import MAX_BYTES, MAX_STEPS

if TYPE_CHECKING:
    from retrieval.formats.minari import Leaf

UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
IMAGE_ROWS = 64  # encoded images handed over at a time


class ArrowEpisodes:
    """The folders 0, 1, … of a dataset."""

    def __init__(self, folder: Path, data_format: str) -> None:
        self._folder, self._suffix = folder, data_format
        names = [p.name for p in folder.iterdir() if p.name.isascii() and p.name.isdigit() and p.is_dir()]
        self._numbers = sorted(int(name) for name in names)
        self._table = lru_cache(1)(self._read)

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return f"episode {self._numbers[index]}"

    def steps(self, index: int) -> int:
        return int(self._table(index).num_rows) - 1

    def metadata(self, index: int) -> Mapping[str, Any]:
        path = self._folder / str(self._numbers[index]) / "metadata.json"
        try:
            found = json.loads(path.read_bytes()) if path.stat().st_size < 1 << 24 else {}
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"{path} cannot be read: {error}.") from None
        return found if isinstance(found, dict) else {}

    def blocks(self, index: int, path: tuple[str, ...], leaf: Leaf, rows: int) -> Iterator[np.ndarray]:
        try:
            column = self._table(index).column(path[0]).combine_chunks()
            for part in path[1:]:
                column = column.field(part)
            column = column[:rows]
            if len(column) != rows or column.null_count:
                raise FormatError(f"{'/'.join(path)} has {len(column)} rows, or gaps; {rows} are needed.")
            return _encoded(column) if leaf.encoded else iter([_numbers(column, leaf)])
        except UNREADABLE as error:
            raise FormatError(f"{self.name(index)}: {'/'.join(path)} cannot be read: {error}.") from None

    def _read(self, index: int) -> pa.Table:
        folder = self._folder / str(self._numbers[index])
        try:
            files = sorted(p for p in folder.iterdir() if p.suffix == f".{self._suffix}" and p.is_file())
            if len(files) != 1:
                raise FormatError(f"{self.name(index)} has {len(files)} .{self._suffix} files; one is needed.")
            table = _parquet(files[0]) if self._suffix == "parquet" else _ipc(files[0])
        except UNREADABLE as error:
            raise FormatError(f"{self.name(index)} cannot be read: {error}.") from None
        if not 2 <= table.num_rows <= MAX_STEPS or table.nbytes > 4 * MAX_BYTES:
            raise FormatError(f"{self.name(index)} has {table.num_rows} rows, {table.nbytes} bytes.")
        return table


def _ipc(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    table.validate(full=True)
    return table


def _parquet(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > 4 * MAX_BYTES or file.metadata.num_rows > MAX_STEPS:
            raise FormatError(f"{path.name} is too large for an episode.")
        table = file.read()
    table.validate(full=True)
    return table


def _numbers(column: pa.Array, leaf: Leaf) -> np.ndarray:
    """[rows, …] of fixed-size lists, or of plain numbers."""
    if pa.types.is_boolean(column.type):
        return column.to_numpy(zero_copy_only=False)
    if not pa.types.is_fixed_size_list(column.type):
        values = column.to_numpy(zero_copy_only=False)
        if values.dtype.kind not in "fuib" or leaf.shape not in ((), (1,)):
            raise FormatError(f"A column is {column.type}; {list(leaf.shape)} numbers a row are needed.")
        return values
    if not pa.types.is_primitive(column.type.value_type):
        raise FormatError(f"A column is {column.type}.")
    flat = column.flatten()
    if flat.null_count:
        raise FormatError("A column has gaps.")
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), *leaf.shape)


def _encoded(column: pa.Array) -> Iterator[Any]:
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise FormatError(f"A column of images is {column.type}.")
    return (column[start : start + IMAGE_ROWS].to_pylist() for start in range(0, len(column), IMAGE_ROWS))
