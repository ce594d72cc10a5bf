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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.schema import Trajectory
from retrieval.files import replace_file
from retrieval.formats import member
from retrieval.formats.member import Member
from retrieval.formats.source import MAX_BYTES

MAX_MEMBERS = 64
MAX_HEADER_BYTES = 1 << 14  # of an array
CACHED_BYTES = 1 << 18  # of images that are transposed at a time, while they are in the processor's cache
REQUIRED = ("observation", "action", "discount")
UNREADABLE = (
    *member.MALFORMED, OSError, ValueError, KeyError, RuntimeError, OverflowError, MemoryError, SyntaxError,
    struct.error, tokenize.TokenError,
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
        arrays = {name: _array(archive, name, *header) for name, header in headers.items()}
    observation = arrays["observation"]
    if observation.ndim == 2:
        observation = observation.astype(np.float32)
    reward = _scalar(arrays["reward"]) if "reward" in arrays else None
    return Episode(observation, arrays["action"][1:], _scalar(arrays["discount"]), reward)


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
    shape, fortran, dtype = _read_header(io.BytesIO(_member(archive, name).read(MAX_HEADER_BYTES)))
    if dtype.hasobject or dtype.kind not in "fu" or any(n < 0 for n in shape):
        raise FormatError(f"{name} has dtype {dtype}; numbers are needed.")
    return shape, dtype, fortran


def _member(archive: zipfile.ZipFile, name: str) -> Member:
    assert archive.fp is not None, "an archive is open while it is read"
    return Member(archive.fp, archive.getinfo(f"{name}.npy"))


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
    """Unpacks one array whose header was checked, images with their channels last."""
    content = _member(archive, name)
    _read_header(content)
    if content.left != (size := math.prod(shape) * dtype.itemsize):
        raise FormatError(f"{name} has {content.left} bytes where its header promises {size}.")
    if len(shape) == 4 and not fortran:
        return _images(content, shape)
    flat = np.frombuffer(content.read(size), dtype)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def _images(content: Member, shape: tuple[int, ...]) -> np.ndarray:
    """[N, 3, H, W] uint8 → [N, H, W, 3]. A channel at a time: a transposed copy takes five times as long."""
    n, channels, height, width = shape
    out, image = np.empty((n, height, width, channels), np.uint8), channels * height * width
    step = max(1, CACHED_BYTES // max(1, image))
    for start in range(0, n, step):
        into = out[start : start + step]
        images = np.frombuffer(content.read(len(into) * image), np.uint8).reshape(len(into), *shape[1:])
        for channel in range(channels):
            into[..., channel] = images[:, channel]
    return out


def _scalar(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(-1)[1:], np.float32)


def _after_reset(values: np.ndarray, first: float) -> np.ndarray:
    """[T, …] → [T+1, …]: the row of the reset before the others."""
    return np.concatenate([np.full_like(values[:1], first), values])
