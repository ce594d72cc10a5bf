"""Nothing in padded action dimensions, or after the end of a trajectory, has a say: every loss, state, action and
gradient of an update is the same whatever stands there."""

import dataclasses

import numpy as np
import pytest
import torch

from gsa.agent.agent import Agent
from gsa.agent.behaviour import imagination_starts
from gsa.agent.policy import GuidedPolicy
from gsa.agent.sizes import ObservationConfig
from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.schema import Controller
from tests.agents import BEHAVIOUR, MODEL, doubled, noise_batch

ACTIONS = 2
SEEN = ObservationConfig(("pixels",), (("joints", 3),))
LEARNS_END = dataclasses.replace(BEHAVIOUR, learn_end=True)


def make_agent(seed=0):
    model = WorldModel.create(dataclasses.replace(MODEL, observation=SEEN), seed)
    agent = Agent.create(model, LEARNS_END, ACTIONS, 1).double()
    for i, head in enumerate((agent.reward, agent.critic, agent.slow_critic)):
        with torch.no_grad():
            head.net.last.weight.normal_(generator=torch.Generator().manual_seed(i))
    return agent


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    batch = noise_batch(rng, action_dim=ACTIONS, max_action_dim=MODEL.max_action_dim)
    observation = {**batch.observation, "joints": rng.normal(size=(3, 5, 3)).astype(np.float32)}
    valid = batch.valid.copy()
    valid[0, 1:] = False  # as short as a trajectory's last row
    return dataclasses.replace(batch, observation=observation, valid=valid, reward_mask=batch.reward_mask & valid)


def update(agent, batch):
    """Everything that an update computes, by name: losses, states at valid rows, actions there, all gradients."""
    data = doubled(TensorBatch.from_batch(batch))
    generator = torch.Generator().manual_seed(3)
    agent.zero_grad()
    loss, states, metrics = agent.world_model.loss(data, generator)
    reward, _ = agent.reward_loss(states.state, data)
    start, weight = imagination_starts(states.state, data, 0, generator)
    actor, imagined, _ = agent.actor_loss(start, weight, generator)
    critic, _ = agent.critic_loss(imagined)
    (loss + reward + actor + critic).backward()
    mean, std = agent.actor(states.state)
    found = {"reward loss": reward, "actor loss": actor, "critic loss": critic, **metrics}
    for name, value in {"deter": states.deter, "stoch": states.stoch, "mean": mean, "std": std}.items():
        found[name] = value[data.valid]
    found |= {"start": start.deter, "weight": weight, "returns": imagined.returns}
    found |= {f"gradient of {name}": p.grad for name, p in agent.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in found.items()}


def after_the_end(batch, field, rng):
    """The field with noise where no row is valid."""
    if field == "observation":
        return {k: after_the_end(dataclasses.replace(batch, discount=v), "discount", rng)
                for k, v in batch.observation.items()}  # fmt: skip
    value = getattr(batch, field).copy()
    rows = ~batch.valid
    shape = value[rows].shape
    value[rows] = rng.normal(0, 50, shape) if value.dtype == np.float32 else rng.integers(0, 256, shape)
    return value


@pytest.mark.parametrize("field", ["observation", "previous_action", "reward", "discount", "is_first"])
def test_what_stands_after_the_end_of_a_trajectory_changes_nothing(field):
    agent, batch = make_agent(), make_batch()
    changed = dataclasses.replace(batch, **{field: after_the_end(batch, field, np.random.default_rng(1))})
    assert_same(update(agent, changed), update(agent, batch))


def test_what_stands_in_padded_action_dimensions_changes_nothing():
    agent, batch = make_agent(), make_batch()
    action = batch.previous_action.copy()
    action[..., ACTIONS:] = np.random.default_rng(1).normal(0, 50, action[..., ACTIONS:].shape)
    assert_same(update(agent, dataclasses.replace(batch, previous_action=action)), update(agent, batch))


def test_weights_of_padded_action_dimensions_have_no_say_and_get_no_gradient():
    agent, batch = make_agent(), make_batch()
    before, weight = update(agent, batch), agent.world_model.cell.action[0].weight
    assert not weight.grad[:, ACTIONS:].any()
    with torch.no_grad():
        weight[:, ACTIONS:] += 100
    assert_same(update(agent, batch), before)


def test_the_same_noise_where_it_counts_changes_everything():
    """The tests above can fail: noise within a trajectory, in the embodiment's own dimensions, is felt."""
    agent, batch, rng = make_agent(), make_batch(), np.random.default_rng(1)
    before = update(agent, batch)
    everywhere = dataclasses.replace(batch, valid=~batch.valid)
    for field in ("observation", "previous_action"):
        found = update(agent, dataclasses.replace(batch, **{field: after_the_end(everywhere, field, rng)}))
        different = [name for name, value in found.items() if not torch.equal(value, before[name])]
        assert {"loss", "actor loss", "critic loss", "deter", "mean", "returns"} <= set(different)


def test_an_acting_policy_never_lets_padding_in():
    """The filter's previous action is padded with zeros whoever acted: policy, prior, chance or a person."""
    agent = make_agent().float()
    policy = GuidedPolicy(agent.world_model.config, LEARNS_END, ACTIONS)
    seen = {"joints": np.zeros((1, 3), np.float32)}
    actions = []
    for padding in (0.0, 100.0):
        tensors = agent.acting_tensors()
        tensors["cell.action.0.weight"][:, ACTIONS:] += padding
        policy.load_tensors(tensors)
        policy.begin(0)
        draws, frames = [np.random.default_rng(1)], np.random.default_rng(2)
        for controller in (Controller.POLICY, Controller.RANDOM, Controller.POLICY):
            pixels = frames.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
            actions.append(policy.act({**seen, "pixels": pixels}, np.array([controller], np.uint8), draws))
        policy.executed(np.full((1, ACTIONS), 0.5, np.float32))
        actions.append(policy.act({**seen, "pixels": pixels}, np.array([controller], np.uint8), draws))
    np.testing.assert_array_equal(actions[:4], actions[4:])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-10, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
        )
