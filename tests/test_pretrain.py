"""Pre-training on a real store: it learns, it stops and continues bit for bit, it leaves what people look at."""

import dataclasses
import threading

import imageio_ffmpeg
import matplotlib.image
import numpy as np
import pytest
import torch

from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.errors import GsaError, UsageError
from gsa.metrics import read_log
from gsa.schema import SequenceRef, Spec
from learner.compute import generator_for
from learner.config import ComputeConfig, OptimiserConfig, PretrainConfig
from learner.pretrain import pretrain
from learner.strip import open_loop, strip_refs
from replay_service.batches import cut
from tests import dots

SMALL = PretrainConfig(
    model="tiny", max_action_dim=3, updates=4, batch=3, length=8, compute=ComputeConfig("cpu", threads=1),
    log_every=2, checkpoint_every=2, strip_context=3,
)  # fmt: skip


def with_(**settings):
    return dataclasses.replace(SMALL, **settings)


@pytest.fixture
def store(tmp_path):
    with dots.make_store(tmp_path / "store", count=3, action_dims=(1, 2)) as store:
        yield store


@pytest.fixture
def stopped_after():
    """stopped_after(n) → what `pretrain` takes to stop after n updates of this call."""

    def make(n):
        stop = threading.Event()
        seen = []

        def progress(done, total, numbers):
            seen.append(done)
            if len(seen) == n:
                stop.set()

        return {"progress": progress, "stop": stop}

    return make


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_stopped_and_continued_equals_run_through_bit_for_bit(store, tmp_path, stopped_after):
    config = with_(log_every=1)
    through = pretrain(store, config, tmp_path / "through")
    for n in (1, 2):  # stops between checkpoints too
        part = pretrain(store, config, tmp_path / "parts", **stopped_after(n))
        assert not same(part, through)
    continued = pretrain(store, config, tmp_path / "parts")
    assert same(continued, through)
    assert same(WorldModel.load(tmp_path / "parts"), through)
    rows = [read_log(tmp_path / name) for name in ("through", "parts")]
    losses = [[(r["frames"], r["pretrain/loss"]) for r in log if "pretrain/loss" in r] for log in rows]
    assert losses[0] == losses[1]
    assert [frames for frames, _ in losses[0]] == [1, 2, 3, 4]


def test_more_updates_continue_where_fewer_ended(store, tmp_path):
    through = pretrain(store, SMALL, tmp_path / "through")
    pretrain(store, with_(updates=3), tmp_path / "longer")
    assert same(pretrain(store, SMALL, tmp_path / "longer"), through)


def test_a_finished_one_is_not_trained_again(store, tmp_path):
    done = pretrain(store, with_(updates=2), tmp_path / "out")
    calls = []
    again = pretrain(store, with_(updates=2), tmp_path / "out", lambda *a: calls.append(a))
    assert calls == []
    assert same(done, again)


def test_a_pool_that_grew_does_not_change_a_pre_training_under_way(store, tmp_path, stopped_after):
    through = pretrain(store, SMALL, tmp_path / "through")
    pretrain(store, SMALL, tmp_path / "parts", **stopped_after(2))
    store.append(dots.trajectory(np.random.default_rng(9), 12), dots.spec(2))
    assert same(pretrain(store, SMALL, tmp_path / "parts"), through)


def test_a_damaged_checkpoint_is_said_and_the_previous_one_continued(store, tmp_path, stopped_after, caplog):
    through = pretrain(store, SMALL, tmp_path / "through")
    pretrain(store, SMALL, tmp_path / "parts", **stopped_after(3))
    newest = max((tmp_path / "parts" / "checkpoints").iterdir())
    (newest / "tensors.safetensors").write_bytes(b"torn")
    assert same(pretrain(store, SMALL, tmp_path / "parts"), through)
    assert f"{newest.name}/tensors.safetensors is damaged" in caplog.text


@pytest.mark.parametrize("change", [{"batch": 4}, {"seed": 1}, {"length": 7}])
def test_other_settings_do_not_continue_it(store, tmp_path, change):
    pretrain(store, with_(updates=1), tmp_path / "out")
    with pytest.raises(UsageError, match=next(iter(change))):
        pretrain(store, with_(**change), tmp_path / "out")


def test_one_that_diverges_stops_with_a_sentence_and_goes_on_with_a_lower_learning_rate(store, tmp_path):
    """The step that broke it is its last: no checkpoint is made of broken weights."""
    wild = OptimiserConfig(learning_rate=1e30, weight_decay=0.0, max_skips=3)
    pretrain(store, with_(updates=2), tmp_path / "out")
    with pytest.raises(GsaError, match=r"diverged: 3 updates in a row.*lower learning rate"):
        pretrain(store, with_(updates=99, optimiser=wild, checkpoint_every=99), tmp_path / "out")
    model = pretrain(store, with_(updates=3), tmp_path / "out")
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    assert read_log(tmp_path / "out")[-1]["frames"] == 3


def test_losses_of_each_embodiment_are_logged_and_make_up_the_whole(store, tmp_path):
    pretrain(store, with_(log_every=1), tmp_path / "out")
    rows = [r for r in read_log(tmp_path / "out") if "pretrain/recon" in r]
    for row in rows:
        parts = [row[k] for k in row if k.startswith("pretrain/recon/")]
        assert 1 <= len(parts) <= 2
        assert min(parts) - 1e-3 <= row["pretrain/recon"] <= max(parts) + 1e-3
    assert {k for r in rows for k in r if k.startswith("pretrain/dyn/")} == {
        f"pretrain/dyn/{name}" for name in store.specs
    }


