"""Tensors as bytes: a JSON manifest and chunks of raw memory. No pickle, nothing that a reader executes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsa.errors import FormatError
from gsa.schema import WeightSnapshot

FORMAT = 1
CHUNK_BYTES = 8 << 20
ALIGN = 64  # of each tensor within the whole, so that views of it are aligned
BLOCK = 1 << 15  # values that are rounded at a time
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

    def manifest(self, epoch: int, checksums: Sequence[int] | None = None) -> bytes:
        """`checksums`: of the chunks, where they are known already."""
        crc32 = [zlib.crc32(c) for c in self.chunks] if checksums is None else list(checksums)
        return json.dumps({
            "format": FORMAT, "epoch": epoch, "version": self.version, "bytes": self.size, "chunk_bytes": CHUNK_BYTES,
            "crc32": crc32, "tensors": self.entries, "meta": dict(self.meta),
        }).encode()  # fmt: skip


def pack(snapshot: WeightSnapshot, bf16: bool = False) -> Packed:
    """A copy of the snapshot. With `bf16`, float32 tensors of two or more axes are rounded to bfloat16; biases and
    norms are not. FormatError for a dtype or meta that cannot be published."""
    entries, end = [], 0
    for name, tensor in snapshot.tensors.items():
        narrow = bf16 and tensor.dtype == np.float32 and tensor.ndim >= 2
        dtype = "bfloat16" if narrow else str(tensor.dtype)
        if dtype not in DTYPES:
            raise FormatError(f"Tensor {name} is of dtype {dtype}; published are {', '.join(DTYPES)}.")
        entries.append((name, dtype, list(tensor.shape), end))
        end += -(-tensor.size * _stored(dtype).itemsize // ALIGN) * ALIGN
    whole = np.zeros(end, np.uint8)
    for (_, dtype, shape, offset), tensor in zip(entries, snapshot.tensors.values(), strict=True):
        into = _view(whole, dtype, shape, offset)
        if dtype == "bfloat16":
            to_bfloat16(tensor, into)
        else:
            into[...] = tensor
    memory = memoryview(whole)
    chunks = tuple(memory[i : i + CHUNK_BYTES] for i in range(0, end, CHUNK_BYTES))
    return Packed(snapshot.version, chunks, tuple(entries), _plain(snapshot.meta))


def receive(
    manifest: bytes, order: tuple[int, int], fetch: Callable[[int, memoryview], int | None],
    room: Callable[[int], np.ndarray],
) -> bytes | None:  # fmt: skip
    """Fetches what `manifest` describes into `room(bytes)`, widened to float32 where it came as bfloat16. It must
    be of the epoch and version of `order`.

    `fetch(i, into)` fills `into` with chunk i and gives its CRC-32, or -1 where it is of another length; None where it
    is gone, and then this is None too. Manifest and chunks are not trusted: FormatError where they do not fit together.
    Returns the description that `snapshot` takes with the memory.
    """
    data = _read_manifest(manifest)
    if (data["epoch"], data["version"]) != order:
        raise FormatError(f"The manifest of version {order[1]} is that of {data['version']}.")
    widened = _widened(data)
    narrow = widened["tensors"] != data["tensors"]
    whole, step = np.empty(data["bytes"], np.uint8) if narrow else room(data["bytes"]), data["chunk_bytes"]
    for i, expected in enumerate(data["crc32"]):
        if (checksum := fetch(i, memoryview(whole)[i * step : (i + 1) * step])) is None:
            return None
        if checksum != expected:
            raise FormatError(f"Chunk {i} of version {data['version']} is damaged.")
    if narrow:
        _widen(whole, data["tensors"], room(widened["bytes"]), widened["tensors"])
    return json.dumps(widened).encode()


def snapshot(description: bytes, whole: np.ndarray) -> WeightSnapshot:
    """The snapshot whose tensors lie in `whole` [bytes], as views; they are read-only."""
    data = json.loads(description)
    tensors = {name: _view(whole, dtype, shape, offset) for name, dtype, shape, offset in data["tensors"]}
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return WeightSnapshot(data["version"], tensors, {**data["meta"], "epoch": data["epoch"]})


def to_bfloat16(values: np.ndarray, into: np.ndarray) -> None:
    """float32 → the upper halves of their bits as uint16, rounded to nearest even, into contiguous memory."""
    flat, out = np.ascontiguousarray(values).reshape(-1), into.reshape(-1)
    room = np.empty(min(BLOCK, flat.size), np.uint32)
    for i in range(0, flat.size, BLOCK):  # what fits into the cache at a time
        part = flat[i : i + BLOCK]
        bits, rounded = part.view(np.uint32), room[: part.size]
        np.right_shift(bits, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        out[i : i + BLOCK] = rounded
        with np.errstate(invalid="ignore", over="ignore"):
            suspect = np.isnan(part.sum())
        if suspect:  # rounding could carry a NaN into infinity or zero
            out[i : i + BLOCK][np.isnan(part)] = 0x7FC0


def _widened(data: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the same tensors with bfloat16 as float32."""
    tensors, end = [], 0
    for name, dtype, shape, _ in data["tensors"]:
        wide = "float32" if dtype == "bfloat16" else dtype
        tensors.append([name, wide, shape, end])
        end += -(-math.prod(shape) * np.dtype(wide).itemsize // ALIGN) * ALIGN
    if tensors == data["tensors"]:
        end = data["bytes"]
    return {key: data[key] for key in ("epoch", "version", "meta")} | {"tensors": tensors, "bytes": end}


def _widen(whole: np.ndarray, narrow: list[Any], out: np.ndarray, wide: list[Any]) -> None:
    for (_, dtype, shape, offset), (_, wide_dtype, _, wide_offset) in zip(narrow, wide, strict=True):
        values, into = _view(whole, dtype, shape, offset), _view(out, wide_dtype, shape, wide_offset)
        if dtype == "bfloat16":
            np.left_shift(values, 16, out=into.view(np.uint32), dtype=np.uint32)
        else:
            into[...] = values


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
            size = math.prod(shape) * _stored(dtype).itemsize
            room -= -(-size // ALIGN) * ALIGN
            if offset + size > data["bytes"] or room < 0:
                raise ValueError(f"tensor {name} goes past the end, or overlaps others")
        return dict(data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"Not a manifest of weights: {error!r}.") from None


def _stored(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _view(whole: np.ndarray, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    """A tensor's values, bfloat16 as uint16."""
    stored = _stored(dtype)
    return whole[offset : offset + math.prod(shape) * stored.itemsize].view(stored).reshape(shape)
