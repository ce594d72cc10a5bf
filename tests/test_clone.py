"""The prior actor: cloned from trajectories it was given, judged on those it was not, cached under what decides it."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from gsa.agent import storage
from gsa.agent.sizes import ObservationConfig, PriorConfig
from gsa.errors import SpecMismatch, Unavailable, UsageError
from gsa.metrics import read_log
from gsa.schema import SequenceRef
from learner.clone import Cloning, clone_prior, cloning_loss, cut_steps, prior_folder, split
from learner.config import CloneConfig, ComputeConfig
from tests import dots

NETWORK = PriorConfig(depth=4, units=32)
SHORT = CloneConfig(
    steps=6, batch=16, learning_rate=1e-3, compute=ComputeConfig("cpu", threads=1), holdout=0.25, evaluate_every=2,
    checkpoint_every_s=0.0,
)  # fmt: skip


def with_(**settings):
    return dataclasses.replace(SHORT, **settings)


@pytest.fixture
def store(tmp_path):
    with dots.make_store(tmp_path / "store", count=8, steps=10, action_dims=(2,), expert=True) as store:
        yield store


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def meta(folder):
    return storage.describe(folder, "prior_actor")["meta"]


def test_it_finds_what_the_trajectories_do(tmp_path):
    """The action is a function of the square's place: learnt on trajectories that were held out."""
    config = with_(steps=100, batch=32, evaluate_every=50, learning_rate=3e-3)
    with dots.make_store(tmp_path / "store", count=40, steps=2, action_dims=(1,), expert=True) as store:
        prior = clone_prior(store, store.rows(), NETWORK, config, tmp_path)
        about = meta(prior_folder(store, store.rows(), NETWORK, config, tmp_path))
    assert about["validation_loss"] < 0.3 * about["constant_loss"]
    places = np.arange(10, 55, 6)
    frames = np.tile(dots.image(places), (1, 1, 1, 3))
    with torch.no_grad():
        action = prior(torch.from_numpy(frames))[:, 0].numpy()
    assert np.corrcoef(action, dots.expert_action(places))[0, 1] > 0.9


@pytest.mark.parametrize("start", range(4))
def test_the_stack_ends_at_the_frame_the_action_was_chosen_on(store, start):
    """Oracle written out: three frames up to t, the first repeated before it; the action of step t."""
    trajectory = store.read(3)
    frames, vectors, actions = cut_steps(store, [SequenceRef("pool", 3, start, start + 2)], 3)
    rows = [max(start - 2, 0), max(start - 1, 0), start]
    expected = np.concatenate([trajectory.observation["pixels"][t] for t in rows], -1)
    assert np.array_equal(frames[0].numpy(), expected)
    assert vectors.shape == (1, 0)
    assert np.array_equal(actions[0].numpy(), trajectory.action[start])


def test_the_last_step_can_be_drawn(store):
    trajectory = store.read(0)
    *_, actions = cut_steps(store, [SequenceRef("pool", 0, len(trajectory) - 1, len(trajectory) + 1)], 3)
    assert np.array_equal(actions[0].numpy(), trajectory.action[-1])


def test_the_loss_is_the_mean_square_over_the_embodiments_own_dimensions():
    rng = np.random.default_rng(0)
    predicted, actions = rng.normal(size=(2, 7, 3))
    found = cloning_loss(torch.from_numpy(predicted), torch.from_numpy(actions)).item()
    assert found == pytest.approx(((predicted - actions) ** 2).mean(), rel=1e-6)


def test_held_out_trajectories_are_whole_and_apart():
    for count in range(1, 30):
        held_out, trained = split(np.arange(count) * 3, 0.1, seed=0)
        assert sorted([*held_out, *trained]) == list(range(0, 3 * count, 3))
        assert len(trained) >= 1
        assert len(held_out) == (0 if count == 1 else max(round(0.1 * count), 1))
    assert len(split(np.arange(10), 0.0, 0)[0]) == 0


