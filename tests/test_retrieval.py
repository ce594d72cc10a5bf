"""Retrieval: the nearest trajectories of the right robot, exactly, from an index that cannot go stale unseen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gsa.errors import FormatError, StaleError, UsageError
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval import index as index_module
from retrieval.index import FeatureIndex
from retrieval.retriever import RehearsalSet, random_rehearsal, retrieve
from retrieval.store import TrajectoryStore

ARM, WALKER = (Spec(name, {"pixels": ArraySpec((4, 4, 3), "uint8")}, 2) for name in ("toy/arm", "toy/walker"))
BLIND = Spec("toy/blind", {"state": ArraySpec((3,), "float32")}, 2)
DIM = 48


def encode(observation: dict[str, np.ndarray]) -> np.ndarray:
    """Features that are the first frame itself."""
    return observation["pixels"].reshape(len(observation["pixels"]), -1).astype(np.float32) / 255


def trajectory(spec: Spec, rng: np.random.Generator, source: str = "") -> Trajectory:
    steps = int(rng.integers(1, 6))
    observation = {
        name: rng.integers(0, 256, (steps + 1, *array.shape)).astype(array.dtype)
        for name, array in spec.observation.items()
    }
    return Trajectory(
        spec.embodiment, observation, np.zeros((steps, 2), np.float32), np.ones(steps, np.float32), source=source
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrajectoryStore]:
    """60 trajectories, a third each of an arm, a walker and a robot without a camera."""
    rng = np.random.default_rng(0)
    with TrajectoryStore.create(tmp_path / "s") as store:
        with store.batch():
            for i in range(60):
                spec = (ARM, WALKER, BLIND)[i % 3]
                store.append(trajectory(spec, rng, f"{spec.embodiment}/{i % 4}"), spec)
        yield store


@pytest.fixture
def index(store: TrajectoryStore, tmp_path: Path) -> FeatureIndex:
    return FeatureIndex.build(store, encode, "encoder-1", tmp_path / "i")


def oracle(store: TrajectoryStore, queries: np.ndarray, k: int, embodiment: str) -> tuple[list[int], list[float]]:
    """By hand, in float64."""
    found = []
    for row in store.rows(embodiment).tolist():
        feature = encode({"pixels": store.read(row).observation["pixels"][:1]})[0].astype(np.float64)
        found.append((min(np.sqrt(np.sum((feature - q) ** 2)) for q in queries.astype(np.float64)), row))
    found.sort()
    return [row for _, row in found[:k]], [distance for distance, _ in found[:k]]


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_retrieval_equals_the_oracle(
    store: TrajectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(index_module, "BLOCK_ROWS", block_rows)
    index = FeatureIndex.build(store, encode, "encoder-1", tmp_path / "i")
    rng = np.random.default_rng(block_rows)
    for n_queries in (1, 3, 40):
        queries = rng.uniform(size=(n_queries, DIM)).astype(np.float32)
        for k in (1, 6, 500):
            found = retrieve(index, queries, k, "toy/arm")
            rows, distances = oracle(store, queries, k, "toy/arm")
            assert list(found.rows) == rows
            np.testing.assert_allclose(found.distances, distances, rtol=1e-6)


def test_only_the_embodiment_asked_for_is_found_although_another_is_nearer(
    store: TrajectoryStore, index: FeatureIndex
) -> None:
    walkers = store.rows("toy/walker").tolist()
    queries = encode({"pixels": np.concatenate([store.slice(row, 0, 1)["pixels"] for row in walkers])})
    found = retrieve(index, queries, 10, "toy/arm")
    assert len(found) == 10
    assert set(found.rows) <= set(store.rows("toy/arm").tolist())
    assert min(found.distances) > 0
    assert retrieve(index, queries, 10, "toy/walker").distances == (0.0,) * 10


def test_fewer_than_k_is_an_answer_and_no_trajectory_comes_twice(store: TrajectoryStore, index: FeatureIndex) -> None:
    queries = np.zeros((7, DIM), np.float32)
    found = retrieve(index, queries, 500, "toy/arm")
    assert sorted(found.rows) == store.rows("toy/arm").tolist()
    assert found.k == 500
    assert list(found.distances) == sorted(found.distances)
    assert found.steps(store) == int(store.catalog.length[store.rows("toy/arm")].sum())
    assert found.sources == tuple(store.catalog.source(row) for row in found.rows)


def test_a_robot_without_a_camera_has_nothing_to_compare(store: TrajectoryStore, index: FeatureIndex) -> None:
    assert len(index) == 40
    assert retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/blind").rows == ()


def test_near_distances_are_exact_where_expanding_the_square_would_lose_them(tmp_path: Path) -> None:
    """Features far from the origin and close to each other: ‖x‖² − 2xy + ‖y‖² in float32 is all rounding."""
    rng = np.random.default_rng(0)
    offsets = rng.permutation(30)

    def far(observation: dict[str, np.ndarray]) -> np.ndarray:
        n = len(observation["pixels"])
        return np.full((n, 64), 1000, np.float32) + offsets[observation["pixels"][:, 0, 0, 0], None] / 16

    with TrajectoryStore.create(tmp_path / "s") as store:
        for i in range(30):
            made = trajectory(ARM, rng)
            made.observation["pixels"][0] = i
            store.append(made, ARM)
        index = FeatureIndex.build(store, far, "far", tmp_path / "i")
        found = retrieve(index, np.full((50, 64), 1000, np.float32), 30, "toy/arm")
    assert list(found.rows) == np.argsort(offsets).tolist()
    np.testing.assert_allclose(found.distances, np.arange(30) / 16 * 8)


@pytest.mark.parametrize(
    "queries", [np.zeros((0, DIM)), np.zeros(DIM), np.zeros((1, DIM - 1)), np.full((1, DIM), np.nan)]
)
def test_queries_that_make_no_sense_are_refused(index: FeatureIndex, queries: np.ndarray) -> None:
    with pytest.raises(UsageError, match="queries"):
        retrieve(index, queries, 5, "toy/arm")
    with pytest.raises(UsageError, match=r"toy/leg.*Known: toy/arm"):
        retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/leg")


# The index


class CountingEncoder:
    """Counts the frames it is given."""

    def __init__(self, function: Callable[[dict[str, np.ndarray]], np.ndarray] = encode) -> None:
        self.frames, self.function = 0, function

    def __call__(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        self.frames += len(observation["pixels"])
        return self.function(observation)


def test_an_index_of_another_encoder_or_store_is_refused(
    store: TrajectoryStore, index: FeatureIndex, tmp_path: Path
) -> None:
    FeatureIndex.open(index.path, store, "encoder-1")
    with pytest.raises(StaleError, match="another encoder"):
        FeatureIndex.open(index.path, store, "encoder-2")
    with TrajectoryStore.create(tmp_path / "other") as other, pytest.raises(StaleError, match="another store"):
        FeatureIndex.open(index.path, other, "encoder-1")
    with pytest.raises(UsageError, match="no feature index"):
        FeatureIndex.open(tmp_path / "nothing", store, "encoder-1")


def test_a_grown_store_makes_an_index_stale_and_an_update_encodes_only_what_is_new(
    store: TrajectoryStore, index: FeatureIndex
) -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        store.append(trajectory(ARM, rng))
    with pytest.raises(StaleError, match="lacks 3 newer"):
        FeatureIndex.open(index.path, store, "encoder-1")
    encoder = CountingEncoder()
    updated = FeatureIndex.update(store, encoder, "encoder-1", index.path)
    assert encoder.frames == 3
    queries = rng.uniform(size=(2, DIM)).astype(np.float32)
    assert list(retrieve(updated, queries, 9, "toy/arm").rows) == oracle(store, queries, 9, "toy/arm")[0]
    assert len(FeatureIndex.update(store, encoder, "encoder-1", index.path)) == 43
    assert encoder.frames == 3


def test_an_update_for_another_encoder_encodes_everything(store: TrajectoryStore, index: FeatureIndex) -> None:
    encoder = CountingEncoder(lambda observation: encode(observation)[:, :5])
    assert FeatureIndex.update(store, encoder, "encoder-2", index.path).dim == 5
    assert encoder.frames == 40


def test_an_index_of_an_empty_store_grows_with_it(tmp_path: Path) -> None:
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.add_spec(ARM)
        index = FeatureIndex.build(store, encode, "e", tmp_path / "i")
        assert retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm").rows == ()
        store.append(trajectory(ARM, np.random.default_rng(0)))
        index = FeatureIndex.update(store, encode, "e", tmp_path / "i")
        assert retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm").rows == (0,)


def test_a_lost_trajectory_is_not_retrieved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = TrajectoryStore.create(tmp_path / "s")
    for _ in range(4):
        store.append(trajectory(ARM, rng), ARM)
    FeatureIndex.build(store, encode, "e", tmp_path / "i")
    store.close()
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    with shard.open("r+b") as file:
        file.truncate(int(store.catalog.column("end")[3]) - 1)
    with TrajectoryStore.open(tmp_path / "s") as damaged:
        index = FeatureIndex.open(tmp_path / "i", damaged, "e")
        assert sorted(retrieve(index, np.zeros((1, DIM), np.float32), 9, "toy/arm").rows) == [0, 1, 2]


def test_a_failing_encoder_leaves_the_index_as_it_was(store: TrajectoryStore, index: FeatureIndex) -> None:
    before = index.path.read_bytes()
    for wrong in (lambda o: np.full((len(o["pixels"]), 3), np.nan), lambda o: np.zeros((1, 3)), lambda o: np.zeros(3)):
        with pytest.raises(UsageError, match="encoder gave"):
            FeatureIndex.build(store, wrong, "e", index.path)
    assert index.path.read_bytes() == before
    assert [p.name for p in index.path.parent.glob("*.tmp")] == []


def test_a_damaged_index_is_refused_or_made_again(store: TrajectoryStore, index: FeatureIndex) -> None:
    content = index.path.read_bytes()
    for spoilt in (b"", content[:200], content[:-9], content[::-1]):
        index.path.write_bytes(spoilt)
        with pytest.raises(FormatError, match="not a feature index"):
            FeatureIndex.open(index.path, store, "encoder-1")
        assert len(FeatureIndex.update(store, encode, "encoder-1", index.path)) == 40


def test_frames_are_encoded_in_bounded_lots_of_one_embodiment(store: TrajectoryStore, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(index_module, "ENCODE_ROWS", 8)
    sizes, seen = [], []

    def lots(observation: dict[str, np.ndarray]) -> np.ndarray:
        sizes.append(len(observation["pixels"]))
        return encode(observation)

    FeatureIndex.build(store, lots, "e", tmp_path / "i", lambda done, total, _: seen.append((done, total)))
    assert max(sizes) == 8
    assert sum(sizes) == 40
    assert seen[-1] == (40, 40)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# Rehearsal sets


def test_a_rehearsal_set_is_kept_as_it_is(store: TrajectoryStore, index: FeatureIndex, tmp_path: Path) -> None:
    nearest = retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm")
    drawn = random_rehearsal(store, 5, "toy/arm", seed=3)
    for found in (nearest, drawn):
        found.save(tmp_path / "set.json")
        loaded = RehearsalSet.load(tmp_path / "set.json")
        assert loaded == found
        assert loaded.hash == found.hash
    assert nearest.hash != drawn.hash


def test_random_rehearsal_is_drawn_by_its_seed_without_replacement(store: TrajectoryStore) -> None:
    arms = set(store.rows("toy/arm").tolist())
    sets = [random_rehearsal(store, 10, "toy/arm", seed) for seed in range(200)]
    assert random_rehearsal(store, 10, "toy/arm", 7) == sets[7]
    counts = np.bincount(np.concatenate([found.rows for found in sets]), minlength=60)
    assert set(np.flatnonzero(counts).tolist()) == arms
    assert all(len(set(found.rows)) == 10 for found in sets)
    assert 60 < counts[sorted(arms)].min() < counts.max() < 140  # 100 each on average
    assert set(random_rehearsal(store, 500, "toy/arm", 0).rows) == arms


def test_a_rehearsal_set_of_another_store_or_version_is_refused(store: TrajectoryStore, tmp_path: Path) -> None:
    found = random_rehearsal(store, 5, "toy/arm", 0)
    with TrajectoryStore.create(tmp_path / "other") as other, pytest.raises(StaleError, match=other.id):
        found.steps(other)
    path = tmp_path / "set.json"
    found.save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"version": 9}))
    with pytest.raises(FormatError, match="version 9"):
        RehearsalSet.load(path)
    for content in ("{", "[]", "{}", '{"format": "gsa-rehearsal", "version": 1}'):
        path.write_text(content)
        with pytest.raises(FormatError, match="not a rehearsal set"):
            RehearsalSet.load(path)
    with pytest.raises(UsageError, match="Cannot read"):
        RehearsalSet.load(tmp_path / "none")
