"""Tensors as bytes: a manifest and chunks of raw memory. No pickle, nothing that a reader executes.

A manifest is two lines of JSON: what differs from version to version, and the tensors' names, dtypes, shapes and
offsets, which hardly ever do. So the second is written, read and checked once for all that come after it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from isal.isal_zlib import crc32

from gsa.errors import FormatError
from gsa.schema import BFLOAT16, WeightSnapshot

FORMAT = 2
CHUNK_BYTES = 8 << 20
ALIGN = 64  # of each tensor within the whole, so that views of it are aligned
MAX_BYTES = 16 << 30  # a manifest that claims more is refused before memory is taken
MAX_AXES = 32
LAYOUTS = 2  # are remembered
Value = tuple[int, Iterable[memoryview]]  # its size, and its bytes in pieces
Entries = tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, offset of each tensor
DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool", "bfloat16")


@dataclass(frozen=True)
class Packed:
    """A snapshot's tensors, copied and ready for the wire."""

    version: int
    memory: np.ndarray  # [bytes] uint8, of this alone
    entries: Entries
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
        header = {
            "format": FORMAT, "epoch": epoch, "version": self.version, "bytes": self.size, "chunk_bytes": CHUNK_BYTES,
            "crc32": checks, "meta": dict(self.meta),
        }  # fmt: skip
        return _lines(header, _described(self.entries))


@dataclass(frozen=True)
class Blank:
    """Memory laid out for a snapshot's tensors, to be written to."""

    memory: np.ndarray  # [bytes] uint8
    entries: Entries

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Views of the memory."""
        return {name: _view(self.memory, dtype, shape, offset) for name, dtype, shape, offset in self.entries}

    def holds(self, tensors: Mapping[str, np.ndarray]) -> bool:
        """Whether these are the arrays that `tensors` gives, so that nothing is left to copy."""
        own = self.tensors
        return list(own) == list(tensors) and all(own[name] is tensors[name] for name in own)


def pack(
    snapshot: WeightSnapshot, room: Callable[[int], np.ndarray] | None = None, blank: Blank | None = None
) -> Packed:
    """A copy of the snapshot, in `room(bytes)` if given: uint8 [bytes], overwritten. None is made of tensors that were
    written to `blank`. FormatError for a dtype or meta that cannot be published."""
    meta = _plain(snapshot.meta)
    if blank is None or not blank.holds(snapshot.tensors):
        blank = _laid_out(snapshot.tensors, room or (lambda size: np.empty(size, np.uint8)))
        for name, copy in blank.tensors.items():
            _bits(copy)[...] = _bits(snapshot.tensors[name])
    return Packed(snapshot.version, blank.memory, blank.entries, meta)


def _laid_out(tensors: Mapping[str, np.ndarray], room: Callable[[int], np.ndarray]) -> Blank:
    entries, end = [], 0
    for name, tensor in tensors.items():
        dtype = "bfloat16" if tensor.dtype == BFLOAT16 else str(tensor.dtype)
        if dtype not in DTYPES:
            raise FormatError(f"Tensor {name} is of dtype {dtype}; published are {', '.join(DTYPES)}.")
        entries.append((name, dtype, tensor.shape, end))
        end += _aligned(tensor.nbytes)
    whole = room(end)
    for (*_, offset), tensor in zip(entries, tensors.values(), strict=True):
        whole[offset + tensor.nbytes : offset + _aligned(tensor.nbytes)] = 0
    return Blank(whole, tuple(entries))


class Room(Protocol):
    """Where what is received goes."""

    def reserve(self, size: int) -> None:
        """So many bytes will come, in place of what was there."""

    def write(self, at: int, part: memoryview) -> None:
        """Copies `part` to byte `at`."""


def receive(
    manifest: bytes,
    head: tuple[int, int, int],
    fetch: Callable[[], Value | None],
    room: Room,
) -> bytes | None:
    """Fetches what `manifest` describes into `room`. It must be of the epoch, version and chunks of `head`.

    `fetch()` gives the next chunk: its size, and its bytes in pieces, each good until the next; None where it is gone,
    and then this is None too. Manifest and chunks are not trusted: FormatError where they do not fit together; room
    has then bytes of no use in it. Returns the description that `snapshot` takes with the memory.
    """
    data, layout = _read_manifest(manifest)
    if (data["epoch"], data["version"], len(data["crc32"])) != head:
        raise FormatError(f"The manifest of version {head[1]} is that of {data['version']}, or of other chunks.")
    room.reserve(data["bytes"])
    for i, expected in enumerate(data["crc32"]):
        at = i * data["chunk_bytes"]
        if (fetched := fetch()) is None:
            return None
        size, pieces = fetched
        if size != min(data["chunk_bytes"], data["bytes"] - at) or _write(pieces, at, room) != expected:
            raise FormatError(f"Chunk {i} of version {data['version']} is damaged.")
    return _lines({key: data[key] for key in ("epoch", "version", "meta")}, layout)


def _write(pieces: Iterable[memoryview], at: int, room: Room) -> int:
    """Puts the pieces there, from byte `at` on; their CRC-32."""
    checksum = 0
    for piece in pieces:
        checksum = crc32(piece, checksum)
        room.write(at, piece)
        at += len(piece)
    return checksum


def snapshot(description: bytes, whole: np.ndarray) -> WeightSnapshot:
    """The snapshot whose tensors lie in `whole` [bytes], as views; they are read-only."""
    header, layout = description.split(b"\n")
    data, entries = json.loads(header), _entries(layout, len(whole))
    tensors = {name: _view(whole, dtype, shape, offset) for name, dtype, shape, offset in entries}
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return WeightSnapshot(data["version"], tensors, {**data["meta"], "epoch": data["epoch"]})


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(meta))))
    except (TypeError, ValueError) as error:
        raise FormatError(f"The meta of a snapshot must be plain data: {error}.") from None


def _lines(header: Mapping[str, Any], layout: bytes) -> bytes:
    return json.dumps(header).encode() + b"\n" + layout


def _read_manifest(manifest: bytes) -> tuple[dict[str, Any], bytes]:
    """The first line's data, and the second line."""
    header, _, layout = manifest.partition(b"\n")
    try:
        data = json.loads(header)
        if data["format"] != FORMAT:
            raise FormatError(f"Weights of format {data['format']!r}; this is format {FORMAT}.")
        chunks = len(data["crc32"])
        sizes = (data["epoch"], data["version"], data["bytes"], data["chunk_bytes"] - 1)
        if not all(type(n) is int and n >= 0 for n in sizes) or not isinstance(data["meta"], Mapping):
            raise ValueError("a size is not a natural number")
        if data["bytes"] > MAX_BYTES or chunks != -(-data["bytes"] // data["chunk_bytes"]):
            raise ValueError(f"{chunks} chunks for {data['bytes']} bytes")
        _entries(layout, data["bytes"])
        return dict(data), layout
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"Not a manifest of weights: {error!r}.") from None


