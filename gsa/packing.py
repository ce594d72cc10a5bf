"""Tensors as bytes: a JSON manifest and chunks of raw memory. No pickle, nothing that a reader executes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsa.errors import FormatError
from gsa.schema import WeightSnapshot

FORMAT = 1
CHUNK_BYTES = 8 << 20
ALIGN = 64  # of each tensor within the whole, so that views of it are aligned
MAX_BYTES = 16 << 30  # a manifest that claims more is refused before memory is taken
DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool", "bfloat16")


@dataclass(frozen=True)
class Packed:
    """A snapshot's tensors, copied and ready for the wire."""

    version: int
    chunks: tuple[memoryview, ...]
    entries: tuple[tuple[str, str, list[int], int], ...]  # name, dtype, shape, offset of each tensor
    meta: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(c) for c in self.chunks)

    def manifest(self, epoch: int) -> bytes:
        return json.dumps({
            "format": FORMAT, "epoch": epoch, "version": self.version, "bytes": self.size, "chunk_bytes": CHUNK_BYTES,
            "crc32": [zlib.crc32(c) for c in self.chunks], "tensors": self.entries, "meta": dict(self.meta),
        }).encode()  # fmt: skip


def pack(snapshot: WeightSnapshot, bf16: bool = False) -> Packed:
    """A copy of the snapshot. With `bf16`, float32 tensors of two or more axes are rounded to bfloat16; biases and
    norms are not. FormatError for a dtype or meta that cannot be published."""
    tensors, entries, end = [], [], 0
    for name, tensor in snapshot.tensors.items():
        narrow = bf16 and tensor.dtype == np.float32 and tensor.ndim >= 2
        dtype = "bfloat16" if narrow else str(tensor.dtype)
        if dtype not in DTYPES:
            raise FormatError(f"Tensor {name} is of dtype {dtype}; published are {', '.join(DTYPES)}.")
        entries.append((name, dtype, list(tensor.shape), end))
        tensors.append(to_bfloat16(tensor) if narrow else tensor)
        end += -(-tensors[-1].nbytes // ALIGN) * ALIGN
    whole = np.zeros(end, np.uint8)
    for (_, _, shape, offset), tensor in zip(entries, tensors, strict=True):
        whole[offset : offset + tensor.nbytes].view(tensor.dtype).reshape(shape)[...] = tensor
    memory = memoryview(whole)
    chunks = tuple(memory[i : i + CHUNK_BYTES] for i in range(0, end, CHUNK_BYTES))
    return Packed(snapshot.version, chunks, tuple(entries), _plain(snapshot.meta))


def unpack(manifest: bytes, fetch: Callable[[int], bytes | None]) -> WeightSnapshot | None:
    """The snapshot that `manifest` describes, each chunk asked of `fetch` in turn; None where one is gone.

    The manifest and the chunks are not trusted: FormatError where they do not fit together. Tensors are read-only.
    """
    data = _read_manifest(manifest)
    whole, step = np.empty(data["bytes"], np.uint8), data["chunk_bytes"]
    for i, crc in enumerate(data["crc32"]):
        chunk, part = fetch(i), whole[i * step : (i + 1) * step]
        if chunk is None:
            return None
        if len(chunk) != len(part) or zlib.crc32(chunk) != crc:
            raise FormatError(f"Chunk {i} of version {data['version']} is damaged.")
        part[:] = np.frombuffer(chunk, np.uint8)
    tensors = {name: _view(whole, dtype, shape, offset) for name, dtype, shape, offset in data["tensors"]}
    return WeightSnapshot(data["version"], tensors, {**data["meta"], "epoch": data["epoch"]})


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 → the upper halves of their bits as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)  # rounding could carry a NaN into infinity or zero


def from_bfloat16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(meta))))
    except (TypeError, ValueError) as error:
        raise FormatError(f"The meta of a snapshot must be plain data: {error}.") from None


def _read_manifest(manifest: bytes) -> dict[str, Any]:
    try:
        data = json.loads(manifest)
        if data["format"] != FORMAT:
            raise FormatError(f"Weights of format {data['format']!r}; this is format {FORMAT}.")
        chunks = len(data["crc32"])
        sizes = (data["epoch"], data["version"], data["bytes"], data["chunk_bytes"] - 1)
        if not all(type(n) is int and n >= 0 for n in sizes) or not isinstance(data["meta"], Mapping):
            raise ValueError("a size is not a natural number")
        if data["bytes"] > MAX_BYTES or chunks != -(-data["bytes"] // data["chunk_bytes"]):
            raise ValueError(f"{chunks} chunks for {data['bytes']} bytes")
        for name, dtype, shape, offset in data["tensors"]:
            if not isinstance(name, str) or dtype not in DTYPES:
                raise ValueError(f"tensor {name!r} of dtype {dtype!r}")
            if not all(type(n) is int and n >= 0 for n in (*shape, offset)) or offset % ALIGN:
                raise ValueError(f"tensor {name} of shape {shape} at {offset}")
            if offset + math.prod(shape) * _stored(dtype).itemsize > data["bytes"]:
                raise ValueError(f"tensor {name} goes past the end")
        return dict(data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"Not a manifest of weights: {error!r}.") from None


def _stored(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _view(whole: np.ndarray, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    stored = _stored(dtype)
    flat = whole[offset : offset + math.prod(shape) * stored.itemsize].view(stored)
    values = (from_bfloat16(flat) if dtype == "bfloat16" else flat).reshape(shape)
    values.flags.writeable = False
    return values
