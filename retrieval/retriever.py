"""Retrieval: which trajectories of the pool a task rehearses. Vectors in, rows out (method: experience rehearsal)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gsa import config as configs
from gsa.errors import FormatError, StaleError, UsageError, unknown
from retrieval.files import replace_file
from retrieval.index import FeatureIndex
from retrieval.nearest import Approximate, nearest
from retrieval.store import TrajectoryStore

VERSION = 1
PRECISION_AT = (10, 50, 100, 250, 500, 1000)


@dataclass(frozen=True)
class Precision:
    """How much of what is nearest is right, where the pool's sources tell."""

    k: int
    task: float | None  # share of the k taken whose source is the task; None where no source of the pool is
    embodiment: float | None  # share of the k nearest of all embodiments that are of the task's; None for random


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
    search: str = "exact"  # or the approximation that was asked for
    recall: float | None = None  # of an approximation, measured: the share of the k nearest that it finds
    precision: tuple[Precision, ...] = ()
    task_share: float | None = None  # of the pool's trajectories of the embodiment: what chance would give

    def __post_init__(self) -> None:
        if any(type(row) is not int or row < 0 for row in self.rows) or len(set(self.rows)) < len(self.rows):
            raise FormatError("A rehearsal set has rows that are no rows of a store, or one twice.")
        if len(self.sources) != len(self.rows) or len(self.distances) not in (0, len(self.rows)):
            raise FormatError("A rehearsal set has rows, sources and distances that do not go together.")

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
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not a rehearsal set: {error}.") from None
        if not isinstance(data, dict) or data.pop("format", None) != "gsa-rehearsal":
            raise FormatError(f"{path} is not a rehearsal set.")
        if (version := data.pop("version", None)) != VERSION:
            raise FormatError(f"{path} has rehearsal format version {version}; this version of GSA reads {VERSION}.")
        try:
            return configs.from_dict(cls, data)
        except (UsageError, FormatError) as error:
            raise FormatError(f"{path} is not a rehearsal set: {error}") from None


def retrieve(
    index: FeatureIndex, queries: np.ndarray, k: int, embodiment: str, task: str = "",
    approximate: Approximate | None = None,
) -> RehearsalSet:  # fmt: skip
    """The k trajectories of an embodiment whose first observations are nearest to any of `queries` [Q, D] float32.

    Distance is the L2 norm to the nearest query. Exact, unless an `approximate` search over the embodiment's features
    is given; of equal distances the lower row comes first. No trajectory comes twice; fewer than k where the pool has
    fewer. With the name of a `task` the set says how precise it is, as far as the pool's sources tell.
    UsageError: unknown embodiment, queries of another dimension, k < 1.
    """
    queries = _checked(index, queries, k, embodiment)
    rows, distances = _search(index, queries, k, embodiment, approximate)
    found = RehearsalSet(
        tuple(rows.tolist()), tuple(distances.tolist()), _sources(index.store, rows), embodiment, k, index.store.id,
        index.encoder_hash, "nearest", approximate.kind if approximate else "exact",
        approximate.recall if approximate else None,
    )  # fmt: skip
    if not task:
        return found
    others = [name for name in index.embodiments if name != embodiment]
    theirs = [_search(index, queries, k, name, None)[1] for name in others]
    return _with_precision(found, index.store, task, np.sort(np.concatenate([[], *theirs])))


def random_rehearsal(store: TrajectoryStore, k: int, embodiment: str, seed: int, task: str = "") -> RehearsalSet:
    """k trajectories of an embodiment drawn without replacement: the control that retrieval is held against."""
    if k < 1:
        raise UsageError(f"A rehearsal set needs k ≥ 1, not {k}.")
    rows = np.random.default_rng(seed).permutation(store.rows(embodiment))[:k]
    found = RehearsalSet(
        tuple(rows.tolist()), (), _sources(store, rows), embodiment, k, store.id, "", "random", "random"
    )
    return _with_precision(found, store, task, None) if task else found


def is_of_task(source: str, task: str) -> bool:
    """Whether a trajectory of that source was collected in a task: "metaworld/reach-v3/scripted-0.5" in
    "metaworld/reach-v3". Versions are left out of it: the published pool says "metaworld/reach"."""
    name, of = re.sub(r"-v\d+(?=/|$)", "", source), re.sub(r"-v\d+$", "", task)
    return name == of or name.startswith(of + "/")


def _checked(index: FeatureIndex, queries: np.ndarray, k: int, embodiment: str) -> np.ndarray:
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or len(queries) == 0 or k < 1 or not np.all(np.isfinite(queries)):
        raise UsageError(f"Retrieval needs k ≥ 1 and finite queries [Q, D], not {list(queries.shape)} with k={k}.")
    if len(index) and queries.shape[1] != index.dim:
        raise UsageError(f"The queries have {queries.shape[1]} features, the index {index.dim}.")
    if embodiment not in index.store.specs:
        raise unknown("embodiment", embodiment, index.store.specs)
    return queries


def _search(
    index: FeatureIndex, queries: np.ndarray, k: int, embodiment: str, approximate: Approximate | None
) -> tuple[np.ndarray, np.ndarray]:
    """(catalog rows, distances) of the k nearest of one embodiment: others are not looked at."""
    rows, features = index.features(embodiment)
    if len(rows) == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    valid = index.store.catalog.readable[rows]
    if approximate is None:
        found, distances = nearest(queries, features, k, valid)
    else:
        found, distances = approximate.nearest(queries, k, valid)
    return rows[found], distances


def _sources(store: TrajectoryStore, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(store.catalog.source(row) for row in rows.tolist())


def _with_precision(found: RehearsalSet, store: TrajectoryStore, task: str, others: np.ndarray | None) -> RehearsalSet:
    """With what the pool's sources tell of it. `others`: distances of the nearest of other embodiments, ascending."""
    of_task = np.array([is_of_task(source, task) for source in store.catalog.sources], bool)
    pool = store.catalog.source_code[store.rows(found.embodiment)]
    known = bool(len(pool)) and bool(of_task[pool].any())
    hits = np.array([is_of_task(source, task) for source in found.sources])
    at = sorted({k for k in PRECISION_AT if k < len(found)} | ({len(found)} if len(found) else set()))
    return dataclasses.replace(
        found,
        task_share=float(of_task[pool].mean()) if known else None,
        precision=tuple(
            Precision(k, float(hits[:k].mean()) if known else None, _embodiment_share(found.distances, others, k))
            for k in at
        ),
    )


def _embodiment_share(own: Sequence[float], others: np.ndarray | None, k: int) -> float | None:
    """Of the k nearest of all embodiments, the share of one's own; it wins ties."""
    if others is None:
        return None
    merged = np.concatenate([own, others])
    return float(np.mean(np.argsort(merged, kind="stable")[:k] < len(own)))
