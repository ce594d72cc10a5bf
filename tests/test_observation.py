"""Cameras and joint states: whatever a pool's embodiments share, by the same loss, filter and prior as pixels alone."""

import dataclasses

import numpy as np
import pytest
import torch

import gsa
from gsa.agent.agent import Agent
from gsa.agent.policy import GuidedPolicy
from gsa.agent.prior_actor import PriorActor, frame_stack
from gsa.agent.sizes import ObservationConfig, PriorConfig, preset
from gsa.agent.vision import to_patches
from gsa.agent.world_model import TensorBatch, WorldModel, config_hash
from gsa.errors import SpecMismatch, UsageError
from gsa.schema import ArraySpec, Controller, SequenceRef, Spec, Trajectory
from learner.clone import clone_prior, cut_steps, prior_folder
from learner.config import CloneConfig, ComputeConfig, PretrainConfig
from learner.pretrain import pretrain
from retrieval.store import TrajectoryStore
from tests.agents import BEHAVIOUR, MODEL, Slow, assert_gradients_equal, leaves, noise_batch

SEEN = ObservationConfig(("front", "wrist"), (("grip", 1), ("joints", 3)))
STATES = ObservationConfig((), (("joints", 3),))
ROBOT = dataclasses.replace(MODEL, observation=SEEN)
ACTIONS = 2
PRIOR = PriorConfig(depth=2, units=8)
CLONE = CloneConfig(steps=2, batch=4, compute=ComputeConfig("cpu", threads=1), evaluate_every=1)


def observation(rng, *lead, seen=SEEN):
    images = {k: rng.integers(0, 256, (*lead, 64, 64, 3), dtype=np.uint8) for k in seen.images}
    return images | {k: rng.normal(0, 9, (*lead, n)).astype(np.float32) for k, n in seen.vectors}


def robot_batch(seed=0, seen=SEEN):
    rng = np.random.default_rng(seed)
    return dataclasses.replace(noise_batch(rng), observation=observation(rng, 3, 5, seen=seen))


def robot_spec(name="robot/a", seen=SEEN):
    return Spec(name, seen.specs(), ACTIONS)


def robot_store(path, embodiments=(("robot/a", SEEN),), count=4, steps=9):
    rng, store = np.random.default_rng(0), TrajectoryStore.create(path)
    for name, seen in embodiments:
        for _ in range(count):
            action = rng.uniform(-1, 1, (steps, ACTIONS)).astype(np.float32)
            seen_now = observation(rng, steps + 1, seen=seen)
            store.append(
                Trajectory(name, seen_now, action, np.ones(steps, np.float32)), robot_spec(name, seen)
            )  # fmt: skip
    return store


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_loss(weights, model, batch, uniform):
    """As the method has it, with the cameras' images and the vectors written out one by one."""
    slow, c, seen = Slow(weights, model), model, model.observation
    deter, stoch = torch.zeros(3, c.deter).double(), torch.zeros(3, c.latent).double()
    total = 0.0
    for t in range(5):
        deter = slow.part("cell").cell(deter, stoch, batch.previous_action[:, t].double())
        inputs, vectors = [deter], []
        if seen.images:
            pixels = torch.cat([batch.observation[k][:, t] for k in seen.images], -1)
            inputs.append(slow.part("encoder").encode(pixels))
        if seen.vectors:
            vectors = torch.cat([batch.observation[k][:, t].double() for k, _ in seen.vectors], -1)
            vectors = vectors.sign() * (1 + vectors.abs()).log()
            hidden = slow.part("vector_encoder").dense_at(0, vectors)
            inputs.append(slow.part("vector_encoder").dense_at(3, hidden))
        posterior, prior = slow.part("posterior").head(torch.cat(inputs, -1)), slow.part("prior").head(deter, 2)
        stoch = slow.sample(posterior, uniform[:, t])
        error = torch.zeros(3).double()
        if seen.images:
            decoded = slow.part("decoder").decode(deter, stoch).split(3, 1)
            for name, image in zip(seen.images, decoded, strict=True):
                truth = batch.observation[name][:, t].movedim(-1, 1).double() / 255 - 0.5
                error = error + (image - truth).square().sum((1, 2, 3))
        if seen.vectors:
            error = error + (slow.part("vector_decoder").state_mlp(deter, stoch, 1) - vectors).square().sum(-1)
        q, p = slow.probs(posterior), slow.probs(prior)
        dyn = (q.detach() * (q.detach() / p).log()).sum((1, 2)).clamp(min=c.free_nats)
        rep = (q * (q / p.detach()).log()).sum((1, 2)).clamp(min=c.free_nats)
        total = total + ((error + dyn + 0.1 * rep) * batch.valid[:, t]).sum()
    return total / batch.valid.sum()


