"""This package's fine-tuning update: world model, reward head, actor and critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from benchmarks.rivals import ACTIONS, MAX_ACTIONS, Case, arrays, padded
from gsa.agent.agent import Agent
from gsa.agent.sizes import preset
from gsa.agent.world_model import WorldModel
from gsa.schema import Batch
from learner.config import ComputeConfig, LearnerConfig
from learner.finetune import FineTuner


def tuner(case: Case) -> FineTuner:
    """At the reference's architecture: its gate layout, its padded actions, imagination from every state."""
    sizes = preset(case.size)
    model = dataclasses.replace(sizes.world_model, max_action_dim=MAX_ACTIONS, gates="flat", precision=case.precision)
    behaviour = dataclasses.replace(sizes.behaviour, imagination_starts=case.starts)
    agent = Agent.create(WorldModel.create(model, 0), behaviour, ACTIONS)
    return FineTuner(agent, LearnerConfig(compute=ComputeConfig(case.device, case.precision, compile=case.compile)))


def batch(case: Case) -> Batch:
    data, bt = arrays(case), (case.batch, case.length)
    first = np.zeros(bt, bool)
    first[:, 0] = True
    online = np.zeros(bt, bool)
    online[: case.batch - case.batch // 4] = True
    return Batch(
        {"pixels": data["pixels"]}, padded(data["action"]),
        np.repeat((np.arange(MAX_ACTIONS) < ACTIONS)[None].astype(np.float32), case.batch, 0),
        data["reward"], online, np.ones(bt, np.float32), first, np.ones(bt, bool), (),
    )  # fmt: skip


def build(case: Case) -> tuple[Callable[[], object], int]:
    """A call per update, and the number of trainable weights."""
    learner, data = tuner(case), batch(case)
    weights = sum(p.numel() for p in learner.agent.parameters() if p.requires_grad)
    return lambda: learner.update(data), weights
