"""Retrieval: the nearest trajectories of the right robot, exactly, from an index that cannot go stale unseen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gsa.errors import FormatError, GsaError, SpecMismatch, StaleError, Unavailable, UsageError
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval import index as index_module
from retrieval import nearest as nearest_module
from retrieval.index import FeatureIndex
from retrieval.nearest import Approximate, Kind, nearest
from retrieval.retriever import Precision, RehearsalSet, is_of_task, random_rehearsal, retrieve
from retrieval.store import TrajectoryStore

ARM, WALKER = (Spec(name, {"pixels": ArraySpec((4, 4, 3), "uint8")}, 2) for name in ("toy/arm", "toy/walker"))
BLIND = Spec("toy/blind", {"state": ArraySpec((3,), "float32")}, 2)
DIM = 48


def encode(observation: dict[str, np.ndarray]) -> np.ndarray:
    """Features that are the first frame itself."""
    if "pixels" not in observation:
        raise SpecMismatch("no pixels")
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
    return FeatureIndex.update(store, encode, "encoder-1", tmp_path / "i")


def oracle(store: TrajectoryStore, queries: np.ndarray, k: int, embodiment: str) -> tuple[list[int], list[float]]:
    """By hand, in float64."""
    found = []
    for row in store.rows(embodiment).tolist():
        feature = encode({"pixels": store.read(row).observation["pixels"][:1]})[0].astype(np.float64)
        found.append((min(np.sqrt(np.sum((feature - q) ** 2)) for q in queries.astype(np.float64)), row))
    found.sort()
    return [row for _, row in found[:k]], [distance for distance, _ in found[:k]]


@pytest.mark.parametrize("cached_rows", [1, 7, 1000])
def test_retrieval_equals_the_oracle(
    store: TrajectoryStore, index: FeatureIndex, monkeypatch: pytest.MonkeyPatch, cached_rows: int
) -> None:
    monkeypatch.setattr(nearest_module, "CACHE_BYTES", cached_rows * DIM * 4)
    monkeypatch.setattr(nearest_module, "REFINED_ROWS", cached_rows)
    rng = np.random.default_rng(cached_rows)
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


def test_a_robot_that_the_encoder_cannot_see_is_left_out_by_name(store: TrajectoryStore, index: FeatureIndex) -> None:
    assert len(index) == 40
    assert index.embodiments == ["toy/arm", "toy/walker"]
    assert index.unseen == ("all of toy/blind: no pixels",)
    assert retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/blind").rows == ()
    store.append(trajectory(BLIND, np.random.default_rng(0)))
    assert FeatureIndex.update(store, encode, "encoder-1", index.path).unseen == index.unseen


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
        index = FeatureIndex.update(store, far, "far", tmp_path / "i")
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
        features = self.function(observation)
        self.frames += len(features)
        return features


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
        index = FeatureIndex.update(store, encode, "e", tmp_path / "i")
        assert retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm").rows == ()
        store.append(trajectory(ARM, np.random.default_rng(0)))
        index = FeatureIndex.update(store, encode, "e", tmp_path / "i")
        assert retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm").rows == (0,)


def test_a_lost_trajectory_is_not_retrieved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = TrajectoryStore.create(tmp_path / "s")
    for _ in range(4):
        store.append(trajectory(ARM, rng), ARM)
    FeatureIndex.update(store, encode, "e", tmp_path / "i")
    store.close()
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    with shard.open("r+b") as file:
        file.truncate(int(store.catalog.column("end")[3]) - 1)
    with TrajectoryStore.open(tmp_path / "s") as damaged:
        index = FeatureIndex.open(tmp_path / "i", damaged, "e")
        assert sorted(retrieve(index, np.zeros((1, DIM), np.float32), 9, "toy/arm").rows) == [0, 1, 2]


def test_a_failing_encoder_leaves_the_index_as_it_was(store: TrajectoryStore, index: FeatureIndex) -> None:
    queries = np.zeros((1, DIM), np.float32)
    before = retrieve(index, queries, 9, "toy/arm")
    for wrong in (lambda o: np.full((len(o["pixels"]), 3), np.nan), lambda o: np.zeros((1, 3)), lambda o: np.zeros(3)):
        with pytest.raises(UsageError, match="encoder gave"):
            FeatureIndex.update(store, wrong, "encoder-2", index.path)
    assert retrieve(FeatureIndex.open(index.path, store, "encoder-1"), queries, 9, "toy/arm") == before


def test_an_interrupted_index_goes_on_where_it_was(
    store: TrajectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "COMMIT_ROWS", 12)
    whole = FeatureIndex.update(store, encode, "e", tmp_path / "whole")

    def interrupted(observation: dict[str, np.ndarray]) -> np.ndarray:
        if encoder.frames >= 20:
            raise KeyboardInterrupt
        return encode(observation)

    encoder = CountingEncoder(interrupted)
    with pytest.raises(KeyboardInterrupt):
        FeatureIndex.update(store, encoder, "e", tmp_path / "i")
    with pytest.raises(StaleError, match="lacks"):
        FeatureIndex.open(tmp_path / "i", store, "e")
    rest = CountingEncoder()
    index = FeatureIndex.update(store, rest, "e", tmp_path / "i")
    assert 0 < rest.frames < 40
    for name in index.embodiments:
        for ours, theirs in zip(index.features(name), whole.features(name), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_two_that_index_at_once_make_one_index(store: TrajectoryStore, tmp_path: Path) -> None:
    encoder, ready = CountingEncoder(), threading.Barrier(3)

    def update(_: int) -> int:
        ready.wait()
        return len(FeatureIndex.update(store, encoder, "e", tmp_path / "i"))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(update, range(3))) == [40, 40, 40]
    assert encoder.frames == 40


def test_a_damaged_index_is_refused_or_made_again(store: TrajectoryStore, index: FeatureIndex) -> None:
    """Every file of it: emptied, cut short, reversed; and sizes and names that no index has."""
    for path in sorted(index.path.glob("*.*")):
        content = path.read_bytes()
        spoilt = [b"", content[:-9], content[: len(content) // 2]]
        if path.suffix != ".features":  # any bytes are features
            spoilt.append(content[::-1])
        for wrong in spoilt if content else ():
            path.write_bytes(wrong)
            refuses(store, index.path)
        path.write_bytes(content)
    head = json.loads((index.path / "index.json").read_text())
    parts = head["parts"]
    for changes in (
        {"dim": -1}, {"dim": 1 << 60}, {"seen": -5}, {"generation": "../../x"}, {"parts": [parts[0], parts[0]]},
        {"parts": parts[::-1]}, {"parts": [{"embodiment": "toy/arm", "rows": 1 << 62}]}, {"version": 99}, {"parts": 3},
        {"more": 1}, {"dim": "48"}, {"parts": [{"embodiment": "toy/arm", "rows": -3}]},
    ):  # fmt: skip
        (index.path / "index.json").write_text(json.dumps(head | changes))
        refuses(store, index.path)
    assert len(FeatureIndex.update(store, encode, "encoder-1", index.path)) == 40


@pytest.mark.parametrize("seed", range(3))
def test_an_index_file_of_any_bytes_opens_or_is_refused(store: TrajectoryStore, index: FeatureIndex, seed: int) -> None:
    """Cut at every byte, then with random bytes in random places."""
    path, rng = index.path / "index.json", np.random.default_rng(seed)
    content = path.read_bytes()
    spoilt = [content[:n] for n in range(len(content))]
    for _ in range(300):
        changed = np.frombuffer(content, np.uint8).copy()
        changed[rng.integers(len(changed), size=3)] = rng.integers(256, size=3)
        spoilt.append(changed.tobytes())
    refused = 0
    for wrong in spoilt:
        path.write_bytes(wrong)
        try:
            FeatureIndex.open(index.path, store, "encoder-1")
        except GsaError:
            refused += 1
    assert refused > len(spoilt) - 100


def refuses(store: TrajectoryStore, folder: Path) -> None:
    with pytest.raises((FormatError, StaleError)) as refused:
        FeatureIndex.open(folder, store, "encoder-1")
    assert str(refused.value).endswith((".", "]"))


def test_features_that_are_not_numbers_are_found_when_searched(store: TrajectoryStore, index: FeatureIndex) -> None:
    (path,) = index.path.glob("*-0.features")
    with path.open("r+b") as file:
        file.write(np.float32("nan").tobytes())
    with pytest.raises(FormatError, match="damaged"):
        retrieve(FeatureIndex.open(index.path, store, "encoder-1"), np.zeros((1, DIM), np.float32), 3, "toy/arm")


def test_a_disk_that_refuses_is_one_sentence_and_leaves_what_was_there(
    store: TrajectoryStore, index: FeatureIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(trajectory(ARM, np.random.default_rng(0)))
    before = (index.path / "index.json").read_bytes()
    full = lambda self, data: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(index_module.WholeFile, "write", full)
    with pytest.raises(Unavailable, match="No space left"):
        FeatureIndex.update(store, encode, "encoder-1", index.path)
    monkeypatch.undo()
    assert (index.path / "index.json").read_bytes() == before
    assert len(FeatureIndex.update(store, encode, "encoder-1", index.path)) == 41


def test_observations_are_encoded_in_bounded_lots_of_one_embodiment(
    store: TrajectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "ENCODE_ROWS", 8)
    sizes, seen = [], []

    def lots(observation: dict[str, np.ndarray]) -> np.ndarray:
        features = encode(observation)
        sizes.append(len(features))
        return features

    FeatureIndex.update(store, lots, "e", tmp_path / "i", lambda done, total, _: seen.append((done, total)))
    assert max(sizes) == 8
    assert sum(sizes) == 40
    assert seen[-1] == (60, 60)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_observations_of_several_parts_reach_the_encoder_whole(tmp_path: Path) -> None:
    """Two cameras and a vector: the encoder gets the dict, one row a trajectory."""
    parts = {"front": ((4, 4, 3), "uint8"), "hand": ((2, 2, 3), "uint8"), "state": ((3,), "float32")}
    spec = Spec("toy/two", {name: ArraySpec(*part) for name, part in parts.items()}, 2)
    rng = np.random.default_rng(0)
    given = [trajectory(spec, rng) for _ in range(5)]

    def all_of_it(observation: dict[str, np.ndarray]) -> np.ndarray:
        assert {name: value.shape[1:] for name, value in observation.items()} == {
            name: array.shape for name, array in spec.observation.items()
        }
        return np.concatenate([value.reshape(len(value), -1) for value in observation.values()], 1)

    with TrajectoryStore.create(tmp_path / "s") as store:
        for made in given:
            store.append(made, spec)
        index = FeatureIndex.update(store, all_of_it, "e", tmp_path / "i")
        for row, made in enumerate(given):
            query = all_of_it({name: value[:1] for name, value in made.observation.items()})
            assert retrieve(index, query, 1, "toy/two").rows == (row,)


# The nearest


@pytest.mark.parametrize("seed", range(30))
def test_ties_and_near_ties_are_settled_by_the_lower_row(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many features equal, others apart by less than float32 tells: as by float64 and a stable sort, whoever of
    several threads computes what."""
    monkeypatch.setattr("retrieval.nearest.PART_BYTES", 4096)
    rng = np.random.default_rng(seed)
    n, dim = int(rng.integers(1, 400)), int(rng.integers(1, 70))
    centres = rng.normal(size=(5, dim)).astype(np.float32) * 100
    features = centres[rng.integers(5, size=n)] + rng.integers(0, 2, (n, 1)).astype(np.float32) * np.float32(1e-5)
    queries = rng.normal(size=(int(rng.integers(1, 4)), dim)).astype(np.float32)
    valid = rng.random(n) < 0.8
    k = int(rng.integers(1, n + 1))
    rows, distances = nearest(queries, features, k, valid)
    exact = np.min([((features.astype(np.float64) - query) ** 2).sum(1) for query in queries.astype(np.float64)], 0)
    order = [row for row in np.argsort(exact, kind="stable") if valid[row]][:k]
    assert rows.tolist() == order
    np.testing.assert_allclose(distances, np.sqrt(exact[order]), rtol=1e-12)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_search_tells_the_recall_it_has_and_true_distances(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3000, 16)).astype(np.float32)
    found = Approximate(features, kind, 50)
    assert 0.3 < found.recall <= 1
    shares = []
    for query in rng.normal(size=(40, 1, 16)).astype(np.float32):
        rows, distances = found.nearest(query, 50, features[:, 0] > -1)
        assert (features[rows, 0] > -1).all()
        np.testing.assert_allclose(distances, np.linalg.norm(features[rows].astype(np.float64) - query, axis=1))
        exact, _ = nearest(query, features, 50, features[:, 0] > -1)
        shares.append(np.isin(exact, rows).mean())
    assert abs(np.mean(shares) - found.recall) < 0.2
    assert Approximate(features, kind, 50).recall == pytest.approx(found.recall, abs=0.02)  # HNSW: threads race


