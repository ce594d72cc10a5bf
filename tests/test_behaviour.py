"""Behaviour learning against the method written out slowly in float64, and what each loss may and may not touch."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from gsa.agent import behaviour, twohot
from gsa.agent.agent import Agent
from gsa.agent.behaviour import imagination_starts, lambda_returns, sample_action, step_weights
from gsa.agent.rssm import State
from gsa.agent.sizes import BehaviourConfig
from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.errors import FormatError, SpecMismatch, UsageError
from tests.agents import BEHAVIOUR, MODEL, Slow, assert_gradients_equal, leaves, noise_batch

ACTIONS = 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def agent64(**changes):
    """With heads that are not zero, so that gradients pass through them."""
    agent = Agent.create(WorldModel.create(MODEL, 0), dataclasses.replace(BEHAVIOUR, **changes), ACTIONS, 1).double()
    for i, head in enumerate((agent.reward, agent.critic, agent.slow_critic)):
        with torch.no_grad():
            head.net.last.weight.normal_(generator=generator(i))
    return agent


def start64(n=5):
    rng = generator(9)
    return State(
        torch.randn(n, MODEL.deter, generator=rng, dtype=torch.float64),
        torch.rand(n, MODEL.latent, generator=rng, dtype=torch.float64),
    )


def slow_value(slow, state, layers):
    probs = slow.state_mlp(*state, layers).softmax(-1)
    mean = sum(p * (-20 + 40 * i / 254) for i, p in enumerate(probs.unbind(-1)))
    return mean.sign() * (mean.abs().exp() - 1)


def slow_behaviour(weights, config, start, start_weight, uniform, noise):
    """Actor and critic loss of the method's section 6, state by state."""
    slow, gamma, lam, horizon = Slow(weights), config.discount, config.lambda_, config.horizon
    states, entropy = [start], []
    for t in range(horizon):
        inputs = [x.detach() for x in states[-1]]
        mean, std = slow.part("actor.net").state_mlp(*inputs, config.actor_layers).chunk(2, -1)
        mean, std = mean.tanh(), 0.9 * torch.sigmoid(std + 2) + 0.1
        action = mean + std * noise[t]
        action = action - action.detach() + action.detach().clamp(-1, 1)
        entropy.append(torch.distributions.Normal(mean, std).entropy().sum(-1))
        padded = torch.cat([action, torch.zeros(len(action), MODEL.max_action_dim - ACTIONS)], -1)
        states.append(slow.part("world_model").prior_step(*states[-1], padded, uniform[t]))
    reward = [slow_value(slow.part("reward.net"), s, config.reward_layers) for s in states]
    value = [slow_value(slow.part("slow_critic.net"), s, config.critic_layers) for s in states]
    on = [torch.ones(len(start_weight)).double() for _ in states]
    if config.learn_end:
        on = [1 - slow.part("reward.end").state_mlp(*s, config.reward_layers)[:, 0].sigmoid() for s in states]
    returns = []
    for t in range(horizon):  # the λ-return as the mixture of n-step returns that defines it
        total = 0
        for n in range(1, horizon - t + 1):
            reached = [gamma**i * math.prod(on[t : t + i]) for i in range(n + 1)]
            n_step = sum(reached[i] * reward[t + i] for i in range(n)) + reached[n] * value[t + n]
            share = lam ** (n - 1) * (1 - lam if n < horizon - t else 1)
            total = total + share * n_step
        returns.append(total)
    weight = [start_weight * gamma**t * math.prod(on[:t]) for t in range(horizon)]
    weight = [w.detach() for w in weight]
    objective = [weight[t] * (returns[t + 1] + config.entropy * entropy[t]) for t in range(horizon - 1)]
    critic = []
    for t in range(horizon):
        logits = slow.part("critic.net").state_mlp(*(x.detach() for x in states[t]), config.critic_layers)
        critic.append(weight[t] * slow_two_hot_loss(logits, returns[t].detach()))
    return -torch.stack(objective).mean(), torch.stack(critic).mean()


