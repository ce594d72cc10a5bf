"""Retrieval against numpy's brute force and Faiss's flat index: queries, the index's growth, approximate search.

Features are 3072 float32 numbers as the paper's encoder gives them, of 32 intrinsic dimensions in 200 clusters. They
lie in a mapped file in memory (/dev/shm); rivals search the same file, so none pays for a copy. k is 500.

query       60,000 and 1,000,000 trajectories (12 GB; fewer where memory has less room: `large` says), in
            turns, for one query and for 16:
            ours         `nearest`, which `retrieve` calls for the task's embodiment
            numpy        squared differences, 1,024 rows at a time, then argpartition
            numpy_blas   ‖x‖² − 2xq + ‖q‖² with a matrix product, which loses what is near in rounding
            faiss        faiss.knn, what IndexFlatL2 searches with
            At 1,000,000 and 16 queries numpy's differences are left out: they take a minute.
            Before, the rows found are compared with those of a float64 search. `anonymous_mb` is what a query adds
            to the process's anonymous memory.
growth      Stores of trajectories of one step, 60,000 and 1,000,000 (fewer where the disk has less room), an encoder
            that costs nothing: `FeatureIndex.update` from nothing, then after 1 % more trajectories. What is left is
            reading the store and writing features, which end on disk. The rows of the store point to the bytes of the
            same 1,000 trajectories.
approximate Faiss IVF and HNSW over 8-bit codes as `gsa retrieve --search` has them, on 60,000 trajectories, and IVF on
            200,000 (HNSW would take minutes to build): seconds to build, speed over the exact search in turns, recall
            of the 500 nearest.
Ours, numpy's matrix product and Faiss take all cores, numpy's differences one.

    python -m benchmarks.retrieval [--quick] [--save]
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks import harness
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval.index import FeatureIndex
from retrieval.nearest import Approximate, Kind, nearest
from retrieval.store import TrajectoryStore

DIM, LATENT, CLUSTERS, K = 3072, 32, 200, 500
SPEC = Spec("bench/arm", {"state": ArraySpec((4,), "float32")}, 1)
KINDS: tuple[Kind, ...] = ("ivf", "hnsw")
Search = Callable[[np.ndarray, np.ndarray], object]


class Features:
    """Features of synthetic trajectories, the same whenever they are asked for."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.basis = (rng.standard_normal((LATENT, DIM)) / np.sqrt(LATENT)).astype(np.float32)
        self.centres = 3 * rng.standard_normal((CLUSTERS, LATENT)).astype(np.float32)

    def rows(self, n: int, seed: int) -> np.ndarray:
        """[n, DIM] float32."""
        rng = np.random.default_rng([1, seed])
        latent = self.centres[rng.integers(CLUSTERS, size=n)] + rng.standard_normal((n, LATENT), np.float32)
        return np.maximum(latent @ self.basis, -0.3)  # as an activation would

    def file(self, path: Path, n: int) -> np.ndarray:
        """The first `n` rows, mapped."""
        with path.open("wb") as file:
            for i in range(0, n, 8192):
                file.write(self.rows(min(8192, n - i), i))
        return np.memmap(path, np.float32, "r", shape=(n, DIM))


