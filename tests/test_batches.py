"""Cutting batches against a slow oracle, and drawing them uniformly."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.schema import ArraySpec, SequenceRef, Spec, Trajectory
from replay_service.batches import PoolBatches, SequenceSampler, cut, empty_batch, shared_observation
from retrieval.store import TrajectoryStore
from tests.trajectories import IMAGE, counting, counting_spec

SPECS = [counting_spec("toy/a", 2), counting_spec("toy/b", 3)]
LENGTHS = [1, 2, 3, 7, 8, 9, 30, 64]
LENGTH = 8
ACTION_DIM = 5


def make_store(path, trajectories):
    store = TrajectoryStore.create(path)
    for spec in SPECS:
        store.add_spec(spec)
    for trajectory in trajectories:
        store.append(trajectory)
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Store name → (store, its trajectories)."""
    made = {}
    for i, name in enumerate(("online", "pool")):
        trajectories = [
            counting(100 * i + k, steps, SPECS[k % 2], with_reward=k != 3, ends=k % 3 == 0)
            for k, steps in enumerate(LENGTHS * 2)
        ]
        made[name] = make_store(tmp_path_factory.mktemp(name) / "store", trajectories), trajectories
    yield made
    for store, _ in made.values():
        store.close()


def oracle(trajectories: dict[str, list[Trajectory]], refs, length, reward_from):
    """The batch, one number at a time, from the table of time in gsa.schema."""
    b = len(refs)
    out = {
        "pixels": np.zeros((b, length, *IMAGE), np.uint8), "previous_action": np.zeros((b, length, ACTION_DIM)),
        "action_mask": np.zeros((b, ACTION_DIM)), "reward": np.zeros((b, length)),
        "reward_mask": np.zeros((b, length), bool), "discount": np.zeros((b, length)),
        "is_first": np.zeros((b, length), bool), "valid": np.zeros((b, length), bool),
    }  # fmt: skip
    for i, ref in enumerate(refs):
        trajectory = trajectories[ref.store][ref.trajectory]
        out["action_mask"][i, : trajectory.action.shape[1]] = 1
        for t in range(length):
            now = ref.start + t
            if now >= ref.stop:
                continue
            assert now <= len(trajectory)
            out["valid"][i, t], out["is_first"][i, t] = True, t == 0
            out["pixels"][i, t] = trajectory.observation["pixels"][now]
            out["discount"][i, t] = 1 if t == 0 else trajectory.discount[now - 1]
            for a in range(trajectory.action.shape[1]):
                out["previous_action"][i, t, a] = 0 if t == 0 else trajectory.action[now - 1, a]
            if now > 0 and ref.store in reward_from and trajectory.reward is not None:
                out["reward"][i, t], out["reward_mask"][i, t] = trajectory.reward[now - 1], True
    return out


def assert_equal(batch, expected):
    found = {**batch.observation, **{k: getattr(batch, k) for k in expected if k != "pixels"}}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype), err_msg=name)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_slow_oracle(stores, seed):
    rng = np.random.default_rng(seed)
    samplers = {name: SequenceSampler(name, LENGTH) for name in stores}
    for name, (store, _) in stores.items():
        samplers[name].extend(store.rows(), store.catalog.length[store.rows()])
    refs = samplers["online"].draw(12, rng) + samplers["pool"].draw(4, rng)
    out = empty_batch(16, LENGTH, SPECS[0].observation, ACTION_DIM)
    for array in (*out.observation.values(), out.previous_action, out.action_mask, out.reward, out.discount):
        array.fill(77)  # what an earlier batch left there
    for array in (out.reward_mask, out.is_first, out.valid):
        array.fill(True)
    both = {k: s for k, (s, _) in stores.items()}
    with ThreadPoolExecutor(1) as helper:
        batch = cut(both, refs, LENGTH, ACTION_DIM, ("online",), out, helper if seed % 2 else None)
    assert_equal(batch, oracle({k: t for k, (_, t) in stores.items()}, refs, LENGTH, ("online",)))
    assert [r.store for r in batch.refs] == ["online"] * 12 + ["pool"] * 4
    assert batch.shape == (16, LENGTH)


def test_every_slice_of_every_trajectory(stores):
    store, trajectories = stores["online"]
    refs = [
        SequenceRef("online", row, start, stop)
        for row, trajectory in enumerate(trajectories[: len(LENGTHS)])
        for start in range(len(trajectory) + 1)
        for stop in range(start + 1, min(start + LENGTH, len(trajectory) + 1) + 1)
    ]
    batch = cut({"online": store}, refs, LENGTH, ACTION_DIM, reward_from=("online",))
    assert_equal(batch, oracle({"online": trajectories}, refs, LENGTH, ("online",)))


