"""The reference's npz: one file an episode, keys observation, action, reward, discount, one row an observation.

    row          0       1      …    T
    observation  o0      o1          oT     [3, H, W] uint8, or a vector (ExORL)
    action       unused  a0          aT−1   row t holds the action that led to observation t
    reward       unused  r0          rT−1   [T+1, 1]; may be absent
    discount     unused  d0          dT−1

Ours is the action taken *at* an observation, so the rows of action, reward and discount are shifted by one here, and
nowhere else. Files come from anywhere: sizes and dtypes are checked in the headers before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.schema import Trajectory
from retrieval.files import replace_file
from retrieval.formats.source import MAX_BYTES

MAX_MEMBERS = 64
REQUIRED = ("observation", "action", "discount")
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError, OverflowError, MemoryError,
    SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Episode:
    """What a file holds, in our alignment and layout."""

    observation: np.ndarray  # [T+1, H, W, 3] uint8 or [T+1, D] float32
    action: np.ndarray  # [T, A] float, as recorded
    discount: np.ndarray  # [T] float32
    reward: np.ndarray | None  # [T] float32


def read_npz(path: Path) -> Episode:
    """Reads one episode. FormatError for whatever is not one; memory stays bounded by MAX_BYTES and a copy."""
    with _opened(path) as archive:
        headers = {name: _header(archive, name) for name in _names(archive) if name in (*REQUIRED, "reward")}
        _check(headers)
        arrays = {name: _array(archive, name, shape, dtype, fortran) for name, (shape, dtype, fortran) in
                  headers.items()}  # fmt: skip
    observation = arrays["observation"]
    observation = _channels_last(observation) if observation.ndim == 4 else observation.astype(np.float32)
    reward = _scalar(arrays["reward"]) if "reward" in arrays else None
    return Episode(observation, arrays["action"][1:], _scalar(arrays["discount"]), reward)


def _channels_last(images: np.ndarray) -> np.ndarray:
    """[N, 3, H, W] → [N, H, W, 3]. A channel at a time: a transposed copy takes five times as long."""
    out = np.empty((len(images), *images.shape[2:], 3), images.dtype)
    for channel in range(3):
        out[..., channel] = images[:, channel]
    return out


def directory(path: Path) -> tuple[str, int]:
    """What the file's directory says, with nothing unpacked: an id made from the checksums of its content, and about
    how many bytes the episode takes in a store."""
    with _opened(path) as archive:
        members = sorted((m.filename, m.CRC, m.file_size) for m in archive.infolist())
    known = {f"{name}.npy" for name in (*REQUIRED, "reward")}
    size = sum(size for name, _, size in members if name in known)
    return hashlib.blake2b(repr(members).encode(), digest_size=16).hexdigest(), size


def write_npz(path: str | Path, trajectory: Trajectory, with_reward: bool = False) -> None:
    """Writes the trajectory as the reference would have, whole or not at all; equal trajectories give equal bytes.

    UsageError: more than one observation, or no reward where one is asked for.
    """
    if len(trajectory.observation) != 1:
        raise UsageError(f"An npz holds one observation, {trajectory.name} has {', '.join(trajectory.observation)}.")
    (observation,) = trajectory.observation.values()
    arrays = {
        "observation": observation.transpose(0, 3, 1, 2) if observation.ndim == 4 else observation,
        "action": _after_reset(trajectory.action, 0),
        "discount": _after_reset(trajectory.discount[:, None], 1),
    }
    if with_reward:
        if trajectory.reward is None:
            raise UsageError(f"{trajectory.name} has no reward to write.")
        arrays["reward"] = _after_reset(trajectory.reward[:, None], 0)
    with replace_file(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: no clock in the bytes
            archive.writestr(member, content.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from None
    except UNREADABLE as error:
        raise FormatError(f"{path.name} is not a readable npz: {error or type(error).__name__}.") from None


def _names(archive: zipfile.ZipFile) -> list[str]:
    names = [m.filename for m in archive.infolist()]
    if len(names) > MAX_MEMBERS or len(set(names)) < len(names):
        raise FormatError(f"It holds {len(names)} arrays, or some twice.")
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype, bool]:
    with archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _read_header(io.BytesIO(file.read(1 << 14)))
    if dtype.hasobject or dtype.kind not in "fu" or any(n < 0 for n in shape):
        raise FormatError(f"{name} has dtype {dtype}; numbers are needed.")
    return shape, dtype, fortran


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise FormatError(f"It is of npy version {version}.")


def _check(headers: dict[str, tuple[tuple[int, ...], np.dtype, bool]]) -> None:
    """Raises FormatError unless the arrays together are an episode of bounded size."""
    if missing := [name for name in REQUIRED if name not in headers]:
        raise FormatError(f"It has no {' and no '.join(missing)}.")
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in headers.values())
    if size > MAX_BYTES:
        raise FormatError(f"It unpacks to {size} bytes; an episode has at most {MAX_BYTES}.")
    shape, dtype, _ = headers["observation"]
    image = len(shape) == 4 and shape[1] == 3 and dtype == np.uint8
    vector = len(shape) == 2 and dtype.kind == "f"
    if not (image or vector):
        raise FormatError(f"observation is {list(shape)} {dtype}; [T+1, 3, H, W] uint8 or [T+1, D] float is needed.")
    rows = shape[0]
    if rows < 2:
        raise FormatError(f"It has {rows} observations; an episode has at least 2.")
    for name, (shape, dtype, _) in headers.items():
        scalar = shape in ((rows,), (rows, 1))
        fits = scalar if name in ("reward", "discount") else shape[:1] == (rows,)
        if not fits or (name == "action" and len(shape) != 2) or (name != "observation" and dtype.kind != "f"):
            raise FormatError(f"{name} is {list(shape)} {dtype}, which does not fit {rows} observations.")


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> np.ndarray:
    """Unpacks one array whose header was checked. The archive checks its CRC on the way."""
    with archive.open(f"{name}.npy") as file:
        _read_header(file)
        flat = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        view, got = memoryview(flat), 0
        while got < len(view) and (n := file.readinto(view[got:])):  # type: ignore[attr-defined]
            got += n
        if got < len(view) or file.read(1):
            raise FormatError(f"{name} has {got} bytes where its header promises {len(view)}.")
    array = flat.view(dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _scalar(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(-1)[1:], np.float32)


def _after_reset(values: np.ndarray, first: float) -> np.ndarray:
    """[T, …] → [T+1, …]: the row of the reset before the others."""
    return np.concatenate([np.full_like(values[:1], first), values])
