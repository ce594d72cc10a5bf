"""The learner: its optimiser against float64, what each step may touch, exact resume, and the loop around it."""

import copy
import dataclasses
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from gsa import config as configs
from gsa.agent.agent import Agent
from gsa.agent.sizes import BehaviourConfig, WorldModelConfig
from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.errors import FormatError, GsaError, UsageError
from gsa.schema import Batch, SequenceRef
from learner.checkpoint import Checkpoints
from learner.compute import generator_for, set_up
from learner.config import CloneConfig, ComputeConfig, LearnerConfig, OptimiserConfig, PretrainConfig
from learner.finetune import FineTuner
from learner.loop import LearnerLoop
from learner.optimiser import Optimiser


def optimiser(*shapes, **config):
    weights = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(7))) for s in shapes]
    return weights, Optimiser("test", [(f"w{i}", w) for i, w in enumerate(weights)], OptimiserConfig(**config))


def adam_float64(weight, gradients, lr, eps, decay, clip):
    """The method's step, written out: w ← (1 − decay)·w; Adam on the clipped gradient."""
    w, m, v = weight.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = (1 - decay) * w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + eps)
    return w


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.1])
def test_steps_equal_the_float64_oracle_with_one_decay_each(decay):
    (weight,), opt = optimiser((5, 3), learning_rate=0.02, weight_decay=decay, clip_norm=4.0)
    before = weight.detach().numpy().copy()
    gradients = [np.random.default_rng(t).normal(size=(5, 3)) * 10.0 ** (t - 2) for t in range(5)]
    for g in gradients:
        opt.step((weight * torch.as_tensor(g, dtype=torch.float32)).sum())
    expected = adam_float64(before, gradients, 0.02, 1e-5, decay, 4.0)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-5, atol=1e-6)
    assert opt.steps == 5


def test_without_a_gradient_a_step_multiplies_the_weights_once():
    (weight,), opt = optimiser((6,), weight_decay=0.25, learning_rate=1e-4)
    before = weight.detach().clone()
    opt.step((weight * 0).sum())
    torch.testing.assert_close(weight.detach(), 0.75 * before, rtol=1e-6, atol=0)


def test_the_clip_is_over_all_weights_together():
    """Two gradients of norm 3 and 4 make one of norm 5, and keep their ratio."""
    (a, b), opt = optimiser((1,), (1,), clip_norm=1.0)
    seen = []
    opt._adam.register_step_pre_hook(lambda *_: seen.extend([a.grad.item(), b.grad.item()]))
    metrics = opt.step((3 * a + 4 * b).sum())
    assert metrics["test_grad_norm"] == pytest.approx(5.0)
    assert seen == pytest.approx([0.6, 0.8], rel=1e-4)


def test_a_gradient_laid_out_unlike_its_weight_is_applied_to_the_right_entries():
    """The fused pass walks memory: a transposed gradient must not be walked in its own order."""
    (weight,), opt = optimiser((2, 3), learning_rate=0.1, weight_decay=0.0)
    before = weight.detach().numpy().copy()
    target = torch.arange(6.0).reshape(3, 2) * 10 ** torch.arange(6.0).reshape(3, 2)
    opt.step((weight.t().contiguous() * target).sum())
    expected = adam_float64(before, [target.t().numpy()], 0.1, 1e-5, 0.0, 100.0)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_through_another_module_leaves_that_module_alone():
    (mine, other), _ = optimiser((3,), (3,))
    opt = Optimiser("test", [("mine", mine)], OptimiserConfig())
    before = other.detach().clone()
    opt.step((mine * other).sum())
    assert other.grad is None
    assert torch.equal(other, before)
    assert mine.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_gradient_changes_nothing_and_is_counted(bad):
    (weight,), opt = optimiser((4,), weight_decay=0.1)
    opt.step(weight.sum())
    before, state = weight.detach().clone(), copy.deepcopy(opt.state()["moments"])
    opt.step((weight * torch.tensor([1.0, bad, 1.0, 1.0])).sum())
    assert torch.equal(weight, before)
    assert all(torch.equal(v, state["w0"][k]) for k, v in opt.state()["moments"]["w0"].items())
    assert (opt.steps, opt.skips) == (1, 1)


def test_the_training_stops_after_so_many_broken_gradients_in_a_row_and_says_what_to_do():
    (weight,), opt = optimiser((4,), max_skips=3)
    bad, good = (lambda: (weight * float("nan")).sum()), weight.sum
    for loss in (bad, bad, good, bad, bad):
        opt.step(loss())
    with pytest.raises(GsaError, match=r"test training has diverged: 3 updates in a row.*lower learning rate"):
        opt.step(bad())


