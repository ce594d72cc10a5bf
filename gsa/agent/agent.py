"""The agent: a world model and the behaviour learned inside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gsa import config as configs
from gsa.agent import behaviour, storage, twohot
from gsa.agent.behaviour import Actor, RewardHead, ScalarHead
from gsa.agent.layers import frozen, seeded
from gsa.agent.rssm import State
from gsa.agent.sizes import BehaviourConfig
from gsa.agent.world_model import TensorBatch, WorldModel, masked_mean
from gsa.errors import SpecMismatch

KIND = "behaviour"
ACTING = ("encoder", "vector_encoder", "cell", "posterior")  # the parts of a world model that acting needs


@dataclass(frozen=True)
class Saved:
    """What an agent's file says of its behaviour."""

    behaviour: BehaviourConfig
    action_dim: int


class Imagination(NamedTuple):
    """What the actor's loss leaves behind for the critic's. No gradients."""

    states: list[State]  # H of [N, …]
    returns: Tensor  # [H, N]
    weights: Tensor  # [H, N]


class Agent(nn.Module):
    """World model, actor, critic with its slow copy, reward head."""

    def __init__(self, world_model: WorldModel, config: BehaviourConfig, action_dim: int) -> None:
        super().__init__()
        model = world_model.config
        if not 1 <= action_dim <= model.max_action_dim:
            raise SpecMismatch(
                f"The task has {action_dim} action dimensions, the world model takes 1 to {model.max_action_dim}."
            )
        self.config, self.action_dim = config, action_dim
        self.world_model = world_model
        self.actor = Actor(model, config, action_dim)
        self.critic = ScalarHead(model, config.units, config.critic_layers)
        self.reward = RewardHead(model, config)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)

    @classmethod
    def create(cls, world_model: WorldModel, config: BehaviourConfig, action_dim: int, seed: int = 0) -> Agent:
        """Fresh behaviour on a given world model (which is not copied), on its device."""
        with seeded(seed):
            return cls(world_model, config, action_dim).to(world_model.device)

    @property
    def behaviour(self) -> nn.ModuleDict:
        """All but the world model."""
        return nn.ModuleDict({k: getattr(self, k) for k in ("actor", "critic", "reward", "slow_critic")})

    def reward_loss(self, state: State, batch: TensorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the reward head on posterior states [B, T, …], where rewards may be read. The states are detached."""
        state = state.detach()
        with self.world_model.autocast():
            logits, end = self.reward(state), self.reward.end_logit(state)
        loss = masked_mean(twohot.loss(logits, batch.reward), batch.reward_mask)
        with torch.no_grad():
            error = masked_mean((twohot.decode(logits) - batch.reward).abs(), batch.reward_mask)
        metrics = {"loss": loss.detach(), "error": error}
        if end is not None:
            cross_entropy = binary_cross_entropy_with_logits(end, 1 - batch.discount, reduction="none")
            end_loss = masked_mean(cross_entropy, batch.reward_mask)
            loss, metrics["end_loss"] = loss + end_loss, end_loss.detach()
        return loss, metrics

    def actor_loss(
        self, start: State, weight: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Imagination, dict[str, Tensor]]:
        """Of the actor, through imagination from `start` [N, …] with `weight` [N]. Only the actor gets gradients."""
        c = self.config
        judged: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
        with frozen(self.world_model, self.reward, self.slow_critic), self.world_model.autocast():
            imagined = behaviour.imagine(
                self.world_model,
                self.actor,
                start,
                c.horizon,
                generator,
                lambda state: judged.append(self._judge(state, len(judged))),
            )
        reward, value, discount = (torch.stack([x for x in row if x is not None]) for row in zip(*judged, strict=True))
        returns = behaviour.lambda_returns(reward, value, discount, c.lambda_)
        weights = behaviour.step_weights(weight, discount)
        loss = behaviour.actor_loss(returns, imagined.entropy, weights, c.entropy)
        metrics = {
            "loss": loss, "entropy": imagined.entropy.mean(), "return": returns.mean(), "reward": reward.mean(),
            "value": value.mean(),
        }  # fmt: skip
        left = Imagination([state.detach() for state in imagined.states[:-1]], returns.detach(), weights)
        return loss, left, {k: v.detach() for k, v in metrics.items()}

    def critic_loss(self, imagination: Imagination) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the critic, on the states and returns that the actor's loss left."""
        with self.world_model.autocast():  # state by state: what is imagined at once outgrows the processor's cache
            logits = [self.critic(state) for state in imagination.states]
        steps = zip(logits, imagination.returns, imagination.weights, strict=True)
        loss = torch.stack([behaviour.critic_loss(*step) for step in steps]).mean()
        return loss, {"loss": loss.detach()}

    def _judge(self, state: State, t: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Reward, value and discount of the imagined states s_t [N, …], float32 [N] each; None where no return reads
        it. The value of s1 is the first return's alone, which no action changes: it needs no gradient."""
        value = None if t == 0 else self.slow_critic.value(state.detach() if t == 1 else state)
        if t == self.config.horizon:
            return None, value, None
        reward, end = self.reward.value(state), self.reward.end_logit(state)
        going_on = torch.ones_like(reward) if end is None else torch.sigmoid(-end)
        return reward, value, self.config.discount * going_on

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Moves the slow critic a step towards the critic. Once an update."""
        pairs = zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, self.config.slow_critic_rate)

    def acting_tensors(self, bf16: bool = False, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Copies of the weights that acting needs, by name: what is published. float32; with `bf16`, those of two or
        more axes BFLOAT16. Into the arrays of `out`, if given, which an earlier call returned."""
        modules = {k: getattr(self.world_model, k) for k in ACTING} | {"actor": self.actor}
        state = nn.ModuleDict({k: v for k, v in modules.items() if v is not None}).state_dict()
        return {k: storage.to_array(v.detach(), bf16, None if out is None else out[k]) for k, v in state.items()}

    def save(self, folder: str | Path, meta: Mapping[str, Any] | None = None) -> None:
        """Writes the world model and the behaviour. The folder also opens as a world model's."""
        about = configs.to_dict(Saved(self.config, self.action_dim))
        self.world_model.save(folder, meta)
        storage.save(folder, KIND, self.behaviour.state_dict(), about, dict(meta or {}))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Agent:
        """Raises UsageError when there is none, FormatError when it is damaged."""
        about, tensors = storage.load(folder, KIND)
        saved = configs.from_dict(Saved, about["config"], f"{folder}/{KIND}.json")
        world_model = WorldModel.load(folder)
        with torch.device("meta"):
            agent = cls(world_model, saved.behaviour, saved.action_dim)
        storage.build(lambda: agent.behaviour, tensors, f"The behaviour in {folder}")
        return agent.to(device)