def main() -> int:
    options = harness.arguments(__doc__)
    small = 6_000 if options.quick else 60_000
    made, goals, result = Features(), {}, {"threads": faiss.omp_get_max_threads()}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=_memory()) as memory:
        large = 20_000 if options.quick else _room(Path(memory), 1_000_000)
        result["large"] = large
        for n, rounds in ((small, 10), (large, 3)):
            features = made.file(Path(memory) / "features", n)
            for q in (1, 16):
                turns = rounds if q == 1 else max(1, rounds // 3)
                _query(features, made.rows(q, 10**9 + q), turns, result, goals)
        del features
        for kinds, n in ((KINDS, 2_000),) if options.quick else ((KINDS, small), (("ivf",), 200_000)):
            features = made.file(Path(memory) / "features", n)
            for kind in kinds:
                _approximate(features, made, kind, 5 if options.quick else 20, result, goals)
        del features
        (Path(memory) / "features").unlink()
        for n in (small, large):
            _growth(Path(folder) / str(n), made, min(n, _room(Path(folder), n)), result, goals)
    return harness.finish("retrieval", result, goals, options)


def _memory() -> str | None:
    """A folder in memory, where there is one: what is measured is searching, not this machine's disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _room(folder: Path, wanted: int) -> int:
    """As many rows as the folder and three quarters of the memory that is free take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    free = min(shutil.disk_usage(folder).free * 0.9, available * 0.75)
    return min(wanted, int(free // (4 * DIM)))


def _query(
    features: np.ndarray, queries: np.ndarray, rounds: int, result: dict[str, Any], goals: dict[str, Any]
) -> None:
    n, q = len(features), len(queries)
    rivals: dict[str, Search] = {"ours": _ours, "numpy": _numpy, "numpy_blas": _blas, "faiss": _faiss}
    if n * q > 10_000_000:
        del rivals["numpy"]
    before = _anonymous_mb()
    rows, distances = nearest(queries, features, K)
    memory = _anonymous_mb() - before
    assert _same(features, queries, rows, distances), "the rows found are not the nearest"
    calls = {name: functools.partial(rival, features, queries) for name, rival in rivals.items()}
    seconds = harness.interleaved(calls, rounds)
    name = f"{n}_rows_{q}_queries"
    result[name] = {f"{rival}_ms": round(1e3 * float(np.median(s)), 1) for rival, s in seconds.items()} | {
        "rounds": rounds, "gb_per_s": round(features.nbytes / float(np.median(seconds["ours"])) / 1e9, 2),
        "anonymous_mb": round(memory, 1),
    }  # fmt: skip
    for rival, goal in (("numpy", 2.0), ("faiss", 0.9)) if q == 1 else (("numpy_blas", 1.0), ("faiss", 1.5)):
        goals[f"{name}_speed_over_{rival}"] = harness.at_least(harness.ratio(seconds["ours"], seconds[rival]), goal)
    goals[f"{name}_anonymous_mb"] = harness.at_most(memory, 300)


def _ours(features: np.ndarray, queries: np.ndarray) -> object:
    return nearest(queries, features, K)


def _numpy(features: np.ndarray, queries: np.ndarray) -> object:
    best = np.empty(len(features), np.float32)
    for i in range(0, len(features), 1024):
        block = features[i : i + 1024]
        best[i : i + 1024] = np.min([((block - query) ** 2).sum(1) for query in queries], 0)
    return _least(best)


def _blas(features: np.ndarray, queries: np.ndarray) -> object:
    best, norms = np.empty(len(features), np.float32), (queries**2).sum(1)
    for i in range(0, len(features), 1024):
        block = features[i : i + 1024]
        squares = np.einsum("ij,ij->i", block, block)[:, None] - 2 * block @ queries.T + norms
        best[i : i + 1024] = squares.min(1)
    return _least(best)


def _least(squared: np.ndarray) -> np.ndarray:
    taken = np.argpartition(squared, K)[:K]
    return taken[np.argsort(squared[taken])]


def _faiss(features: np.ndarray, queries: np.ndarray) -> object:
    squared, rows = faiss.knn(queries, features, K)
    found, first = np.unique(rows, return_index=True)  # of several queries: each row once, at its least distance
    return found[np.argsort(squared.ravel()[first])[:K]]


def _same(features: np.ndarray, queries: np.ndarray, rows: np.ndarray, distances: np.ndarray) -> bool:
    """Whether these are the nearest by float64."""
    exact = np.empty(len(features))
    for i in range(0, len(features), 2048):
        block = features[i : i + 2048].astype(np.float64)
        inner = block @ queries.T.astype(np.float64)
        exact[i : i + 2048] = ((block**2).sum(1)[:, None] - 2 * inner + (queries.astype(np.float64) ** 2).sum(1)).min(1)
    order = np.argsort(exact, kind="stable")[:K]
    return bool(np.array_equal(order, rows)) and np.allclose(np.sqrt(exact[order]), distances, rtol=1e-6)


def _growth(root: Path, made: Features, n: int, result: dict[str, Any], goals: dict[str, Any]) -> None:
    features, seconds = made.rows(2048, 0), []

    def encode(observation: dict[str, np.ndarray]) -> np.ndarray:
        return features[observation["state"][:, 0].astype(int) % len(features)]

    with TrajectoryStore.create(root / "store") as store, store.batch():
        for i in range(1000):
            store.append(_one_step(i), SPEC)
    for total in (n, n + n // 100):
        _widen(root / "store", total)
        with TrajectoryStore.open(root / "store") as store:
            started = time.perf_counter()
            index = FeatureIndex.update(store, encode, "encoder", root / "index")
            seconds.append(time.perf_counter() - started)
    assert len(index) == n + n // 100
    result[f"growth_{n}"] = {
        "trajectories": n, "build_s": round(seconds[0], 2), "build_per_s": round(n / seconds[0]),
        "add_1_percent_s": round(seconds[1], 3), "index_gb": round(4 * DIM * len(index) / 1e9, 2),
    }  # fmt: skip
    goals[f"growth_{n}_add_1_percent_over_build"] = harness.at_most(seconds[1] / seconds[0], 0.05)
    shutil.rmtree(root)


def _widen(path: Path, rows: int) -> None:
    """Enters rows into a store's log until it has so many, over the bytes of its first 1,000."""
    with TrajectoryStore.open(path, write=True) as store:
        names = list(store.specs)
        first = [store.catalog.record(row, names) for row in range(1000)]
        for begin in range(len(store), rows, 50_000):
            new = range(begin, min(begin + 50_000, rows))
            store._log.append(b"".join(replace(first[row % 1000], row=row, id=f"{row}").line() for row in new))
    with TrajectoryStore.open(path, write=True):
        pass  # leaves a snapshot


def _one_step(i: int) -> Trajectory:
    state = np.full((2, 4), i, np.float32)
    return Trajectory(
        SPEC.embodiment, {"state": state}, np.zeros((1, 1), np.float32), np.ones(1, np.float32), id=f"{i}"
    )


def _approximate(
    features: np.ndarray, made: Features, kind: Kind, rounds: int, result: dict[str, Any], goals: dict[str, Any]
) -> None:
    queries, name = made.rows(20, 2 * 10**9)[:, None], f"{kind}_{len(features)}"
    started = time.perf_counter()
    search = Approximate(features, kind, K)
    built = time.perf_counter() - started
    exact = [nearest(query, features, K)[0] for query in queries]
    found = [search.nearest(query, K)[0] for query in queries]
    recall = np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)])
    rivals = {
        "exact": functools.partial(nearest, queries[0], features, K),
        kind: functools.partial(search.nearest, queries[0], K),
    }
    seconds = harness.interleaved(rivals, rounds)
    result[name] = {
        "build_s": round(built, 1), "query_ms": round(1e3 * float(np.median(seconds[kind])), 2),
        "speed_over_exact": round(harness.ratio(seconds[kind], seconds["exact"]), 2),
        "recall_of_new_queries": round(float(recall), 4), "recall_said": round(search.recall, 4),
    }  # fmt: skip
    goals[f"{name}_recall_said_is_off_by"] = harness.at_most(abs(float(recall) - search.recall), 0.1)


def _anonymous_mb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


if __name__ == "__main__":
    sys.exit(main())