@functools.lru_cache(LAYOUTS)
def _described(entries: Entries) -> bytes:
    return json.dumps(entries).encode()


@functools.lru_cache(LAYOUTS)
def _entries(layout: bytes, size: int) -> Entries:
    """What `_described` described, of tensors within `size` bytes; ValueError or TypeError where it cannot be."""
    room, entries = size, []
    for name, dtype, shape, offset in json.loads(layout):
        if not isinstance(name, str) or dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} of dtype {dtype!r}")
        if not all(type(n) is int and n >= 0 for n in (*shape, offset)) or offset % ALIGN:
            raise ValueError(f"tensor {name} of shape {shape} at {offset}")
        if len(shape) > MAX_AXES or math.prod(n or 1 for n in shape) > MAX_BYTES:  # also one with nothing in it
            raise ValueError(f"tensor {name} of shape {shape}")
        length = math.prod(shape) * _stored(dtype).itemsize
        room -= _aligned(length)
        if offset + length > size or room < 0:
            raise ValueError(f"tensor {name} goes past the end, or overlaps others")
        entries.append((name, dtype, tuple(shape), offset))
    return tuple(entries)


def _stored(dtype: str) -> np.dtype:
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _bits(array: np.ndarray) -> np.ndarray:
    """The array, or that of a BFLOAT16's bits, which is copied many times faster."""
    return array["bfloat16"] if array.dtype == BFLOAT16 else array


def _view(whole: np.ndarray, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    try:
        return np.ndarray(shape, _stored(dtype), whole, offset)
    except TypeError as error:
        raise ValueError(f"a tensor of shape {shape} at {offset} of {len(whole)} bytes: {error}") from None
