"""The feature index: what a world model's encoder makes of the first observation of every trajectory of a store.

    index.json                 format version, key, and how many features of each embodiment count
    <generation>-<i>.features  float32 [n, D], row-major, little-endian: of the i-th embodiment, appended to
    <generation>-<i>.rows      int64 [n], the catalog rows they belong to, ascending
    writer.lock                held by the process that extends it

It is keyed by the encoder's weights and by the trajectories it has seen; a key that does not fit is refused, as
distances between features of different encoders mean nothing. Features are mapped, never read as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gsa.errors import FormatError, GsaError, SpecMismatch, StaleError, Unavailable, UsageError
from gsa.metrics import Progress
from retrieval.files import WholeFile, sync_folder
from retrieval.index_head import Head, Part
from retrieval.store import TrajectoryStore

# First observations {name: [N, …]} of one embodiment → features [N, D] float32. SpecMismatch: it cannot see these.
Encode = Callable[[dict[str, np.ndarray]], np.ndarray]

ENCODE_ROWS = 128  # observations given to the encoder at a time: more are slower on CPUs
COMMIT_ROWS = 8192  # an interruption loses the features of no more trajectories than these


class FeatureIndex:
    """Features of the trajectories of one store under one encoder, by embodiment. Made by `open` and `update`.

    Not in it are embodiments that the encoder cannot see, which `unseen` names, and damaged trajectories: `unread`.
    """

    def __init__(self, folder: Path, store: TrajectoryStore, head: Head) -> None:
        self.path, self.store, self.encoder_hash = folder, store, head.encoder
        self.dim = head.dim  # D, the length of a feature; 0 for an index of nothing
        self.unseen, self.unread = head.unseen, head.unread
        self._seen = head.seen
        self._parts = {part.embodiment: _mapped(folder, store, head, i) for i, part in enumerate(head.parts)}

    @classmethod
    def open(cls, folder: str | Path, store: TrajectoryStore, encoder_hash: str) -> FeatureIndex:
        """The index in `folder`. StaleError: it is of another encoder or store, or the store has changed since.
        UsageError: there is none. FormatError: it is damaged."""
        head = Head.load(Path(folder))
        if problem := head.problem(store, encoder_hash):
            raise StaleError(f"The index {folder} {problem}; run gsa index.")
        if head.seen < len(store):
            raise StaleError(f"The index {folder} lacks {len(store) - head.seen} newer trajectories; run gsa index.")
        return cls(Path(folder), store, head)

    @classmethod
    def update(
        cls, store: TrajectoryStore, encode: Encode, encoder_hash: str, folder: str | Path,
        progress: Progress | None = None,
    ) -> FeatureIndex:  # fmt: skip
        """The index as of now: encodes only what the one in `folder` lacks; all where there is none that fits.

        Features are written as they are made. Interrupted, it goes on where it was; of two processes the second
        waits for the first. Unavailable: the disk refused, or has too little room.
        """
        folder = Path(folder)
        with contextlib.suppress(UsageError, FormatError, StaleError):
            return cls.open(folder, store, encoder_hash)  # needs no right to write
        with _one_writer(folder):
            head = _usable(folder, store, encoder_hash) or Head(
                store.id, encoder_hash, fingerprint=store.catalog.fingerprint(0)
            )
            head = _Extension(folder, store, encode, head).run(progress)
            _forget_others(folder, head)
        return cls(folder, store, head)

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self._parts.values())

    @property
    def embodiments(self) -> list[str]:
        """Those it has features of."""
        return list(self._parts)

    def features(self, embodiment: str) -> tuple[np.ndarray, np.ndarray]:
        """(catalog rows [n] int64 ascending, features [n, D] float32) of an embodiment: views of the mapped files."""
        empty = np.zeros(0, np.int64), np.zeros((0, self.dim), np.float32)
        return self._parts.get(embodiment, empty)


class _Extension:
    """Adds to an index what its store has more than it, and commits it now and then."""

    def __init__(self, folder: Path, store: TrajectoryStore, encode: Encode, head: Head) -> None:
        self.folder, self.store, self.encode, self.head = folder, store, encode, head
        self.rows = {part.embodiment: part.rows for part in head.parts}
        self.unread = dict.fromkeys(head.unread)
        self.refused: dict[str, str] = {}  # embodiment → why the encoder does

    def run(self, progress: Progress | None) -> Head:
        total = len(self.store)
        rows = self.store.rows()
        rows = rows[(rows >= self.head.seen) & (rows < total)]
        done = 0
        for block in np.split(rows, range(COMMIT_ROWS, len(rows), COMMIT_ROWS)):
            for embodiment, lot in self._lots(block):
                self._add(embodiment, lot)
                done += len(lot)
                if progress is not None:
                    progress(done, len(rows), {})
            self._commit(total if done == len(rows) else int(block[-1]) + 1)
            self._require_room(len(rows) - done)
        return self.head

    def _lots(self, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """What is encoded at a time: rows of one embodiment."""
        names, codes = list(self.store.specs), self.store.catalog.embodiment[rows]
        for code in np.unique(codes).tolist():
            members = rows[codes == code]
            for lot in np.split(members, range(ENCODE_ROWS, len(members), ENCODE_ROWS)):
                yield names[code], lot

    def _add(self, embodiment: str, rows: np.ndarray) -> None:
        if embodiment in self.refused:
            return
        rows, observation = self._first_observations(embodiment, rows)
        if len(rows) == 0:
            return
        try:
            features = np.ascontiguousarray(self.encode(observation), "<f4")
        except SpecMismatch as error:
            self.refused[embodiment] = f"all of {embodiment}: {error}"
            return
        dim = self.head.dim or (features.shape[1] if features.ndim == 2 else 0)
        if features.shape != (len(rows), dim) or dim == 0 or not np.all(np.isfinite(features)):
            raise UsageError(f"The encoder gave {list(features.shape)} for {len(rows)} frames, or values not finite.")
        self.head = replace(self.head, dim=dim)
        self._append(embodiment, rows, features)

    def _first_observations(self, embodiment: str, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Those of the rows that can be read."""
        firsts, read = [], []
        for row in rows.tolist():
            try:
                firsts.append(self.store.slice(row, 0, 1))
                read.append(row)
            except GsaError as error:
                self.unread[str(error)] = None
        names = self.store.specs[embodiment].observation if read else ()
        return np.array(read, "<i8"), {name: np.concatenate([first[name] for first in firsts]) for name in names}

    def _append(self, embodiment: str, rows: np.ndarray, features: np.ndarray) -> None:
        """Behind what counts of the embodiment's files: what an interrupted process left there is overwritten."""
        known = self.rows.setdefault(embodiment, 0)
        i = list(self.rows).index(embodiment)
        for what, values, size in (("rows", rows, 8), ("features", features, 4 * self.head.dim)):
            path = self.head.path(self.folder, i, what)
            with _disk(self.folder):
                path.touch()
                with WholeFile(path, "r+") as file:
                    file.seek(known * size)
                    file.write(values)
        self.rows[embodiment] = known + len(rows)

    def _commit(self, seen: int) -> None:
        """Makes what was appended count."""
        parts = tuple(Part(name, n) for name, n in self.rows.items())
        with _disk(self.folder):
            for i in range(len(parts)):
                for what in ("rows", "features"):
                    _sync(self.head.path(self.folder, i, what))
            self.head = replace(
                self.head, seen=seen, fingerprint=self.store.catalog.fingerprint(seen), parts=parts,
                unseen=tuple(dict.fromkeys((*self.head.unseen, *self.refused.values()))), unread=tuple(self.unread),
            )  # fmt: skip
            self.head.save(self.folder)

    def _require_room(self, rows: int) -> None:
        needed, free = rows * (4 * self.head.dim + 8), shutil.disk_usage(self.folder).free
        if needed > free:
            raise Unavailable(
                f"The index needs {needed / 1e9:.1f} GB more for {rows} trajectories, and {self.folder} has "
                f"{free / 1e9:.1f} GB free; make room and run gsa index again."
            )