def test_a_restored_optimiser_continues_bit_for_bit():
    (weight,), opt = optimiser((8, 8), weight_decay=1e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        opt.step((weight**2 * torch.rand(8, 8, generator=draw)).sum())
    (twin,), again = optimiser((8, 8), weight_decay=1e-3)
    twin.data.copy_(weight)
    again.restore(copy.deepcopy(opt.state()))
    for _ in range(3):
        factor = torch.rand(8, 8, generator=draw)
        opt.step((weight**2 * factor).sum())
        again.step((twin**2 * factor).sum())
    assert torch.equal(weight, twin)
    assert opt.steps == again.steps == 6


def test_the_state_of_another_model_is_refused():
    _, opt = optimiser((8,))
    _, longer = optimiser((9,))
    _, more = optimiser((8,), (8,))
    with pytest.raises(FormatError, match=r"\[8\].*\[9\]"):
        longer.restore(opt.state())
    with pytest.raises(FormatError, match="w1"):
        more.restore(opt.state())


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"weight_decay": 1.0}, {"clip_norm": float("nan")}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        OptimiserConfig(**bad)


class CountingTuner:
    """Its weights are the number of updates, so that a stale or torn publication shows."""

    def __init__(self):
        self.updates = 0

    def update(self, batch):
        self.updates += 1
        return {"loss": float(self.updates)}

    def snapshot(self, out=None):
        return {"n": np.array(self.updates)}


def blank_batch(b=2, t=3):
    zeros = np.zeros((b, t), np.float32)
    return Batch(
        observation={"pixels": np.zeros((b, t, 64, 64, 3), np.uint8)}, previous_action=np.zeros((b, t, 4), np.float32),
        action_mask=np.ones((b, 4), np.float32), reward=zeros, reward_mask=zeros > 0, discount=zeros + 1,
        is_first=zeros > 0, valid=zeros == 0, refs=(),
    )  # fmt: skip


def loop(sample, **settings):
    published = []
    publish = lambda tensors, meta: published.append((int(tensors["n"]), meta["updates"]))  # noqa: E731
    return LearnerLoop(CountingTuner(), sample, publish, **settings), published


def test_the_loop_publishes_first_every_n_updates_and_last():
    learner, published = loop(blank_batch, publish_every=3)
    learner.run(threading.Event(), updates=7)
    assert published == [(0, 0), (3, 3), (6, 6), (7, 7)]
    learner.run(threading.Event(), updates=7)  # nothing new: nothing is published twice
    assert len(published) == 4


def test_the_loop_publishes_no_more_often_than_asked():
    learner, published = loop(blank_batch, publish_every_s=3600.0)
    learner.run(threading.Event(), updates=5)
    assert published == [(0, 0), (5, 5)]


def test_the_loop_waits_for_batches_and_learns_each_once():
    supply = iter([None, blank_batch(), None, None, blank_batch()])
    stop = threading.Event()

    def sample():
        try:
            return next(supply)
        except StopIteration:
            stop.set()

    learner, _ = loop(sample)
    learner.run(stop)
    stats = learner.stats()
    assert learner.tuner.updates == stats["learner/updates"] == 2
    assert stats["learner/replayed_steps"] == 12
    assert stats["learner/loss"] == 1.5
    assert stats["learner/waited_s"] > 0


def test_the_loop_stops_while_it_waits_and_never_spins():
    asked = []
    learner, _ = loop(lambda: asked.append(time.monotonic()))
    stop = threading.Event()
    thread = threading.Thread(target=learner.run, args=(stop,))
    thread.start()
    assert not stop.wait(0.3)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert 2 <= len(asked) < 20  # 1, 2, 4 … 50 ms apart


def test_an_error_of_the_update_ends_the_loop():
    learner, _ = loop(blank_batch)
    learner.tuner.update = lambda batch: (_ for _ in ()).throw(GsaError("diverged"))
    with pytest.raises(GsaError, match="diverged"):
        learner.run(threading.Event())


WORLD = WorldModelConfig(deter=64, hidden=32, stoch=8, classes=8, depth=4, max_action_dim=3)
BEHAVIOUR = BehaviourConfig(units=32, actor_layers=1, critic_layers=1, reward_layers=1, horizon=4)
CPU = ComputeConfig(device="cpu", threads=1)


def tuner(seed=0, behaviour=BEHAVIOUR, **settings):
    agent = Agent.create(WorldModel.create(WORLD, seed), behaviour, action_dim=2, seed=seed)
    return FineTuner(agent, LearnerConfig(**{"compute": CPU, **settings}), seed)