def test_one_trajectory_and_no_holdout_still_give_a_prior(store, tmp_path):
    for rows, config in (([2], SHORT), ([1, 2, 3], with_(holdout=0.0))):
        clone_prior(store, rows, NETWORK, config, tmp_path)
        about = meta(prior_folder(store, rows, NETWORK, config, tmp_path))
        assert about["step"] == 6
        assert about["validation_loss"] is None


def test_it_is_trained_once_for_the_same_trajectories_in_any_order(store, tmp_path):
    first = clone_prior(store, [4, 1, 2], NETWORK, SHORT, tmp_path)
    calls = []
    again = clone_prior(store, np.array([1, 2, 4, 4]), NETWORK, SHORT, tmp_path, lambda *a: calls.append(a))
    assert calls == []
    assert same(first, again)
    assert len(list(tmp_path.glob("prior-*"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [1, 2]},
        {"network": dataclasses.replace(NETWORK, units=16)},
        {"config": with_(seed=1)},
        {"config": with_(steps=7)},
        {"config": with_(batch=8)},
        {"config": with_(learning_rate=2e-3)},
        {"config": with_(holdout=0.5)},
        {"config": with_(evaluate_every=3)},
        {"config": with_(patience=4)},
        {"config": with_(compute=ComputeConfig("cpu", precision="bfloat16", threads=1))},
        {"observation": ObservationConfig(("pixels",), (("joints", 2),))},
    ],
)
def test_anything_that_decides_it_gives_another_folder(store, tmp_path, change):
    default = {"rows": [1, 2, 3], "network": NETWORK, "config": SHORT}
    a, b = (prior_folder(store, **settings, cache=tmp_path) for settings in (default, {**default, **change}))
    assert a != b


def test_what_cannot_change_the_result_is_not_in_the_hash(store, tmp_path):
    other = with_(compute=ComputeConfig("cpu", threads=2), checkpoint_every_s=9.0)
    assert prior_folder(store, [1], NETWORK, SHORT, tmp_path) == prior_folder(store, [1], NETWORK, other, tmp_path)


def test_the_same_trajectories_in_another_store_are_the_same_prior(store, tmp_path):
    from retrieval.store import TrajectoryStore

    with TrajectoryStore.create(tmp_path / "copy") as copy:
        for row in (5, 3):
            copy.append(store.read(row), store.spec(row))
        a = prior_folder(store, [3, 5], NETWORK, SHORT, tmp_path)
        assert a == prior_folder(copy, [0, 1], NETWORK, SHORT, tmp_path)


def test_an_interrupted_training_continues_to_the_same_prior(store, tmp_path):
    class Stop(Exception):
        pass

    def until_four(done, total, numbers):
        if done == 5:
            raise Stop

    rows = store.rows()
    through = clone_prior(store, rows, NETWORK, SHORT, tmp_path / "through")
    with pytest.raises(Stop):
        clone_prior(store, rows, NETWORK, SHORT, tmp_path / "parts", until_four)
    seen = []
    parts = clone_prior(store, rows, NETWORK, SHORT, tmp_path / "parts", lambda done, *_: seen.append(done))
    assert seen == [5, 6]  # from the checkpoint of step 4
    assert same(through, parts)
    (folder,) = (tmp_path / "parts").glob("prior-*")
    assert [row["frames"] for row in read_log(folder)] == [2, 4, 6]
    assert not (folder / "checkpoints").exists()


def test_the_best_weights_are_kept_and_patience_stops(store, tmp_path):
    """A learning rate that wrecks the network: the result is the early best, and training does not go on."""
    config = with_(steps=100, learning_rate=0.3, evaluate_every=1, patience=3)
    seen = []
    best = clone_prior(store, store.rows(), NETWORK, config, tmp_path, lambda done, *_: seen.append(done))
    folder = prior_folder(store, store.rows(), NETWORK, config, tmp_path)
    losses = [row["prior/validation_loss"] for row in read_log(folder)]
    about = meta(folder)
    assert about["validation_loss"] == min(losses) == losses[about["step"] - 1]
    assert seen[-1] == about["step"] + 3 < 100
    shorter = dataclasses.replace(config, steps=about["step"])
    assert same(best, clone_prior(store, store.rows(), NETWORK, shorter, tmp_path))