@pytest.mark.parametrize("seen", [SEEN, STATES], ids=["cameras and vectors", "vectors alone"])
def test_loss_and_all_gradients_equal_the_oracle(seen):
    config = dataclasses.replace(MODEL, observation=seen, free_nats=0.1)
    model = WorldModel.create(config, 0).double()
    batch = TensorBatch.from_batch(robot_batch(seen=seen))
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in batch.observation.items()}
    batch = dataclasses.replace(batch, observation=doubles, previous_action=batch.previous_action.double())
    loss, _, metrics = model.loss(batch, generator(3))
    loss.backward()
    weights = leaves(model)
    uniform = torch.rand(3, 5, MODEL.stoch, generator=generator(3), dtype=torch.float64)
    expected = slow_loss(weights, config, batch, uniform)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert_gradients_equal(model, weights, rtol=1e-7, atol=1e-9)
    if seen == SEEN:
        assert metrics["recon"] == pytest.approx(metrics["image_error"] + metrics["vector_error"])


def test_pixels_alone_are_the_model_and_the_hashes_they_always_were():
    """A pool that has more than pixels must not change what a model of pixels is, or no old file would open."""
    assert config_hash(preset("paper").world_model).startswith("4d5862f79bd7b49c")
    model = WorldModel.create(MODEL, 0)
    assert model.encoder_hash().startswith("4479db06e5358fdf")
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "cell", "prior", "posterior", "decoder"}
    assert config_hash(ROBOT) != config_hash(MODEL)
    renamed = WorldModel.create(dataclasses.replace(MODEL, observation=ObservationConfig(("front",))), 0)
    assert renamed.encoder_hash() != model.encoder_hash()  # it looks at something else


def test_what_is_decoded_has_the_names_and_units_of_what_was_seen():
    model, batch = WorldModel.create(ROBOT, 0), TensorBatch.from_batch(robot_batch())
    _, states, _ = model.loss(batch, generator())
    decoded = model.decode(states.state)
    assert {k: (v.shape, v.dtype) for k, v in decoded.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.observation.items()
    }
    with torch.no_grad():
        model.vector_decoder.last.weight.zero_()
        model.vector_decoder.last.bias.fill_(np.log1p(120.0))
    assert model.decode(states.state)["joints"].mean().item() == pytest.approx(120, rel=1e-4)


def test_every_camera_and_every_vector_counts():
    model, batch = WorldModel.create(ROBOT, 0), TensorBatch.from_batch(robot_batch())
    features = model.encode(batch.observation)
    assert features.shape == (3, 5, ROBOT.features)
    for name, value in batch.observation.items():
        other = model.encode({**batch.observation, name: value.flip(0)})
        assert not torch.equal(other, features), name


def test_it_learns_to_foresee_a_joint_that_the_action_moves():
    batch = robot_batch(seen=STATES)
    place = np.cumsum(batch.previous_action[..., 0], 1)
    joints = np.stack([place, -3 * place, np.zeros_like(place)], -1).astype(np.float32)
    batch = TensorBatch.from_batch(dataclasses.replace(batch, observation={"joints": joints}))
    model = WorldModel.create(dataclasses.replace(MODEL, observation=STATES, hidden=32, deter=32, stoch=8), 0)
    optimiser, errors = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for i in range(60):
        loss, _, metrics = model.loss(batch, generator(i))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(metrics["recon"].item())
    assert np.mean(errors[-5:]) < 0.2 * errors[0]