def test_oracle_notices_a_shift_of_one_step(stores):
    store, trajectories = stores["online"]
    ref, shifted = SequenceRef("online", 6, 3, 11), SequenceRef("online", 6, 4, 12)
    batch = cut({"online": store}, [ref], LENGTH, ACTION_DIM, reward_from=("online",))
    expected = oracle({"online": trajectories}, [shifted], LENGTH, ("online",))
    for name in ("pixels", "previous_action", "reward"):
        with pytest.raises(AssertionError):
            assert_equal(batch, {name: expected[name]})


@pytest.mark.parametrize("wrong", [4, 5])
def test_a_row_that_cannot_be_cut_is_told_whoever_cuts_it(stores, wrong):
    refs = [SequenceRef("pool", 7, 0, 8)] * 8
    refs[wrong] = SequenceRef("pool", 7, 60, 68)
    with ThreadPoolExecutor(1) as helper, pytest.raises(UsageError, match="from 60 to 68"):
        cut({"pool": stores["pool"][0]}, refs, LENGTH, ACTION_DIM, helper=helper)


def test_padded_actions_are_zero_and_masked(stores):
    store, _ = stores["pool"]
    batch = cut({"pool": store}, [SequenceRef("pool", 6, 0, 8), SequenceRef("pool", 7, 0, 8)], LENGTH, ACTION_DIM)
    for b, dim in enumerate((2, 3)):
        assert batch.action_mask[b].tolist() == [1] * dim + [0] * (ACTION_DIM - dim)
        assert not batch.previous_action[b, :, dim:].any()
        assert batch.previous_action[b, 1:, :dim].all()


def test_short_trajectory_is_masked_after_its_end(stores):
    store, _ = stores["online"]
    batch = cut({"online": store}, [SequenceRef("online", 2, 0, 4)], LENGTH, ACTION_DIM, reward_from=("online",))
    assert batch.valid[0].tolist() == [True] * 4 + [False] * 4
    for array in (*batch.observation.values(), batch.previous_action, batch.reward, batch.discount, batch.reward_mask):
        assert not array[0, 4:].any()


def test_no_reward_without_leave(stores):
    store, _ = stores["online"]
    batch = cut({"online": store}, [SequenceRef("online", 6, 2, 10)], LENGTH, ACTION_DIM)
    assert not batch.reward.any()
    assert not batch.reward_mask.any()


def test_a_batch_is_a_copy(stores):
    store, trajectories = stores["pool"]
    batch = cut({"pool": store}, [SequenceRef("pool", 7, 0, 8)], LENGTH, ACTION_DIM)
    batch.observation["pixels"][:] = 0
    np.testing.assert_array_equal(store.read(7).observation["pixels"], trajectories[7].observation["pixels"])


def chi_square_limit(cells):
    """Exceeded by chance once in about 30,000 tests (normal approximation)."""
    return cells - 1 + 4 * np.sqrt(2 * (cells - 1))


def test_uniform_over_start_positions():
    sampler = SequenceSampler("pool", LENGTH)
    steps = np.array([3, 7, 8, 20, 64])
    sampler.extend(np.arange(5) + 10, steps)
    positions = [(row, start) for row, t in enumerate(steps) for start in range(max(1, t + 2 - LENGTH))]
    assert sampler.positions == len(positions)
    drawn = 40_000
    counts = dict.fromkeys(positions, 0)
    for ref in sampler.draw(drawn, np.random.default_rng(0)):
        counts[ref.trajectory - 10, ref.start] += 1
        assert ref.stop == min(ref.start + LENGTH, steps[ref.trajectory - 10] + 1)
    expected = drawn / len(positions)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < chi_square_limit(len(positions))


def test_growing_changes_nothing_but_what_is_new():
    """One by one as at once, far beyond the first allocation."""
    rng = np.random.default_rng(1)
    steps = rng.integers(1, 40, size=1000)
    at_once, one_by_one = SequenceSampler("online", LENGTH), SequenceSampler("online", LENGTH)
    at_once.extend(np.arange(1000), steps)
    for row, t in enumerate(steps):
        one_by_one.extend([row], [t])
    draws = [s.draw(500, np.random.default_rng(2)) for s in (at_once, one_by_one)]
    assert draws[0] == draws[1]
    assert at_once.steps == one_by_one.steps == steps.sum()


def test_forgets_the_oldest_and_no_more():
    sampler = SequenceSampler("online", 4)
    sampler.extend(np.arange(10), np.full(10, 10))
    sampler.forget_beyond(35)
    assert (len(sampler), sampler.steps, sampler.positions) == (3, 30, 24)
    assert {r.trajectory for r in sampler.draw(500, np.random.default_rng(0))} == {7, 8, 9}
    sampler.forget_beyond(0)
    assert {r.trajectory for r in sampler.draw(50, np.random.default_rng(0))} == {9}


