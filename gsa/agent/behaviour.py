"""Behaviour learning in imagination (method, section 6): networks, λ-returns and losses.

H imagined steps from N start states. Value of a state counts the reward of having arrived there:

    state     s0   s1   …  sH        s0 is inferred from data, the others imagined
    action    a0   a1   …            a_t is chosen at s_t and leads to s_t+1
    reward    r0   r1   …  rH        r_t is caused by a_t-1; v(sH) counts the last
    return    R0   R1   …  RH        R_t = r_t + γ_t((1-λ) v(s_t+1) + λ R_t+1),  RH = v(sH)
    critic    R0 … RH-1              at the same states
    actor     R1 … RH-1              for a0 … aH-2: the first return that an action can change

γ_t is the discount, times the probability that the task goes on after s_t where the agent learns when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsa.agent import twohot
from gsa.agent.layers import StateMLP
from gsa.agent.precision import full
from gsa.agent.rssm import State
from gsa.agent.sizes import BehaviourConfig, WorldModelConfig
from gsa.agent.unroll import unroll_mlp
from gsa.agent.world_model import Dream, TensorBatch, WorldModel

MIN_STD, MAX_STD = 0.1, 1.0


class Actor(nn.Module):
    """The policy: a Gaussian over the embodiment's own action dimensions."""

    def __init__(self, model: WorldModelConfig, behaviour: BehaviourConfig, action_dim: int) -> None:
        super().__init__()
        self.net = StateMLP(
            model.deter, model.latent, 2 * action_dim, behaviour.actor_layers, behaviour.units, model.blocks
        )

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., A], float32."""
        return _gaussian(self.net(state.deter, state.stoch))

    def ready(self) -> Callable[[State], tuple[Tensor, Tensor]]:
        """The policy, made ready for many calls under weights that stay as they are."""
        net = unroll_mlp(self.net)
        return lambda state: _gaussian(net(state.deter, state.stoch))


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what the policy's network gives."""
    mean, std = full(x).chunk(2, -1)
    return torch.tanh(mean), (MAX_STD - MIN_STD) * torch.sigmoid(std + 2) + MIN_STD


def sample_action(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """A Gaussian sample clamped to [-1, 1]; the gradient ignores the clamp."""
    action = mean + std * noise
    return action + (action.clamp(-1, 1) - action).detach()


def gaussian_entropy(std: Tensor) -> Tensor:
    """Of the Gaussian before the clamp, in nats, summed over actions: [..., A] → [...]."""
    return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class ScalarHead(nn.Module):
    """A two-hot distribution that starts out at zero everywhere: the critic."""

    def __init__(self, model: WorldModelConfig, units: int, layers: int) -> None:
        super().__init__()
        self.net = StateMLP(model.deter, model.latent, twohot.BINS, layers, units, model.blocks)
        nn.init.zeros_(self.net.last.weight)
        nn.init.zeros_(self.net.last.bias)

    def forward(self, state: State) -> Tensor:
        """Logits [..., 255]."""
        return self.net(state.deter, state.stoch)

    def value(self, state: State) -> Tensor:
        """The number itself, float32 [...]."""
        return twohot.decode(self(state))


class RewardHead(ScalarHead):
    """The reward of having arrived in a state, and, if `learn_end`, whether the task goes on from there."""

    def __init__(self, model: WorldModelConfig, config: BehaviourConfig) -> None:
        super().__init__(model, config.units, config.reward_layers)
        sizes = (model.deter, model.latent, 1, config.reward_layers, config.units, model.blocks)
        self.end = StateMLP(*sizes) if config.learn_end else None

    def end_logit(self, state: State) -> Tensor | None:
        """[...], positive where the task has probably ended; None where it never does."""
        return None if self.end is None else full(self.end(state.deter, state.stoch)).squeeze(-1)


class Imagined(NamedTuple):
    """H steps from N start states."""

    states: list[State]  # H+1 of [N, …]
    entropy: Tensor  # [H, N] of the policy at each state that it acted in


def imagination_starts(
    state: State, batch: TensorBatch, count: int, generator: torch.Generator
) -> tuple[State, Tensor]:
    """Start states [N, …] out of posterior states [B, T, …], detached, and each one's weight [N].

    All valid ones, or `count` of them drawn without replacement. The weight is the data's discount: nothing follows a
    state in which the task ended.
    """
    valid = batch.valid.flatten()
    rows = torch.arange(len(valid), device=valid.device) if batch.whole else valid.nonzero().squeeze(-1)
    if 0 < count < len(rows):
        order = torch.rand(len(rows), generator=generator, device=generator.device).argsort()
        rows = rows[order[:count].to(rows.device)]
    flat = state.detach().flatten()
    return State(flat.deter[rows], flat.stoch[rows]), batch.discount.flatten()[rows]


def imagine(
    world_model: WorldModel, actor: Actor, start: State, horizon: int, generator: torch.Generator,
    watch: Callable[[State], None] = lambda state: None,
) -> Imagined:  # fmt: skip
    """Rolls the policy out in the model. Gradients reach the actor through the dynamics, not through its inputs.

    `watch` is given each state as it comes, while it is still in the processor's cache.
    """
    n, config = len(start.deter), world_model.config
    uniform = world_model.draw((horizon, n), generator)
    dream = Dream(world_model)
    state, states, entropies, noise = start, [start], [], None
    watch(start)
    for t in range(horizon):
        mean, std = actor(state.detach())
        if noise is None:
            noise = torch.randn(horizon, *mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        action = sample_action(mean, std, noise[t])
        action = nn.functional.pad(action, (0, config.max_action_dim - action.shape[-1]))
        state = dream(state, action, uniform[t])
        watch(state)
        states.append(state)
        entropies.append(gaussian_entropy(std))
    return Imagined(states, torch.stack(entropies))


def lambda_returns(reward: Tensor, value: Tensor, discount: Tensor, lambda_: float) -> Tensor:
    """R_0 … R_H-1 of r and γ of s0 … sH-1 and v of s1 … sH, [H, N] each → [H, N]. v(sH) counts the reward there."""
    returns = [value[-1]]
    for t in reversed(range(len(reward))):
        returns.append(reward[t] + discount[t] * ((1 - lambda_) * value[t] + lambda_ * returns[-1]))
    return torch.stack(returns[:0:-1])


def step_weights(start: Tensor, discount: Tensor) -> Tensor:
    """Cumulative discount of each imagined state: start weights [N] and γ_t [H, N] → [H, N]; row 0 as given."""
    return torch.cat([start[None], discount[:-1].detach()]).cumprod(0)


def actor_loss(returns: Tensor, entropy: Tensor, weights: Tensor, scale: float) -> Tensor:
    """−(return + scale·entropy), weighted. returns, entropy, weights [H, N] → a scalar."""
    return -(weights[:-1] * (returns[1:] + scale * entropy[:-1])).mean()


def critic_loss(logits: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Weighted two-hot loss to the (detached) returns. logits [H, N, 255], the others [H, N] → a scalar."""
    return (weights * twohot.loss(logits, returns.detach())).mean()
