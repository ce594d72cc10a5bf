"""The feature index: what a world model's encoder makes of the first frame of every trajectory of a store.

One Arrow file, mapped, read block by block. It is keyed by the encoder's weights and by the rows it has seen; a key
that does not fit is refused, as distances between features of different encoders mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gsa.errors import FormatError, StaleError, UsageError
from gsa.metrics import Progress
from retrieval.files import replace_file
from retrieval.store import TrajectoryStore

Encode = Callable[[dict[str, np.ndarray]], np.ndarray]  # name → [N, …] of one embodiment; returns [N, D] float32

VERSION = b"1"
BLOCK_ROWS = 2048  # rows of a block in the file
ENCODE_ROWS = 256  # frames given to the encoder at a time


class FeatureIndex:
    """Features of the trajectories of one store under one encoder. Trajectories without images are not in it."""

    def __init__(self, path: Path, store: TrajectoryStore, encoder_hash: str) -> None:
        self.path, self.store, self.encoder_hash = path, store, encoder_hash
        try:
            with pa.memory_map(str(path)) as file:
                self._table = pa.ipc.open_file(file).read_all()
            meta = {k.decode(): v.decode() for k, v in self._table.schema.metadata.items()}
            version, self._seen = meta["version"], int(meta["seen"])
            self._key = (meta["store"], meta["encoder"], meta["fingerprint"])
        except FileNotFoundError:
            raise UsageError(f"There is no feature index at {path}; run gsa index.") from None
        except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
            raise FormatError(f"{path} is not a feature index: {error}.") from None
        if version != VERSION.decode():
            raise FormatError(
                f"{path} has index format version {version}; this version of GSA reads {VERSION.decode()}."
            )

    @classmethod
    def open(cls, path: str | Path, store: TrajectoryStore, encoder_hash: str) -> FeatureIndex:
        """The index at `path`. StaleError: it is of another encoder or store, or the store has changed since."""
        index = cls(Path(path), store, encoder_hash)
        if problem := index._problem():
            raise StaleError(f"The index {path} {problem}; run gsa index.")
        if index._seen < len(store):
            raise StaleError(f"The index {path} lacks {len(store) - index._seen} newer trajectories; run gsa index.")
        return index

    @classmethod
    def build(
        cls, store: TrajectoryStore, encode: Encode, encoder_hash: str, path: str | Path,
        progress: Progress | None = None,
    ) -> FeatureIndex:  # fmt: skip
        """Encodes the first frame of every trajectory and writes the index, whole or not at all."""
        _write(Path(path), store, encode, encoder_hash, None, progress)
        return cls.open(path, store, encoder_hash)

    @classmethod
    def update(
        cls, store: TrajectoryStore, encode: Encode, encoder_hash: str, path: str | Path,
        progress: Progress | None = None,
    ) -> FeatureIndex:  # fmt: skip
        """An index as of now: encodes only what the one at `path` lacks; all where it is missing or does not fit."""
        known: FeatureIndex | None
        try:
            known = cls(Path(path), store, encoder_hash)
        except (UsageError, FormatError):
            known = None
        if known is not None and known._problem():
            known = None
        if known is None or known._seen < len(store):
            _write(Path(path), store, encode, encoder_hash, known, progress)
        return cls.open(path, store, encoder_hash)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def dim(self) -> int:
        """D, the length of a feature; 0 for an index of nothing."""
        return int(self._table.schema.field("feature").type.list_size)

    @property
    def rows(self) -> np.ndarray:
        """The catalog rows it has features of, ascending: [N] int64."""
        return self._table["row"].to_numpy()

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows [n], features [n, D] float32) until all were had; views of the mapped file."""
        for batch in self._table.to_batches():
            yield _block(batch)

    def _problem(self) -> str:
        """Why it cannot be used for its store and encoder; empty where it can, for the rows it has seen."""
        store, encoder, fingerprint = self._key
        if store != self.store.id:
            return "is of another store"
        if encoder != self.encoder_hash:
            return "was made by another encoder"
        if self._seen > len(self.store) or fingerprint != self.store.catalog.fingerprint(self._seen):
            return "is of an earlier state of the store"
        return ""


def _write(
    path: Path, store: TrajectoryStore, encode: Encode, encoder_hash: str, known: FeatureIndex | None,
    progress: Progress | None,
) -> None:  # fmt: skip
    seen = len(store)
    rows = _indexable(store)
    rows = rows[(rows < seen) & (rows >= (known._seen if known is not None else 0))]
    meta = {
        b"version": VERSION, b"store": store.id.encode(), b"encoder": encoder_hash.encode(),
        b"seen": str(seen).encode(), b"fingerprint": store.catalog.fingerprint(seen).encode(),
    }  # fmt: skip
    features = _encoded(store, encode, rows, progress)
    first = next(features, None)
    dim = len(first[1][0]) if first is not None else known.dim if known is not None else 0
    schema = pa.schema([("row", pa.int64()), ("feature", pa.list_(pa.float32(), dim))], metadata=meta)
    with replace_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for block in known.blocks() if known is not None else ():
            writer.write_batch(_batch(*block, schema))
        if first is not None:
            writer.write_batch(_batch(*first, schema))
        for block in features:
            writer.write_batch(_batch(*block, schema))


def _indexable(store: TrajectoryStore) -> np.ndarray:
    """The readable rows of embodiments that see images."""
    seeing = [name for name, spec in store.specs.items() if any(v.is_image for v in spec.observation.values())]
    return np.sort(np.concatenate([store.rows(name) for name in seeing] or [np.zeros(0, np.int64)]))


def _encoded(
    store: TrajectoryStore, encode: Encode, rows: np.ndarray, progress: Progress | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (rows, features). Each call of the encoder has frames of one embodiment only."""
    done = 0
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        codes = store.catalog.embodiment[block]
        features: np.ndarray | None = None
        for code in np.unique(codes):
            members = np.flatnonzero(codes == code)
            for at in np.split(members, range(ENCODE_ROWS, len(members), ENCODE_ROWS)):
                found = _encode(store, encode, block[at])
                if features is None:
                    features = np.zeros((len(block), found.shape[1]), np.float32)
                features[at] = found
                done += len(at)
                if progress is not None:
                    progress(done, len(rows), {})
        assert features is not None
        yield block, features


def _encode(store: TrajectoryStore, encode: Encode, rows: np.ndarray) -> np.ndarray:
    frames = [store.slice(row, 0, 1) for row in rows.tolist()]
    names = store.spec(int(rows[0])).observation
    features = np.asarray(
        encode({name: np.concatenate([frame[name] for frame in frames]) for name in names}), np.float32
    )
    if features.ndim != 2 or len(features) != len(rows) or not np.all(np.isfinite(features)):
        raise UsageError(f"The encoder gave {list(features.shape)} for {len(rows)} frames, or values not finite.")
    return features


def _batch(rows: np.ndarray, features: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    flat = pa.array(np.ascontiguousarray(features).reshape(-1))
    return pa.record_batch([pa.array(rows), pa.FixedSizeListArray.from_arrays(flat, features.shape[1])], schema=schema)


def _block(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    rows = batch.column(0).to_numpy()
    return rows, batch.column(1).flatten().to_numpy().reshape(len(rows), -1)