def test_pool_batches_are_the_seeds_alone(stores):
    store, trajectories = stores["pool"]
    first, again, other = (PoolBatches(store, 6, LENGTH, ACTION_DIM, seed) for seed in (3, 3, 4))
    seen = [next(first) for _ in range(5)]
    for batch in seen:
        assert_equal(batch, oracle({"pool": trajectories}, batch.refs, LENGTH, ()))
    assert [b.refs for b in seen] == [next(again).refs for _ in range(5)]
    assert [b.refs for b in seen] != [next(other).refs for _ in range(5)]
    assert len({b.refs for b in seen}) == 5
    for batches in (first, again, other):
        batches.close()


def test_pool_batches_continue_where_they_were_saved(stores):
    store, _ = stores["pool"]
    batches = PoolBatches(store, 6, LENGTH, ACTION_DIM, seed=1, buffers=2)
    for _ in range(3):
        next(batches)
    state = batches.state()
    expected = [next(batches).refs for _ in range(4)]
    continued = PoolBatches(store, 6, LENGTH, ACTION_DIM, seed=1)
    next(continued)
    continued.restore(state)
    assert [next(continued).refs for _ in range(4)] == expected
    with pytest.raises(FormatError, match="seed"):
        PoolBatches(store, 6, LENGTH, ACTION_DIM, seed=2).restore(state)
    with pytest.raises(FormatError, match="positions"):
        PoolBatches(store, 6, LENGTH, ACTION_DIM, seed=1, rows=np.arange(3)).restore(state)


@pytest.mark.parametrize("buffers", [2, 3])
def test_a_reused_batch_lasts_as_long_as_it_says(stores, buffers):
    store, trajectories = stores["pool"]
    batches = PoolBatches(store, 6, LENGTH, ACTION_DIM, seed=0, buffers=buffers)
    held = []
    for _ in range(12):
        held.append(next(batches))
        batches._next.result()  # the one cut ahead is done: the worst time to look
        for batch in held[-(buffers - 1) :]:
            assert_equal(batch, oracle({"pool": trajectories}, batch.refs, LENGTH, ()))
    assert len({id(b.reward) for b in held}) == buffers


def test_only_the_rows_asked_for(stores):
    store, _ = stores["pool"]
    batches = PoolBatches(store, 50, LENGTH, ACTION_DIM, seed=0, rows=np.array([4, 6]))
    assert {r.trajectory for r in next(batches).refs} == {4, 6}


def test_refuses_what_does_not_fit(stores, tmp_path):
    store, _ = stores["pool"]
    with pytest.raises(SpecMismatch, match="toy/b has 3 actions; the model takes 2"):
        PoolBatches(store, 2, LENGTH, 2, seed=0)
    with TrajectoryStore.create(tmp_path / "empty") as empty, pytest.raises(UsageError, match="no trajectories"):
        PoolBatches(empty, 2, LENGTH, ACTION_DIM, seed=0)
    state = Spec("toy/c", {"state": ArraySpec((3,), "float32")}, 2)
    with pytest.raises(SpecMismatch, match="common to all embodiments: toy/a has pixels; toy/c has state"):
        shared_observation([SPECS[0], state], ACTION_DIM)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_several_cameras_of_any_size_and_vectors_are_cut_alike(tmp_path, codec):
    """Two robots that share two cameras and a vector, and have others of their own; images larger than a chunk."""
    shared = {"front": ArraySpec((200, 400, 3), "uint8"), "wrist": ArraySpec((8, 6, 1), "uint8"),
              "joints": ArraySpec((3,), "float32")}  # fmt: skip
    specs = [
        Spec("lab/one", shared | {"depth": ArraySpec((16, 16, 1), "uint8")}, 2),
        Spec("lab/two", shared | {"force": ArraySpec((6,), "float32")}, 5),
    ]
    rng, stored = np.random.default_rng(0), []
    with TrajectoryStore.create(tmp_path / "s", codec) as store:
        for i in range(4):
            spec, steps = specs[i % 2], 9 + i
            observation = {
                k: rng.integers(0, 256, (steps + 1, *v.shape)).astype(v.dtype) for k, v in spec.observation.items()
            }
            action = rng.uniform(-1, 1, (steps, spec.action_dim)).astype(np.float32)
            stored.append(Trajectory(spec.embodiment, observation, action, np.ones(steps, np.float32)))
            store.append(stored[-1], spec)
        refs = [SequenceRef("pool", i, i, i + 6) for i in range(4)]
        batch = cut({"pool": store}, refs, 6, 7)
        assert set(batch.observation) == set(shared)
        for b, ref in enumerate(refs):
            t = stored[ref.trajectory]
            for name in shared:
                np.testing.assert_array_equal(batch.observation[name][b], t.observation[name][ref.start : ref.stop])
            dim = t.action.shape[1]
            np.testing.assert_array_equal(batch.previous_action[b, 1:, :dim], t.action[ref.start : ref.stop - 1])
            assert not batch.previous_action[b, :, dim:].any()