def slow_two_hot_loss(logits, targets):
    losses = []
    for row, target in zip(logits.log_softmax(-1), targets.tolist(), strict=True):
        place = (math.copysign(math.log1p(abs(target)), target) + 20) / 40 * 254
        place = min(max(place, 0.0), 254.0)
        low = min(int(place), 253)
        losses.append(-(1 - (place - low)) * row[low] - (place - low) * row[low + 1])
    return torch.stack(losses)


@pytest.mark.parametrize("learn_end", [False, True])
def test_actor_and_critic_losses_and_gradients_equal_the_oracle(learn_end):
    agent, start = agent64(entropy=0.03, learn_end=learn_end), start64()
    start_weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    loss, imagination, _ = agent.actor_loss(start, start_weight, generator(4))
    loss.backward()
    assert {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None} == {"actor"}
    critic, _ = agent.critic_loss(imagination)
    critic.backward()
    assert {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None} == {"actor", "critic"}

    rng, horizon = generator(4), BEHAVIOUR.horizon
    uniform = torch.rand(horizon, 5, MODEL.stoch, generator=rng, dtype=torch.float64)
    noise = torch.randn(horizon, 5, ACTIONS, generator=rng, dtype=torch.float64)
    weights = leaves(agent)
    expected = slow_behaviour(weights, agent.config, start, start_weight, uniform, noise)
    torch.testing.assert_close((loss, critic), expected)
    expected[0].backward()
    assert_gradients_equal(agent.actor, {k[6:]: v for k, v in weights.items() if k.startswith("actor.")})
    expected[1].backward()
    assert_gradients_equal(agent.critic, {k[7:]: v for k, v in weights.items() if k.startswith("critic.")})


def test_the_entropy_bonus_is_the_actors_alone():
    results = [agent64(entropy=e).actor_loss(start64(), torch.ones(5), generator(4)) for e in (0.0, 10.0)]
    assert results[0][0] != results[1][0]
    assert torch.equal(results[0][1].returns, results[1][1].returns)


def test_lambda_returns_at_the_ends_of_lambda():
    reward, value = (torch.randn(4, 3, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    discount = torch.full_like(reward, 0.9)
    one_step = reward + 0.9 * value
    torch.testing.assert_close(lambda_returns(reward, value, discount, 0.0), one_step)
    whole = sum(0.9**t * reward[t] for t in range(4)) + 0.9**4 * value[-1]
    torch.testing.assert_close(lambda_returns(reward, value, discount, 1.0)[0], whole)
    discount[2] = 0  # the task ends in the third state: its reward still counts, nothing after it does
    ended = reward[0] + 0.9 * reward[1] + 0.81 * reward[2]
    torch.testing.assert_close(lambda_returns(reward, value, discount, 1.0)[0], ended)


def test_the_first_state_has_the_start_weight_and_each_next_one_the_discount_more():
    weights = step_weights(torch.tensor([1.0, 0.0]), torch.full((3, 2), 0.5))
    assert weights.tolist() == [[1, 0], [0.5, 0], [0.25, 0]]


def test_actions_are_clamped_while_their_gradient_is_not():
    mean = torch.tensor([0.9, 0.0], requires_grad=True)
    action = sample_action(mean, torch.tensor([0.5, 0.5]), torch.tensor([3.0, 0.5]))
    action.sum().backward()
    assert action.tolist() == [1.0, 0.25]
    assert mean.grad.tolist() == [1.0, 1.0]


def test_std_stays_within_its_bounds():
    actor = agent64().actor
    with torch.no_grad():
        actor.net.last.weight.mul_(1e4)
        mean, std = actor(start64(200))
    assert mean.abs().max() <= 1
    assert std.min() == pytest.approx(0.1)
    assert std.max() == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e12])