def test_another_store_does_not_continue_it(store, tmp_path):
    pretrain(store, with_(updates=1), tmp_path / "out")
    with dots.make_store(tmp_path / "other") as other, pytest.raises(UsageError, match="another folder"):
        pretrain(other, SMALL, tmp_path / "out")


def test_the_seed_decides(store, tmp_path):
    a, b, c = (pretrain(store, with_(updates=1, seed=s), tmp_path / n) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert same(a, b)
    assert not same(a, c)


def test_the_folder_says_what_the_model_was_trained_on(store, tmp_path):
    pretrain(store, with_(updates=1), tmp_path / "out")
    from gsa.agent import storage

    meta = storage.describe(tmp_path / "out", "world_model")["meta"]
    assert meta["updates"] == 1
    (about,) = meta["stores"]
    assert about["id"] == store.id
    assert about["trajectories"] == 6
    assert {n: Spec.from_json(s) for n, s in about["specs"].items()} == store.specs


def test_losses_are_told_for_each_embodiment(store, tmp_path):
    pretrain(store, with_(updates=2, batch=8), tmp_path / "out")
    row = next(r for r in read_log(tmp_path / "out") if "pretrain/recon" in r)
    values = [row[f"pretrain/recon/{name}"] for name in ("dots/1", "dots/2")]
    assert min(values) <= row["pretrain/recon"] <= max(values)
    assert {"pretrain/dyn/dots/1", "pretrain/rep/dots/2"} <= row.keys()


def test_an_empty_store_and_one_of_too_many_actions_are_one_sentence(tmp_path):
    with dots.make_store(tmp_path / "empty", count=0) as empty, pytest.raises(UsageError, match="no trajectories"):
        pretrain(empty, SMALL, tmp_path / "a")
    with dots.make_store(tmp_path / "wide", action_dims=(4,)) as wide, pytest.raises(Exception, match="4 actions"):
        pretrain(wide, SMALL, tmp_path / "b")


def test_it_learns_and_shows_what_it_foresees(store, tmp_path):
    """The reconstruction error falls well below that of a black image; the strip has three rows an embodiment."""
    config = with_(updates=90, batch=4, optimiser=OptimiserConfig(learning_rate=1e-3), checkpoint_every=1000)
    pretrain(store, config, tmp_path / "out")
    rows = read_log(tmp_path / "out")
    recon = [r["pretrain/recon"] for r in rows if "pretrain/recon" in r]
    black = 3 * 9 * 16  # a square's pixels
    assert recon[0] > 0.8 * black
    assert recon[-1] < 0.6 * black
    assert rows[-1]["pretrain/open_loop_error"] < black
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "out" / "open_loop.mp4"), pix_fmt="rgb24")
    meta = next(frames)
    width, height = meta["size"]
    assert meta["fps"] == 10
    film = [np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in frames]
    assert len(film) == config.length
    assert [bool(f[0, :, 0].mean() > 150) for f in film] == [t >= config.strip_context for t in range(config.length)]
    strip = matplotlib.image.imread(tmp_path / "out" / "open_loop.png")
    assert strip.shape[0] > 2 * 150
    assert strip[..., :3].std() > 0.1


def test_open_loop_predictions_see_actions_and_nothing_else(store):
    model = WorldModel.create(SMALL.world_model(), 0)
    data = TensorBatch.from_batch(cut({"pool": store}, strip_refs(store, 8), 8, 3))

    def run(**changes):
        pixels = {"pixels": changes.pop("pixels", data.observation["pixels"])}
        changed = dataclasses.replace(data, observation=pixels, **changes)
        return open_loop(model, changed, 3, generator_for(model.device, 0, 0))["pixels"]

    plain = run()
    assert plain.shape == (2, 8, 64, 64, 3)
    future = data.observation["pixels"].clone()
    future[:, 3:] = 255 - future[:, 3:]
    assert np.array_equal(run(pixels=future), plain)
    past, actions = data.observation["pixels"].clone(), data.previous_action.clone()
    past[:, :3] = 255 - past[:, :3]
    actions[:, 3:, 0] = 1.0
    assert not np.array_equal(run(pixels=past)[:, 3:], plain[:, 3:])
    changed = run(previous_action=actions)
    assert np.array_equal(changed[:, :3], plain[:, :3])
    assert not np.array_equal(changed[:, 3:], plain[:, 3:])


def test_the_strip_shows_the_middle_of_the_longest_of_each_embodiment(tmp_path):
    rng = np.random.default_rng(0)
    with dots.make_store(tmp_path / "store", count=2, steps=6, action_dims=(1, 2)) as store:
        row = store.append(dots.trajectory(rng, 20, 1), dots.spec(1))
        assert strip_refs(store, 8) == [SequenceRef("pool", row, 6, 14), SequenceRef("pool", 2, 0, 7)]


@pytest.mark.parametrize("bad", [{"model": "huge"}, {"length": 1}, {"updates": 0}, {"strip_context": 8}])
def test_settings_out_of_range_are_refused_before_anything_is_loaded(bad):
    with pytest.raises(UsageError):
        with_(**bad)