def dot_batch(seed=0, b=4, t=8, online=3):
    """A white square that the first action moves left and right; the first `online` rows have rewards: its place."""
    rng = np.random.default_rng(seed)
    action = np.zeros((b, t, 3), np.float32)
    action[:, 1:, :2] = rng.uniform(-1, 1, (b, t - 1, 2))
    place = np.clip(32 + 16 * np.cumsum(action[..., 0], 1), 4, 59).astype(int)
    pixels = np.zeros((b, t, 64, 64, 3), np.uint8)
    for i, j in np.ndindex(b, t):
        pixels[i, j, 24:40, place[i, j] - 4 : place[i, j] + 5] = 255
    mask = np.zeros((b, t), bool)
    mask[:online, 1:] = True
    first = np.zeros((b, t), bool)
    first[:, 0] = True
    return Batch(
        observation={"pixels": pixels}, previous_action=action, action_mask=np.array([[1, 1, 0]] * b, np.float32),
        reward=np.where(mask, place / 64, 0).astype(np.float32), reward_mask=mask,
        discount=np.ones((b, t), np.float32), is_first=first, valid=np.ones((b, t), bool),
        refs=(SequenceRef("online", 0, 0, t),) * online + (SequenceRef("pool", 0, 0, t),) * (b - online),
    )  # fmt: skip


