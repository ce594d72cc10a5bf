"""Fine-tuning: one update of world model, reward head, actor and critic on a batch that mixes online and rehearsed
sequences. Which rows are which is told by the batch alone: a method without rehearsal, guidance or pre-training is
the same code on other inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsa.agent import storage
from gsa.agent.agent import Agent
from gsa.agent.behaviour import imagination_starts
from gsa.agent.rssm import State
from gsa.agent.world_model import TensorBatch
from gsa.schema import Batch
from learner.compute import seed_for, set_up, to_floats
from learner.config import LearnerConfig
from learner.graphs import Graphs, Part, Result
from learner.optimiser import Optimiser


class FineTuner:
    """Owns an agent in training: its device, its four optimisers and the count of its updates."""

    def __init__(self, agent: Agent, config: LearnerConfig, seed: int = 0) -> None:
        self.device = set_up(config.compute)
        self.agent, self.config, self.seed = agent.to(self.device), config, seed
        model = agent.world_model
        model.config = dataclasses.replace(model.config, precision=config.compute.precision)
        self.updates = 0
        self._generator = torch.Generator(self.device)
        self._graphs = Graphs(self.device, config.compute.compile)
        self._optimisers = {
            name: Optimiser(name, getattr(agent, name).named_parameters(), getattr(config, name))
            for name in ("world_model", "reward", "actor", "critic")
        }

    def update(self, batch: Batch) -> dict[str, float]:
        """One update on B sequences of T rows; returns losses, gradient norms and what else to watch.

        The world model learns from every valid row, the reward head only where `reward_mask` is set, actor and
        critic in imagination from the states inferred. Deterministic on the CPU, given weights, seed and count.
        """
        agent, metrics = self.agent, dict[str, float]()
        data, generator = self._graphs.load(batch), seed_for(self._generator, self.seed, self.updates)

        def step(name: str, part: Part) -> Any:
            optimiser = self._optimisers[name]
            loss, left, watched = self._graphs.run(name, part, optimiser, generator)
            metrics.update(to_floats(name, watched) | optimiser.apply(loss))
            return left

        states = step("world_model", lambda: self._world_model_loss(data, generator))
        if batch.reward_mask.any():  # without a target Adam's momentum alone would still move the head
            step("reward", lambda: _leaving_nothing(agent.reward_loss(states, data)))
        imagined = step("actor", lambda: self._actor_loss(states, data, generator))
        step("critic", lambda: _leaving_nothing(agent.critic_loss(imagined)))
        agent.update_slow_critic()

        self.updates += 1
        metrics["skipped_steps"] = float(sum(o.skips for o in self._optimisers.values()))
        return metrics

    def _world_model_loss(self, data: TensorBatch, generator: torch.Generator) -> Result:
        loss, states, watched = self.agent.world_model.loss(data, generator)
        return loss, states.state.detach(), watched

    def _actor_loss(self, states: State, data: TensorBatch, generator: torch.Generator) -> Result:
        start, weight = imagination_starts(states, data, self.agent.config.imagination_starts, generator)
        return self.agent.actor_loss(start, weight, generator)

    def snapshot(self, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Copies of the weights that acting needs, by name: what is published. In `out`, if given, which is like what
        an earlier call returned."""
        return self.agent.acting_tensors(self.config.publish_bf16, out)

    def state(self) -> dict[str, Any]:
        """All that continues the training exactly. The tensors are the live ones: save or copy them at once."""
        return {
            "updates": self.updates,
            "seed": self.seed,
            "agent": self.agent.state_dict(),
            "optimisers": {name: optimiser.state() for name, optimiser in self._optimisers.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues as the one that gave `state`. Raises SpecMismatch or FormatError where it is of another agent."""
        storage.fill(self.agent, state["agent"], "The checkpoint's agent")
        for name, optimiser in self._optimisers.items():
            optimiser.restore(state["optimisers"][name])
        self.updates, self.seed = int(state["updates"]), int(state["seed"])


def _leaving_nothing(result: tuple[Tensor, dict[str, Tensor]]) -> Result:
    loss, watched = result
    return loss, None, watched
