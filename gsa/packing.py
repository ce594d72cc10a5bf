"""Tensors as bytes: a JSON manifest and chunks of raw memory. No pickle, nothing that a reader executes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from isal.isal_zlib import crc32

from gsa.errors import FormatError
from gsa.schema import BFLOAT16, WeightSnapshot

FORMAT = 1
CHUNK_BYTES = 8 << 20
ALIGN = 64  # of each tensor within the whole, so that views of it are aligned
MAX_BYTES = 16 << 30  # a manifest that claims more is refused before memory is taken
MAX_AXES = 32
DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool", "bfloat16")


@dataclass(frozen=True)
class Packed:
    """A snapshot's tensors, copied and ready for the wire."""

    version: int
    memory: np.ndarray  # [bytes] uint8, of this alone
    entries: tuple[tuple[str, str, list[int], int], ...]  # name, dtype, shape, offset of each tensor
    meta: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.memory)

    @property
    def chunks(self) -> list[memoryview]:
        whole = memoryview(self.memory)
        return [whole[i : i + CHUNK_BYTES] for i in range(0, self.size, CHUNK_BYTES)]

    def manifest(self, epoch: int, checksums: Sequence[int] | None = None) -> bytes:
        """`checksums`: of the chunks, where they are known already."""
        checks = [crc32(c) for c in self.chunks] if checksums is None else list(checksums)
        return json.dumps({
            "format": FORMAT, "epoch": epoch, "version": self.version, "bytes": self.size, "chunk_bytes": CHUNK_BYTES,
            "crc32": checks, "tensors": self.entries, "meta": dict(self.meta),
        }).encode()  # fmt: skip


def pack(snapshot: WeightSnapshot, room: Callable[[int], np.ndarray] | None = None) -> Packed:
    """A copy of the snapshot, in `room(bytes)` if given: uint8 [bytes], overwritten. FormatError for a dtype or meta
    that cannot be published."""
    meta, entries, end = _plain(snapshot.meta), [], 0
    for name, tensor in snapshot.tensors.items():
        dtype = "bfloat16" if tensor.dtype == BFLOAT16 else str(tensor.dtype)
        if dtype not in DTYPES:
            raise FormatError(f"Tensor {name} is of dtype {dtype}; published are {', '.join(DTYPES)}.")
        entries.append((name, dtype, list(tensor.shape), end))
        end += _aligned(tensor.nbytes)
    whole = np.empty(end, np.uint8) if room is None else room(end)
    for (_, dtype, shape, offset), tensor in zip(entries, snapshot.tensors.values(), strict=True):
        _bits(_view(whole, dtype, shape, offset))[...] = _bits(tensor)
        whole[offset + tensor.nbytes : offset + _aligned(tensor.nbytes)] = 0
    return Packed(snapshot.version, whole, tuple(entries), meta)


class Room(Protocol):
    """Where what is received goes."""

    def reserve(self, size: int) -> None:
        """So many bytes will come, in place of what was there."""

    def write(self, at: int, part: memoryview) -> None:
        """Copies `part` to byte `at`."""


def receive(
    manifest: bytes, order: tuple[int, int], fetch: Callable[[int, int], tuple[memoryview, int] | None], room: Room
) -> bytes | None:
    """Fetches what `manifest` describes into `room`. It must be of the epoch and version of `order`.

    `fetch(i, size)` gives chunk i, which should have that size, and its CRC-32, good until it is called again; None
    where it is gone, and then this is None too. Manifest and chunks are not trusted: FormatError where they do not
    fit together. Returns the description that `snapshot` takes with the memory.
    """
    data = _read_manifest(manifest)
    if (data["epoch"], data["version"]) != order:
        raise FormatError(f"The manifest of version {order[1]} is that of {data['version']}.")
    room.reserve(data["bytes"])
    for i, expected in enumerate(data["crc32"]):
        at = i * data["chunk_bytes"]
        size = min(data["chunk_bytes"], data["bytes"] - at)
        if (fetched := fetch(i, size)) is None:
            return None
        chunk, checksum = fetched
        if len(chunk) != size or checksum != expected:
            raise FormatError(f"Chunk {i} of version {data['version']} is damaged.")
        room.write(at, chunk)
    return json.dumps({key: data[key] for key in ("epoch", "version", "meta", "tensors")}).encode()


def snapshot(description: bytes, whole: np.ndarray) -> WeightSnapshot:
    """The snapshot whose tensors lie in `whole` [bytes], as views; they are read-only."""
    data = json.loads(description)
    tensors = {name: _view(whole, dtype, shape, offset) for name, dtype, shape, offset in data["tensors"]}
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return WeightSnapshot(data["version"], tensors, {**data["meta"], "epoch": data["epoch"]})


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
        room = data["bytes"]
        for name, dtype, shape, offset in data["tensors"]:
            if not isinstance(name, str) or dtype not in DTYPES:
                raise ValueError(f"tensor {name!r} of dtype {dtype!r}")
            if not all(type(n) is int and n >= 0 for n in (*shape, offset)) or offset % ALIGN:
                raise ValueError(f"tensor {name} of shape {shape} at {offset}")
            if len(shape) > MAX_AXES or math.prod(n or 1 for n in shape) > MAX_BYTES:  # also one with nothing in it
                raise ValueError(f"tensor {name} of shape {shape}")
            size = math.prod(shape) * _stored(dtype).itemsize
            room -= _aligned(size)
            if offset + size > data["bytes"] or room < 0:
                raise ValueError(f"tensor {name} goes past the end, or overlaps others")
        return dict(data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"Not a manifest of weights: {error!r}.") from None


def _stored(dtype: str) -> np.dtype:
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _bits(array: np.ndarray) -> np.ndarray:
    """The array, or that of a BFLOAT16's bits, which is copied many times faster."""
    return array["bfloat16"] if array.dtype == BFLOAT16 else array


def _view(whole: np.ndarray, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    size = math.prod(shape) * _stored(dtype).itemsize
    return whole[offset : offset + size].view(_stored(dtype)).reshape(shape)