@pytest.fixture(scope="module")
def agent():
    return Agent.create(WorldModel.create(ROBOT, 0), BEHAVIOUR, ACTIONS, 1)


def test_acting_equals_the_models_own_filter_and_the_prior_sees_the_same(agent):
    prior, rng = PriorActor.create(PRIOR, ACTIONS, 2, observation=SEEN), np.random.default_rng(0)
    policy = GuidedPolicy(ROBOT, BEHAVIOUR, ACTIONS, 2, prior)
    policy.load_tensors(agent.acting_tensors())
    steps = [observation(rng, 2) for _ in range(4)]
    draws = [np.random.default_rng(7), np.random.default_rng(8)]
    policy_and_prior = np.array([Controller.POLICY, Controller.PRIOR], np.uint8)
    actions = [policy.act(seen, policy_and_prior, draws, sample=False) for seen in steps]

    uniform = [np.stack([g.random(MODEL.stoch, np.float32) for _ in steps]) for g in map(np.random.default_rng, (7, 8))]
    seen = {k: torch.from_numpy(np.stack([s[k] for s in steps], 1)) for k in SEEN.names}
    previous = np.zeros((2, 4, MODEL.max_action_dim), np.float32)
    previous[:, 1:, :ACTIONS] = np.stack(actions[:-1], 1)
    model = agent.world_model
    with torch.no_grad():
        from gsa.agent import rssm

        states = rssm.scan(
            model.cell, model.posterior, model.encode(seen), torch.from_numpy(previous),
            torch.zeros(2, 4, dtype=torch.bool), torch.from_numpy(np.stack(uniform)), MODEL.unimix,
        )  # fmt: skip
        mean, _ = agent.actor(states.state)
        cameras = np.concatenate([seen[k][1].numpy() for k in SEEN.images], -1)
        stacks = torch.from_numpy(frame_stack(cameras, np.arange(4), PRIOR.frames))
        cloned = prior(stacks, torch.cat([seen["grip"][1], seen["joints"][1]], -1))
    np.testing.assert_allclose([a[0] for a in actions], mean[0], atol=1e-5)
    np.testing.assert_allclose([a[1] for a in actions], cloned.clamp(-1, 1), atol=1e-5)
    np.testing.assert_allclose(policy.state.deter, states.deter[:, -1], atol=1e-5)


def test_a_loaded_policy_takes_the_whole_dict_and_names_both_sides_where_it_cannot(agent, tmp_path):
    agent.save(tmp_path)
    policy, rng = gsa.load_policy(tmp_path), np.random.default_rng(0)
    seen = observation(rng)
    action = policy.act(seen | {"unheard of": np.zeros(3)})
    again = gsa.load_policy(tmp_path).act({k: v.tolist() if k == "joints" else v for k, v in seen.items()})
    np.testing.assert_array_equal(action, again)
    without = {k: v for k, v in seen.items() if k != "wrist"}
    for wrong in (without, seen | {"wrist": np.zeros((48, 64, 3), np.uint8)}, seen["front"]):
        with pytest.raises(SpecMismatch, match=r"The policy sees front .*wrist .*joints .*; the observation has front"):
            policy.act(wrong)
    with pytest.raises(UsageError, match="'grip' has NaN"):
        policy.act(seen | {"grip": [np.nan]})
    with pytest.raises(SpecMismatch, match=r"joints \[4\] float32: 'joints' does not fit"):
        policy.act(seen | {"joints": np.zeros(4, np.float32)})


def test_a_prior_actor_and_a_model_that_see_different_things_do_not_act_together():
    prior = PriorActor.create(PRIOR, ACTIONS, 0)
    with pytest.raises(SpecMismatch, match=r"prior actor sees pixels .* the world model has front"):
        GuidedPolicy(ROBOT, BEHAVIOUR, ACTIONS, 1, prior)


