"""Nearest neighbours by L2 distance: exact by one pass over the features, or approximate with the recall measured."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import faiss
import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.metrics import Progress

CACHE_BYTES = 1 << 20  # of features compared with all queries while they are in the processor's cache
PART_BYTES = 1 << 25  # of features that a thread takes at a time
REFINED_ROWS = 64  # rows whose distances are computed in float64 at a time
PER_LIST = 39  # rows that Faiss wants to train each list of an IVF with
Kind = Literal["ivf", "hnsw"]


def nearest(
    queries: np.ndarray, features: np.ndarray, k: int, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `features` [N, D] float32 nearest to any of `queries` [Q, D] float32, where `valid` [N] is True.

    Returns (rows [≤ k] int64, L2 distance to the nearest query [≤ k] float64), nearest first; of equal distances the
    lower row comes first. Exact: Faiss's kernel computes all distances in float32, and in float64 those of every row
    that rounding may have put on the wrong side of the k-th. Memory: a few bytes a row. FormatError: a feature is NaN.
    """
    squared = _squared(queries, features)
    if np.isnan(squared).any():
        raise FormatError("The feature index is damaged: it has features that are not finite; delete it, then index.")
    candidates = np.arange(len(features)) if valid is None else np.flatnonzero(valid)
    if len(candidates) > k:
        squared = squared[candidates]
        limit = np.partition(squared, k - 1)[k - 1]
        candidates = candidates[squared <= np.float32(limit * _slack(features.shape[1]))]
    return _refined(queries, features, candidates, k)


def _squared(queries: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Squared distances to the nearest query, [N] float32, by differences: expanding the square loses what is near.
    As many threads as Faiss may have take parts in turn."""
    n, dim = features.shape
    best = np.empty(n, np.float32)
    rows = max(1, PART_BYTES // (4 * max(1, dim)))
    parts = [slice(start, start + rows) for start in range(0, n, rows)]
    with ThreadPoolExecutor(faiss.omp_get_max_threads(), thread_name_prefix="nearest") as pool:
        for _ in pool.map(lambda part: _scan(queries, features[part], best[part]), parts):
            pass
    return best


def _scan(queries: np.ndarray, features: np.ndarray, best: np.ndarray) -> None:
    """Into `best` [n] the squared distances of some features [n, D], in one thread."""
    step = max(1, CACHE_BYTES // (4 * max(1, features.shape[1])))
    for start in range(0, len(features), step):
        block = features[start : start + step]
        best[start : start + step] = _distances(queries, block).min(0)


def _distances(queries: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Squared distances, [Q, n] float32."""
    kernel: Any = faiss.fvec_L2sqr_ny  # type: ignore[attr-defined]
    out, (n, dim) = np.empty((len(queries), len(features)), np.float32), features.shape
    for row, query in zip(out, queries, strict=True):
        kernel(faiss.swig_ptr(row), faiss.swig_ptr(query), faiss.swig_ptr(features), dim, n)
    return out


def _slack(dim: int) -> float:
    """How much too large a squared distance may be for one as small: each of `dim` squared differences is rounded a few
    times, their sum at most `dim` times."""
    return 1 + 2 * (dim + 4) * float(np.finfo(np.float32).eps)


def _refined(queries: np.ndarray, features: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of some rows, by float64: of each row to the queries that may be the nearest to it."""
    exact = np.full(len(rows), np.inf)
    wide = queries.astype(np.float64)
    for start in range(0, len(rows), REFINED_ROWS):
        near = np.ascontiguousarray(features[rows[start : start + REFINED_ROWS]])
        rough = _distances(queries, near)
        for query, close in zip(wide, rough <= rough.min(0) * np.float32(_slack(near.shape[1])), strict=True):
            difference = near[close] - query
            squared = np.einsum("ij,ij->i", difference, difference)
            at = start + np.flatnonzero(close)
            exact[at] = np.minimum(exact[at], squared)
    exact = np.sqrt(exact)
    order = np.lexsort((rows, exact))[:k]
    return rows[order], exact[order]


class Approximate:
    """Faiss's IVF or HNSW over features rounded to 8 bits. It may overlook rows; the distances it gives are exact.

    `recall` is the share of the k nearest that it finds, measured on features drawn from the index. Takes D bytes of
    memory a row, HNSW 256 more; to build HNSW takes long.
    """

    PROBES = 32  # queries that recall is measured with
    OVERSAMPLE = 2  # candidates for each row wanted, as rounding misplaces some

    def __init__(
        self, features: np.ndarray, kind: Kind, k: int, seed: int = 0, progress: Progress | None = None
    ) -> None:
        self.kind, self.features = kind, features
        self._index = self._trained(seed)
        for start in range(0, len(features), 16_384):
            self._index.add(np.ascontiguousarray(features[start : start + 16_384]))
            if progress is not None:
                progress(self._index.ntotal, len(features), {})
        self.recall = self._measured(k, seed)

    def nearest(self, queries: np.ndarray, k: int, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As the function `nearest`, among those it finds."""
        wanted = min(len(self.features), self.OVERSAMPLE * k)
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(64, wanted)
        found = np.unique(self._index.search(queries, wanted)[1])
        found = found[found >= 0]
        return _refined(queries, self.features, found if valid is None else found[valid[found]], k)

    def _trained(self, seed: int) -> Any:
        n, dim = self.features.shape
        if n == 0:
            raise UsageError("There is nothing to search approximately: the index has no features of the embodiment.")
        lists = max(1, min(4 * math.isqrt(n), n // PER_LIST, 1024))
        rows = np.sort(np.random.default_rng(seed).permutation(n)[: max(PER_LIST * lists, 1024)])
        if self.kind == "hnsw":
            index: Any = faiss.index_factory(dim, "HNSW32_SQ8")
            index.hnsw.efConstruction = 40
        else:
            index = faiss.index_factory(dim, f"IVF{lists},SQ8")
            index.cp.seed, index.cp.niter, index.nprobe = seed + 1, 8, max(1, lists // 5)
        index.train(self.features[rows])
        return index

    def _measured(self, k: int, seed: int) -> float:
        n = len(self.features)
        probes = np.random.default_rng(seed + 1).permutation(n)[: self.PROBES]
        shares = []
        for probe in probes:
            query = np.ascontiguousarray(self.features[probe : probe + 1])
            exact, _ = nearest(query, self.features, k)
            shares.append(np.isin(exact, self.nearest(query, k)[0]).mean())
        return float(np.mean(shares))