def weights(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def changed(before, module):
    return {k for k, v in module.state_dict().items() if not torch.equal(before[k], v)}


def test_every_loss_falls_on_a_small_batch():
    """Learns the square, its reward and where the reward is: what an update exists for."""
    learner = tuner(
        world_model=OptimiserConfig(learning_rate=2e-3), reward=OptimiserConfig(learning_rate=2e-3),
        actor=OptimiserConfig(learning_rate=1e-3), critic=OptimiserConfig(learning_rate=1e-3),
    )  # fmt: skip
    log = [learner.update(dot_batch()) for _ in range(80)]
    first, last = log[0], {k: np.mean([m[k] for m in log[-5:]]) for k in log[0]}
    assert last["world_model_recon"] < 0.5 * first["world_model_recon"]
    assert last["reward_loss"] < 0.5 * first["reward_loss"]
    assert last["reward_error"] < 0.15
    assert last["actor_return"] > first["actor_return"] + 0.5  # the value of rewards that are all positive
    assert learner.updates == 80
    assert all(np.isfinite(list(m.values())).all() for m in log)


def test_rewards_of_the_pool_are_never_read():
    """Poison where no reward may be read changes not one bit of the agent."""
    a, b = tuner(), tuner()
    batch = dot_batch()
    poisoned = dataclasses.replace(batch, reward=np.where(batch.reward_mask, batch.reward, 1e6).astype(np.float32))
    for _ in range(2):
        a.update(batch)
        b.update(poisoned)
    assert changed(weights(a.agent), b.agent) == set()


def test_rewards_of_online_rows_are_read():
    a, b = tuner(), tuner()
    batch = dot_batch()
    a.update(batch)
    b.update(dataclasses.replace(batch, reward=batch.reward * 2))
    assert changed(weights(a.agent.world_model), b.agent.world_model) == set()  # no reward reaches the world model
    assert changed(weights(a.agent.reward), b.agent.reward)


def test_without_any_reward_the_reward_head_stands_still():
    learner = tuner()
    learner.update(dot_batch())
    before = weights(learner.agent.reward)
    metrics = learner.update(dot_batch(online=0))
    assert changed(before, learner.agent.reward) == set()
    assert "reward_loss" not in metrics


def test_actor_critic_and_reward_steps_leave_the_world_model_alone():
    """One update moves the world model exactly as far as its own step does: no second decay, clip or gradient."""
    learner = tuner(world_model=OptimiserConfig(weight_decay=0.01))
    alone = WorldModel.create(WORLD, 0)
    own = Optimiser("world_model", alone.named_parameters(), OptimiserConfig(weight_decay=0.01))
    for update in range(3):
        batch = dot_batch(update)
        learner.update(batch)
        data = TensorBatch.from_batch(batch)
        own.step(alone.loss(data, generator_for(torch.device("cpu"), 0, update))[0])
    assert changed(weights(alone), learner.agent.world_model) == set()
    assert all(p.grad is None and p.requires_grad for p in learner.agent.world_model.parameters())


def test_each_optimiser_owns_its_weights_and_together_they_own_all():
    learner = tuner()
    owned = [id(p) for o in learner._optimisers.values() for p in o.parameters.values()]
    trainable = [id(p) for p in learner.agent.parameters() if p.requires_grad]
    assert sorted(owned) == sorted(trainable)
    assert len(set(owned)) == len(owned)


def test_weights_decay_once_an_update_and_not_with_every_loss_that_runs_through_them():
    """The weights of a padded action dimension get no gradient: all that moves them is the decay."""
    learner = tuner(world_model=OptimiserConfig(weight_decay=0.25), reward=OptimiserConfig(weight_decay=0.5))
    padded = learner.agent.world_model.cell.action[0].weight[:, 2]
    before = padded.detach().clone()
    for n in (1, 2):
        learner.update(dot_batch(n))
        torch.testing.assert_close(padded.detach(), 0.75**n * before, rtol=1e-5, atol=0)


def test_the_slow_critic_follows_the_critic_once_an_update():
    learner = tuner()
    slow, fast = weights(learner.agent.slow_critic), None
    for update in range(3):
        learner.update(dot_batch(update))
        fast = weights(learner.agent.critic)
        slow = {k: slow[k] + 0.02 * (fast[k] - slow[k]) for k in slow}
    for key, value in learner.agent.slow_critic.state_dict().items():
        torch.testing.assert_close(value, slow[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("starts", [0, 5])
def test_a_run_that_was_stopped_continues_bit_for_bit(tmp_path, starts):
    behaviour = dataclasses.replace(BEHAVIOUR, imagination_starts=starts)
    through, stopped, resumed = tuner(behaviour=behaviour), tuner(behaviour=behaviour), tuner(3, behaviour)
    for n in range(4):
        last = through.update(dot_batch(n))
    for n in range(2):
        stopped.update(dot_batch(n))
    Checkpoints(tmp_path).save(stopped.updates, {"learner": stopped.state()})
    del stopped
    resumed.restore(Checkpoints(tmp_path).load().state["learner"])
    assert resumed.updates == 2
    for n in range(2, 4):
        again = resumed.update(dot_batch(n))
    assert again == last
    assert changed(weights(through.agent), resumed.agent) == set()


def test_another_agents_checkpoint_is_refused():
    small = tuner()
    other = FineTuner(
        Agent.create(WorldModel.create(WORLD, 0), dataclasses.replace(BEHAVIOUR, units=16), 2),
        LearnerConfig(compute=CPU),
    )
    with pytest.raises(GsaError, match="size"):
        other.restore(small.state())


def test_a_snapshot_is_a_copy_of_what_acting_needs():
    learner = tuner()
    learner.update(dot_batch())
    snapshot = learner.snapshot()
    before = {k: v.copy() for k, v in snapshot.items()}
    learner.update(dot_batch())
    assert all(np.array_equal(v, before[k]) for k, v in snapshot.items())
    assert any(not np.array_equal(v, before[k]) for k, v in learner.snapshot().items())
    assert not any("decoder" in k or "critic" in k for k in snapshot)


def test_rows_past_the_end_of_a_trajectory_change_nothing():
    a, b = tuner(), tuner()
    batch = dot_batch()
    valid = batch.valid.copy()
    valid[1, 5:] = False
    noise = {"pixels": batch.observation["pixels"].copy()}
    noise["pixels"][1, 5:] = 77
    mask = batch.reward_mask & valid
    a.update(dataclasses.replace(batch, valid=valid, reward_mask=mask))
    b.update(dataclasses.replace(batch, valid=valid, reward_mask=mask, observation=noise))
    assert changed(weights(a.agent), b.agent) == set()


def test_bfloat16_learns_like_float32():
    exact, rough = tuner(), tuner(compute=dataclasses.replace(CPU, precision="bfloat16"))
    for n in range(3):
        a, b = exact.update(dot_batch(n)), rough.update(dot_batch(n))
        assert b["world_model_recon"] == pytest.approx(a["world_model_recon"], rel=0.02)
    assert all(p.dtype == torch.float32 for p in rough.agent.parameters())


def test_the_loop_trains_and_publishes_a_real_agent():
    published = []

    def publish(tensors, meta):
        published.append(({k: v.copy() for k, v in tensors.items()}, meta))

    learner = LearnerLoop(tuner(), lambda: dot_batch(), publish, 2)
    learner.run(threading.Event(), updates=4)
    assert [meta["updates"] for _, meta in published] == [0, 2, 4]
    assert any(not np.array_equal(published[0][0][k], published[2][0][k]) for k in published[0][0])
    assert learner.stats()["learner/world_model_loss"] > 0


def test_a_gpu_that_is_not_there_is_one_clear_sentence():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="--device cpu"):
        set_up(ComputeConfig(device="cuda"))


@pytest.mark.parametrize("config", [OptimiserConfig(), LearnerConfig(publish_every=3), PretrainConfig(), CloneConfig()])
def test_settings_survive_yaml(tmp_path, config):
    configs.save(config, tmp_path / "config.yaml")
    assert configs.load(type(config), tmp_path / "config.yaml") == config


def test_settings_are_read_without_torch():
    """The command line makes its flags from them before anything heavy is loaded."""
    code = "import sys, learner.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
