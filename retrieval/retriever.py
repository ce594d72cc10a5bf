"""Retrieval: which trajectories of the pool a task rehearses. Vectors in, rows out (method: experience rehearsal)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import faiss
import numpy as np

from gsa.errors import FormatError, StaleError, UsageError
from retrieval.files import replace_file
from retrieval.index import FeatureIndex
from retrieval.store import TrajectoryStore

VERSION = 1
QUERIES_AT_ONCE = 16  # from 20 on Faiss expands ‖x − y‖², which loses what is near in rounding


@dataclass(frozen=True)
class RehearsalSet:
    """The trajectories that a task rehearses, nearest first."""

    rows: tuple[int, ...]  # of the store's catalog
    distances: tuple[float, ...]  # L2, to the nearest query; empty where drawn at random
    sources: tuple[str, ...]  # where each comes from
    embodiment: str
    k: int  # as many were asked for; there may be fewer
    store_id: str
    encoder_hash: str  # of the features; empty where drawn at random
    kind: Literal["nearest", "random"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hash(self) -> str:
        """Equal for equal sets."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def require(self, store: TrajectoryStore) -> None:
        """Raises StaleError unless it was taken from `store`."""
        if self.store_id != store.id:
            raise StaleError(f"The rehearsal set is of the store {self.store_id}; {store.path} is {store.id}.")

    def steps(self, store: TrajectoryStore) -> int:
        """Agent steps of its trajectories."""
        self.require(store)
        return int(store.catalog.length[list(self.rows)].sum(dtype=np.int64))

    def save(self, path: str | Path) -> None:
        data = {"format": "gsa-rehearsal", "version": VERSION} | dataclasses.asdict(self)
        with replace_file(Path(path)) as file:
            file.write(json.dumps(data, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> RehearsalSet:
        """Raises UsageError where there is none, FormatError for a file that is none or of another version."""
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
        except ValueError as error:
            raise FormatError(f"{path} is not a rehearsal set: {error}.") from None
        if not isinstance(data, dict) or data.pop("format", None) != "gsa-rehearsal":
            raise FormatError(f"{path} is not a rehearsal set.")
        if (version := data.pop("version", None)) != VERSION:
            raise FormatError(f"{path} has rehearsal format version {version}; this version of GSA reads {VERSION}.")
        try:
            return cls(**data | {key: tuple(data[key]) for key in ("rows", "distances", "sources")})
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path} is not a rehearsal set: {error}.") from None


def retrieve(index: FeatureIndex, queries: np.ndarray, k: int, embodiment: str) -> RehearsalSet:
    """The k trajectories of an embodiment whose first frames are nearest to any of `queries` [Q, D] float32.

    Distance is the L2 norm to the nearest query. Exact; of equal distances the lower row comes first. Fewer than k
    where the pool has fewer. UsageError: unknown embodiment, or queries of another dimension.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or len(queries) == 0 or k < 1 or not np.all(np.isfinite(queries)):
        raise UsageError(f"Retrieval needs k ≥ 1 and finite queries [Q, D], not {list(queries.shape)} with k={k}.")
    if len(index) and queries.shape[1] != index.dim:
        raise UsageError(f"The queries have {queries.shape[1]} features, the index {index.dim}.")
    wanted = np.zeros(len(index.store), bool)
    wanted[index.store.rows(embodiment)] = True
    rows, distances = np.zeros(0, np.int64), np.zeros(0)
    for block_rows, features in index.blocks():
        mask = wanted[block_rows]
        near_rows, near = _nearest(queries, block_rows[mask], features[mask], k)
        rows, distances = np.concatenate([rows, near_rows]), np.concatenate([distances, near])
        best = np.lexsort((rows, distances))[:k]
        rows, distances = rows[best], distances[best]
    return _rehearsal(index.store, rows, distances, embodiment, k, index.encoder_hash, "nearest")


def random_rehearsal(store: TrajectoryStore, k: int, embodiment: str, seed: int) -> RehearsalSet:
    """k trajectories of an embodiment drawn without replacement: the control that retrieval is held against."""
    if k < 1:
        raise UsageError(f"A rehearsal set needs k ≥ 1, not {k}.")
    rows = np.random.default_rng(seed).permutation(store.rows(embodiment))[:k]
    return _rehearsal(store, rows, np.zeros(0), embodiment, k, "", "random")


def _nearest(queries: np.ndarray, rows: np.ndarray, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose least distance to a query is among the k least, and that distance in float64. Unordered.

    One that is among the k nearest to the queries together is among the k nearest to the query nearest to it.
    """
    if len(rows) == 0:
        return rows, np.zeros(0)
    found = [
        faiss.knn(queries[i : i + QUERIES_AT_ONCE], features, min(k, len(rows)))[1]
        for i in range(0, len(queries), QUERIES_AT_ONCE)
    ]
    candidates = np.unique(np.concatenate(found, axis=None))
    near = features[candidates].astype(np.float64)
    squared = np.min([((near - query) ** 2).sum(1) for query in queries.astype(np.float64)], axis=0)
    return rows[candidates], np.sqrt(squared)


def _rehearsal(
    store: TrajectoryStore, rows: np.ndarray, distances: np.ndarray, embodiment: str, k: int, encoder_hash: str,
    kind: Literal["nearest", "random"],
) -> RehearsalSet:  # fmt: skip
    sources = tuple(store.catalog.source(row) for row in rows.tolist())
    return RehearsalSet(
        tuple(rows.tolist()), tuple(distances.tolist()), sources, embodiment, k, store.id, encoder_hash, kind
    )