def test_a_set_found_approximately_says_so(index: FeatureIndex, tmp_path: Path) -> None:
    approximate = Approximate(index.features("toy/arm")[1], "ivf", 5)
    found = retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm", approximate=approximate)
    assert (found.search, found.recall) == ("ivf", approximate.recall)
    found.save(tmp_path / "set.json")
    assert RehearsalSet.load(tmp_path / "set.json") == found
    exact = retrieve(index, np.zeros((1, DIM), np.float32), 5, "toy/arm")
    assert (exact.search, exact.recall) == ("exact", None)


# Precision


def test_precision_is_by_the_sources_the_pool_knows(tmp_path: Path) -> None:
    """Arms of task a are nearest, then walkers, then arms of task b."""
    level = {"toy/a-v3/scripted-1": 1, "toy/walk": 3, "toy/b-v3/noise": 5}
    with TrajectoryStore.create(tmp_path / "s") as store:
        for source, value in level.items():
            spec = WALKER if source == "toy/walk" else ARM
            for _ in range(10):
                made = trajectory(spec, np.random.default_rng(0), source)
                made.observation["pixels"][:] = value
                store.append(made, spec)
        index = FeatureIndex.update(store, encode, "e", tmp_path / "i")
        found = retrieve(index, np.zeros((1, DIM), np.float32), 20, "toy/arm", task="toy/a-v3")
        assert found.precision == (Precision(10, 1.0, 1.0), Precision(20, 0.5, 0.5))
        assert found.task_share == 0.5
        assert [p.task for p in retrieve(index, np.zeros((1, DIM), np.float32), 20, "toy/arm", "toy/c").precision] == [
            None, None,
        ]  # fmt: skip
        drawn = random_rehearsal(store, 500, "toy/arm", 0, "toy/a-v3")
        assert drawn.precision[-1] == Precision(20, 0.5, None)
        found.save(tmp_path / "set.json")
        assert RehearsalSet.load(tmp_path / "set.json") == found


def test_a_source_is_of_a_task_by_whole_names() -> None:
    assert is_of_task("metaworld/reach-v3/scripted-0.5", "metaworld/reach-v3")
    assert is_of_task("metaworld/reach", "metaworld/reach-v3")
    assert not is_of_task("metaworld/reach-wall-v3/scripted-0.5", "metaworld/reach-v3")
    assert not is_of_task("dmc/walker", "dmc/walker-walk")
    assert not is_of_task("", "dmc/walker-walk")


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
    wrong = (
        {"rows": [-1]},
        {"rows": [1, 1]},
        {"rows": [0.5]},
        {"rows": "01"},
        {"sources": []},
        {"more": 1},
        {"k": "5"},
    )
    damaged = [json.dumps(data | change) for change in wrong]
    for content in ("{", "[]", "{}", '{"format": "gsa-rehearsal", "version": 1}', *damaged):
        path.write_text(content)
        with pytest.raises(FormatError, match="not a rehearsal set"):
            RehearsalSet.load(path)
    with pytest.raises(UsageError, match="Cannot read"):
        RehearsalSet.load(tmp_path / "none")
