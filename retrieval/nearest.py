"""Nearest neighbours by L2 distance: exact by one pass over the features, or approximate with the recall measured."""

from __future__ import annotations

import math
from typing import Any, Literal

import faiss
import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.metrics import Progress

CACHE_BYTES = 1 << 20  # of features compared with all queries while they are in the processor's cache
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
        # Each of D squared differences is rounded a few times, and their sum at most D times.
        slack = 1 + 2 * (features.shape[1] + 4) * float(np.finfo(np.float32).eps)
        candidates = candidates[squared <= np.float32(limit * slack)]
    return _refined(queries, features, candidates, k)


def _squared(queries: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Squared distances to the nearest query, [N] float32, by differences: expanding the square loses what is near."""
    distances: Any = faiss.fvec_L2sqr_ny  # type: ignore[attr-defined]
    n, dim = features.shape
    best = np.full(n, np.inf, np.float32)
    step = max(1, CACHE_BYTES // (4 * max(1, dim)))
    found = np.empty((len(queries), step), np.float32)
    pointers = [(faiss.swig_ptr(row), faiss.swig_ptr(query)) for row, query in zip(found, queries, strict=True)]
    for start in range(0, n, step):
        block = features[start : start + step]
        for row, query in pointers:
            distances(row, query, faiss.swig_ptr(block), dim, len(block))
        best[start : start + step] = found[:, : len(block)].min(0)
    return best


def _refined(queries: np.ndarray, features: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of some rows, by float64."""
    exact = np.empty(len(rows))
    wide = queries.astype(np.float64)
    for start in range(0, len(rows), REFINED_ROWS):
        near = features[rows[start : start + REFINED_ROWS]]
        apart = (near - query for query in wide)
        squared = [np.einsum("ij,ij->i", difference, difference) for difference in apart]
        exact[start : start + REFINED_ROWS] = np.sqrt(np.min(squared, axis=0))
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
