"""How the arrays of a trajectory become Arrow columns: names, dtypes, shapes, and the checksum of their content."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32

from gsa.errors import FormatError, unknown
from gsa.schema import Spec, Trajectory

CODECS = ("none", "lz4", "zstd")
OPTIONAL = ("reward", "controller", "policy_version")  # bit i of `has` says whether a trajectory has the i-th
SPEC_KEY = b"gsa:spec"
MAX_STEP_BYTES = 64 << 20  # of all arrays at one step: more is refused before memory is taken
MAX_BYTES = 4 << 30  # of a trajectory, uncompressed
CHUNK_BYTES, MAX_CHUNK_ROWS = 200_000, 1024  # of a record batch in a compressed shard, before compression


@dataclass(frozen=True)
class Column:
    """One array of a trajectory: its name, dtype and shape at one step."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    is_observation: bool = False

    @property
    def arrow_type(self) -> pa.DataType:
        primitive = pa.from_numpy_dtype(self.dtype)
        return pa.fixed_shape_tensor(primitive, self.shape) if self.shape else primitive

    @functools.cached_property
    def step_bytes(self) -> int:
        """Of its value at one step."""
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, steps: int) -> int:
        """Rows that a trajectory of `steps` agent steps has: T+1 for an observation, T for the others."""
        return steps + self.is_observation


@dataclass(frozen=True, eq=False)
class Layout:
    """How trajectories of one embodiment are stored: its columns in the order of the file, and the Arrow schema."""

    spec: Spec
    columns: tuple[Column, ...]
    schema: pa.Schema
    place: Mapping[str, int]  # column name → its place among the columns
    buffers: tuple[int, ...]  # by column: which of a record batch's buffers holds its values
    chunk_rows: int  # of a record batch in a compressed shard: a slice decompresses little more than itself

    @classmethod
    def of(cls, spec: Spec) -> Layout:
        """Raises FormatError for a spec that cannot be stored."""
        columns = _columns(spec)
        step_bytes = sum(c.step_bytes for c in columns)
        if step_bytes > MAX_STEP_BYTES:
            raise FormatError(f"{spec.embodiment}: a step of {step_bytes} bytes; at most {MAX_STEP_BYTES} are stored.")
        fields = [pa.field(c.name, c.arrow_type) for c in columns]
        schema = pa.schema(fields, metadata={SPEC_KEY: json.dumps(spec.to_json()).encode()})
        # Arrow keeps a validity buffer before the values; a tensor has one of its own before its elements' two.
        ends = itertools.accumulate(3 if c.shape else 2 for c in columns)
        place = {c.name: i for i, c in enumerate(columns)}
        chunk_rows = min(max(CHUNK_BYTES // step_bytes, 1), MAX_CHUNK_ROWS)
        return cls(spec, columns, schema, place, tuple(end - 1 for end in ends), chunk_rows)

    def column(self, name: str) -> Column:
        return self.columns[self.place[name]]

    def checksum(self, arrays: Mapping[str, np.ndarray]) -> int:
        """CRC-32 of a trajectory's content, whatever the codec."""
        crc = 0
        for column in self.columns:
            if column.name in arrays:
                crc = crc32(np.ascontiguousarray(arrays[column.name], column.dtype), crc)
        return crc


def arrays_of(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """The arrays that the trajectory has, by column name."""
    arrays = dict(trajectory.observation) | {"action": trajectory.action, "discount": trajectory.discount}
    optional = {name: getattr(trajectory, name) for name in OPTIONAL}
    return arrays | {name: value for name, value in optional.items() if value is not None}


def has_of(names: Container[str]) -> int:
    """Which optional columns are among `names`, as bits."""
    return sum(1 << i for i, name in enumerate(OPTIONAL) if name in names)


def has_column(has: int, name: str) -> bool:
    """Whether a trajectory with the bits `has` has the column; all but the optional ones always."""
    return name not in OPTIONAL or bool(has >> OPTIONAL.index(name) & 1)


def require_codec(codec: str) -> str:
    if codec not in CODECS:
        raise unknown("codec", codec, CODECS)
    return codec


def _columns(spec: Spec) -> tuple[Column, ...]:
    observations = [Column(k, np.dtype(v.dtype), v.shape, True) for k, v in spec.observation.items()]
    steps = (
        Column("action", np.dtype("<f4"), (spec.action_dim,)),
        Column("discount", np.dtype("<f4"), ()),
        Column("reward", np.dtype("<f4"), ()),
        Column("controller", np.dtype("u1"), ()),
        Column("policy_version", np.dtype("<i8"), ()),
    )
    if clash := {c.name for c in observations} & {c.name for c in steps}:
        raise FormatError(f"{spec.embodiment}: an observation may not be named {', '.join(sorted(clash))}.")
    return (*observations, *steps)