def test_no_trajectories_and_several_embodiments_are_one_sentence(store, tmp_path):
    with pytest.raises(UsageError, match="no trajectories"):
        clone_prior(store, [], NETWORK, SHORT, tmp_path)
    store.append(dots.trajectory(np.random.default_rng(0), 5, 1), dots.spec(1))
    with pytest.raises(SpecMismatch, match="dots/1, dots/2"):
        clone_prior(store, [0, len(store) - 1], NETWORK, SHORT, tmp_path)


def test_the_validation_steps_are_the_held_out_ones_each_once(store, tmp_path):
    cloning = Cloning(store, store.rows(), NETWORK, SHORT, tmp_path, torch.device("cpu"))
    expected = np.concatenate([store.read(row).action for row in cloning.held_out])
    assert np.array_equal(cloning._validation.action.numpy(), expected)
    assert len(expected) == 20


def test_trajectories_of_other_content_are_another_prior(tmp_path):
    folders = []
    for seed in (0, 1):
        with dots.make_store(tmp_path / str(seed), seed, count=2, expert=True) as store:
            folders.append(prior_folder(store, [0, 1], NETWORK, SHORT, tmp_path))
    assert folders[0] != folders[1]


@pytest.mark.parametrize("name", ["prior_actor.safetensors", "prior_actor.json"])
def test_a_damaged_cache_is_said_and_trained_anew(store, tmp_path, name, caplog):
    first = clone_prior(store, [1, 2, 3], NETWORK, SHORT, tmp_path)
    folder = prior_folder(store, [1, 2, 3], NETWORK, SHORT, tmp_path)
    (folder / name).write_bytes(b"torn")
    assert same(clone_prior(store, [1, 2, 3], NETWORK, SHORT, tmp_path), first)
    assert "trained anew" in caplog.text


def test_damaged_checkpoints_are_said_and_begun_again(store, tmp_path, caplog):
    class Stop(Exception):
        pass

    def stop(done, total, numbers):
        if done == 5:
            raise Stop

    through = clone_prior(store, [1, 2, 3], NETWORK, SHORT, tmp_path / "through")
    with pytest.raises(Stop):
        clone_prior(store, [1, 2, 3], NETWORK, SHORT, tmp_path, stop)
    folder = prior_folder(store, [1, 2, 3], NETWORK, SHORT, tmp_path)
    for file in folder.glob("checkpoints/*/tensors.safetensors"):
        file.write_bytes(b"torn")
    assert same(clone_prior(store, [1, 2, 3], NETWORK, SHORT, tmp_path), through)
    assert "trained from the start" in caplog.text


def test_a_cache_that_cannot_be_written_is_one_sentence(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="Cannot keep the prior actor"):
        clone_prior(store, [1], NETWORK, SHORT, tmp_path / "file")


def test_two_runs_that_want_one_prior_train_it_once(store, tmp_path):
    seen = [[], []]

    def run(i):
        clone_prior(store, [0, 1, 2], NETWORK, SHORT, tmp_path, lambda *a: seen[i].append(a))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, seen)) == [0, 6]


def test_settings_scale_with_the_size_and_are_checked():
    sizes = [CloneConfig().for_size(size) for size in ("tiny", "small", "paper")]
    assert [c.steps for c in sizes] == [2_000, 8_000, 150_000]
    assert (sizes[-1].batch, sizes[-1].learning_rate) == (256, 1e-4)
    assert SHORT.for_size("tiny") == SHORT  # what was asked for stays
    for bad in ({"holdout": 1.0}, {"steps": -1}, {"patience": 2, "holdout": 0.0}):
        with pytest.raises(UsageError):
            with_(**bad)