def test_a_step_to_clone_has_each_cameras_frames_and_the_vectors_of_that_moment(tmp_path):
    with robot_store(tmp_path / "store") as store:
        trajectory = store.read(2)
        for start in (0, 1, 5):
            found = cut_steps(store, [SequenceRef("pool", 2, start, start + 2)], 3, SEEN)
            rows = [max(start - 2, 0), max(start - 1, 0), start]
            frames = [trajectory.observation[k][t] for t in rows for k in SEEN.images]
            assert np.array_equal(found.frames[0].numpy(), np.concatenate(frames, -1))
            vectors = [trajectory.observation[k][start] for k in ("grip", "joints")]
            assert np.array_equal(found.vectors[0].numpy(), np.concatenate(vectors))
            assert np.array_equal(found.action[0].numpy(), trajectory.action[start])


@pytest.mark.parametrize("seen", [SEEN, STATES, ObservationConfig(("wrist",))])
def test_a_prior_actor_is_cloned_from_what_the_world_model_sees(tmp_path, seen):
    with robot_store(tmp_path / "store") as store:
        prior = clone_prior(store, store.rows(), PRIOR, CLONE, tmp_path, observation=seen)
        assert prior.observation == PriorActor.load(
            prior_folder(store, store.rows(), PRIOR, CLONE, tmp_path, seen)
        ).observation == seen  # fmt: skip
        with pytest.raises(SpecMismatch, match=r"prior actor sees pixels .* robot/a has front"):
            clone_prior(store, store.rows(), PRIOR, CLONE, tmp_path)


def test_a_model_is_pre_trained_on_what_all_embodiments_share(tmp_path):
    other = ObservationConfig(("front", "top"), (("joints", 5),))  # joints of another length are not the same thing
    config = PretrainConfig(
        model="tiny", max_action_dim=3, updates=1, batch=2, length=4, strip_context=2, compute=CLONE.compute
    )
    embodiments = (("robot/a", SEEN), ("robot/b", other))
    with robot_store(tmp_path / "store", embodiments, count=1) as store:
        model = pretrain(store, config, tmp_path / "shared")
        assert model.config.observation == ObservationConfig(("front",))
        with pytest.raises(UsageError, match=r"Unknown observation 'wrist'\. Known: front"):
            pretrain(store, dataclasses.replace(config, observe=("wrist",)), tmp_path / "wrist")
    with robot_store(tmp_path / "one", count=1) as store:
        assert pretrain(store, config, tmp_path / "all").config.observation == SEEN
        some = dataclasses.replace(config, observe=("joints", "wrist"))
        model = pretrain(store, some, tmp_path / "some")
        assert model.config.observation == ObservationConfig(("wrist",), (("joints", 3),))
        assert WorldModel.load(tmp_path / "some").config == model.config
        assert pretrain(store, dataclasses.replace(config, observe=("grip",)), tmp_path / "grip").decoder is None


def test_what_no_network_sees_is_refused_with_what_to_do():
    for spec in (ArraySpec((84, 84, 3), "uint8"), ArraySpec((2, 7), "float32"), ArraySpec((5,), "uint8")):
        with pytest.raises(SpecMismatch, match=r"'extra' is \[.*resize it when it is ingested, or leave it out"):
            ObservationConfig.of({"pixels": ArraySpec((64, 64, 3), "uint8"), "extra": spec})
    assert ObservationConfig.of(SEEN.specs()) == SEEN
    assert ObservationConfig.of({**SEEN.specs(), "extra": spec}, ("front",)).names == ("front",)
    with pytest.raises(UsageError, match="at least one observation"):
        ObservationConfig(())


def test_patches_hold_cameras_side_by_side_along_channels():
    images = [torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator(i)) for i in (0, 1)]
    both = to_patches(torch.cat(images, -1)).unflatten(-1, (4, 2, 3))  # patch position, camera, channel
    for i, image in enumerate(images):
        assert torch.equal(both[..., i, :].flatten(-2), to_patches(image))