def test_two_hot_targets_decode_to_themselves(scale):
    target = torch.randn(200, generator=generator(), dtype=torch.float64) * scale
    logits = torch.zeros(200, twohot.BINS, dtype=torch.float64, requires_grad=True)
    loss = twohot.loss(logits, target)
    loss.sum().backward()
    probs = torch.softmax(logits.detach(), -1) - logits.grad  # the target itself
    torch.testing.assert_close(probs.sum(-1), torch.ones(200, dtype=torch.float64))
    assert ((probs > 1e-12).sum(-1) <= 2).all()
    decoded = twohot.decode(probs.clamp(min=1e-300).log())
    limit = math.expm1(twohot.LIMIT)
    torch.testing.assert_close(decoded, target.clamp(-limit, limit), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        twohot.loss(logits, target), slow_two_hot_loss(logits, target.clamp(-limit, limit)), rtol=1e-9, atol=1e-9
    )


def test_decoding_passes_the_gradient_of_the_mean_through_symexp():
    logits = torch.randn(3, twohot.BINS, generator=generator(), dtype=torch.float64, requires_grad=True)
    bins = torch.linspace(-20, 20, twohot.BINS, dtype=torch.float64)
    mean = (logits.softmax(-1) * bins).sum(-1)
    slow = mean.sign() * (mean.abs().exp() - 1)
    torch.testing.assert_close(twohot.decode(logits), slow)
    found, expected = (torch.autograd.grad(x.sum(), logits)[0] for x in (twohot.decode(logits), slow))
    torch.testing.assert_close(found, expected)


def test_a_fresh_critic_and_reward_head_say_zero():
    agent = Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, ACTIONS)
    start = State(*(x.float() for x in start64()))
    assert agent.critic.value(start).abs().max() < 1e-5
    assert agent.reward.value(start).abs().max() < 1e-5


def posterior(agent, batch):
    return agent.world_model.loss(batch, generator())[1].state


def test_the_reward_head_reads_only_what_the_mask_allows_and_leaves_the_world_model_alone():
    agent = Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, ACTIONS)
    batch = TensorBatch.from_batch(noise_batch(np.random.default_rng(0)))
    state = posterior(agent, batch)
    loss, metrics = agent.reward_loss(state, batch)
    loss.backward()
    assert {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None} == {"reward"}
    poisoned = torch.where(batch.reward_mask, batch.reward, torch.full_like(batch.reward, 1e6))
    assert agent.reward_loss(state, dataclasses.replace(batch, reward=poisoned))[0] == loss
    rows = batch.reward_mask
    expected = slow_two_hot_loss(agent.reward(state)[rows], batch.reward[rows]).mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["error"] == pytest.approx(batch.reward[rows].abs().mean().item(), rel=1e-4)
    nothing = dataclasses.replace(batch, reward_mask=torch.zeros_like(rows))
    assert agent.reward_loss(state, nothing)[0] == 0


def test_the_agent_learns_where_the_task_ends_and_expects_nothing_after():
    agent = Agent.create(WorldModel.create(MODEL, 0), dataclasses.replace(BEHAVIOUR, learn_end=True), ACTIONS)
    batch = TensorBatch.from_batch(noise_batch(np.random.default_rng(0)))
    batch.discount[batch.reward > 0.5] = 0
    state, optimiser = posterior(agent, batch), torch.optim.Adam(agent.reward.parameters(), lr=0.03)
    for _ in range(80):
        loss, metrics = agent.reward_loss(state, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert metrics["end_loss"] < 0.05
    goes_on = torch.sigmoid(-agent.reward.end_logit(state))[batch.reward_mask]
    torch.testing.assert_close(goes_on, batch.discount[batch.reward_mask], rtol=0, atol=0.2)


def test_the_slow_critic_follows_by_its_rate():
    agent = agent64(slow_critic_rate=0.25)
    slow, fast = agent.slow_critic.net.last.weight.clone(), agent.critic.net.last.weight.clone()
    agent.update_slow_critic()
    torch.testing.assert_close(agent.slow_critic.net.last.weight, 0.75 * slow + 0.25 * fast)
    assert torch.equal(agent.critic.net.last.weight, fast)
    fresh = Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, ACTIONS)
    pairs = zip(fresh.critic.parameters(), fresh.slow_critic.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b and not b.requires_grad for a, b in pairs)


