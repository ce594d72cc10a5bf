"""Fine-tuning: one update of world model, reward head, actor and critic on a batch that mixes online and rehearsed
sequences. Which rows are which is told by the batch alone: a method without rehearsal, guidance or pre-training is
the same code on other inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gsa.agent import storage
from gsa.agent.agent import Agent
from gsa.agent.behaviour import imagination_starts
from gsa.agent.world_model import TensorBatch
from gsa.schema import Batch
from learner.compute import generator_for, set_up, to_floats
from learner.config import LearnerConfig
from learner.optimiser import Optimiser


class FineTuner:
    """Owns an agent in training: its device, its four optimisers and the count of its updates."""

    def __init__(self, agent: Agent, config: LearnerConfig, seed: int = 0) -> None:
        self.device = set_up(config.compute)
        self.agent, self.config, self.seed = agent.to(self.device), config, seed
        model = agent.world_model
        model.config = dataclasses.replace(model.config, precision=config.compute.precision)
        self.updates = 0
        self._snapshot: dict[str, np.ndarray] | None = None
        self._optimisers = {
            name: Optimiser(name, getattr(agent, name).named_parameters(), getattr(config, name))
            for name in ("world_model", "reward", "actor", "critic")
        }

    def update(self, batch: Batch) -> dict[str, float]:
        """One update on B sequences of T rows; returns losses, gradient norms and what else to watch.

        The world model learns from every valid row, the reward head only where `reward_mask` is set, actor and
        critic in imagination from the states inferred. Deterministic on the CPU, given weights, seed and count.
        """
        agent, optimisers = self.agent, self._optimisers
        data = TensorBatch.from_batch(batch, self.device)
        generator = generator_for(self.device, self.seed, self.updates)

        loss, states, watched = agent.world_model.loss(data, generator)
        metrics = to_floats("world_model", watched) | optimisers["world_model"].step(loss)
        if batch.reward_mask.any():  # without a target Adam's momentum alone would still move the head
            loss, watched = agent.reward_loss(states.state, data)
            metrics |= to_floats("reward", watched) | optimisers["reward"].step(loss)
        start, weight = imagination_starts(states.state, data, agent.config.imagination_starts, generator)
        loss, imagined, watched = agent.actor_loss(start, weight, generator)
        metrics |= to_floats("actor", watched) | optimisers["actor"].step(loss)
        loss, watched = agent.critic_loss(imagined)
        metrics |= to_floats("critic", watched) | optimisers["critic"].step(loss)
        agent.update_slow_critic()

        self.updates += 1
        metrics["skipped_steps"] = float(sum(o.skips for o in optimisers.values()))
        return metrics

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of the weights that acting needs, by name: what is published. Good until the next call."""
        self._snapshot = self.agent.acting_tensors(self.config.publish_bf16, self._snapshot)
        return self._snapshot

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