def _usable(folder: Path, store: TrajectoryStore, encoder_hash: str) -> Head | None:
    """The head of the index in `folder`, if it can be extended."""
    try:
        head = Head.load(folder)
        FeatureIndex(folder, store, head)
    except (UsageError, FormatError):
        return None
    return None if head.problem(store, encoder_hash) else head


def _mapped(folder: Path, store: TrajectoryStore, head: Head, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, features) of the i-th embodiment. FormatError where the files are not what the head says."""
    part, known = head.parts[i], list(store.specs)
    rows, features = (
        _map(head.path(folder, i, what), shape, dtype)
        for what, shape, dtype in (("rows", (part.rows,), "<i8"), ("features", (part.rows, head.dim), "<f4"))
    )
    if len(rows):
        ascending = rows[0] >= 0 and rows[-1] < min(head.seen, len(store)) and bool(np.all(np.diff(rows) > 0))
        code = known.index(part.embodiment) if part.embodiment in known else -2
        if not ascending or not np.all(np.isin(store.catalog.embodiment[rows], (code, -1))):  # -1: since lost
            raise FormatError(f"The feature index {folder} is damaged: its rows are not of {part.embodiment}.")
    return rows, features


def _map(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    try:
        if path.stat().st_size < size:
            raise FormatError(f"{path} is not a feature index's: {path.stat().st_size} of {size} bytes are there.")
        return np.memmap(path, dtype, "r", shape=shape) if size else np.zeros(shape, dtype)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}.") from None


@contextlib.contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process extends the index."""
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "writer.lock").open("a")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"Cannot write the index {folder}: {error.strerror}. Mend that and run gsa index.") from None


def _forget_others(folder: Path, head: Head) -> None:
    """Deletes the files of earlier generations; who has them mapped keeps them."""
    for path in folder.glob("*-*.*"):
        if path.suffix in (".rows", ".features") and not path.name.startswith(head.generation):
            path.unlink(missing_ok=True)
    sync_folder(folder)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