def test_imagination_starts_from_valid_states_each_at_most_once():
    batch = TensorBatch.from_batch(noise_batch(np.random.default_rng(0)))
    number = torch.arange(15.0).view(3, 5, 1)
    batch.discount[1, 2] = 0
    state = State(number, number)
    every, weight = imagination_starts(state, batch, 0, generator())
    assert every.deter[:, 0].tolist() == list(range(13))  # the last two rows are padding
    assert weight.tolist() == [float(i != 7) for i in range(13)]
    some, weight = imagination_starts(state, batch, 6, generator(1))
    rows = some.deter[:, 0].tolist()
    assert len(set(rows)) == 6
    assert set(rows) <= set(range(13))
    assert weight.tolist() == [float(r != 7) for r in rows]
    again, _ = imagination_starts(state, batch, 6, generator(1))
    assert again.deter[:, 0].tolist() == rows
    assert len(imagination_starts(state, batch, 100, generator())[0].deter) == 13


def test_padded_action_dimensions_have_no_say():
    agent, start = agent64(), start64()
    loss = agent.actor_loss(start, torch.ones(5), generator(4))[0]
    with torch.no_grad():
        agent.world_model.cell.action[0].weight[:, ACTIONS:] += 100
    assert agent.actor_loss(start, torch.ones(5), generator(4))[0] == loss


def test_the_actor_climbs_an_imagined_reward():
    agent = agent64(entropy=0.0).float()
    with torch.no_grad():
        agent.slow_critic.net.last.weight.zero_()
        agent.world_model.cell.gate.weight.mul_(4)
    optimiser = torch.optim.Adam(agent.actor.parameters(), lr=1e-2)
    start, returns = State(*(x.float() for x in start64(64))), []
    for _ in range(60):
        loss, imagination, _ = agent.actor_loss(start, torch.ones(64), generator(0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        returns.append(imagination.returns[1:].mean().item())
    assert returns[-1] > returns[0] + 0.05 * abs(returns[0])


def test_bfloat16_losses_stay_close_to_float32():
    losses = []
    for precision in ("float32", "bfloat16"):
        agent = agent64().float()
        agent.world_model.config = dataclasses.replace(MODEL, precision=precision)
        start = State(*(x.float() for x in start64()))
        loss, imagination, _ = agent.actor_loss(start, torch.ones(5), generator(4))
        loss.backward()
        assert imagination.returns.dtype == imagination.states[0].deter.dtype == torch.float32
        losses.append(agent.critic_loss(imagination)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_saved_agent_comes_back(tmp_path):
    agent = Agent.create(WorldModel.create(MODEL, 0), BehaviourConfig(units=8), ACTIONS, seed=3)
    agent.save(tmp_path, {"updates": 7})
    again = Agent.load(tmp_path)
    assert (again.config, again.action_dim) == (agent.config, agent.action_dim)
    ours, theirs = agent.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not any(p.requires_grad for p in again.slow_critic.parameters())
    WorldModel.load(tmp_path)  # the next task starts from it
    same = Agent.create(WorldModel.create(MODEL, 0), BehaviourConfig(units=8), ACTIONS, seed=3).actor.state_dict()
    assert all(torch.equal(v, same[k]) for k, v in agent.actor.state_dict().items())


def test_an_agent_whose_behaviour_is_missing_or_of_another_format_is_refused(tmp_path):
    WorldModel.create(MODEL, 0).save(tmp_path)
    with pytest.raises(UsageError, match="no behaviour in"):
        Agent.load(tmp_path)
    Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, ACTIONS).save(tmp_path)
    path = tmp_path / "behaviour.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(FormatError, match="format 2"):
        Agent.load(tmp_path)


def test_impossible_settings_are_refused():
    with pytest.raises(SpecMismatch, match="5 action dimensions"):
        Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, 5)
    with pytest.raises(UsageError, match="horizon"):
        BehaviourConfig(horizon=1)


def test_entropy_is_that_of_the_gaussian():
    std = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    expected = torch.distributions.Normal(torch.zeros_like(std), std).entropy().sum(-1)
    torch.testing.assert_close(behaviour.gaussian_entropy(std), expected)
