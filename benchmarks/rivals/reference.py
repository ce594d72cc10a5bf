"""The reference's fine-tuning update, out of its repository (zhaoyi11/ncrl): GSA_PEER_NCRL names a checkout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.rivals import ACTIONS, MAX_ACTIONS, Case, arrays, padded
from gsa.agent.sizes import preset

VARIABLE = "GSA_PEER_NCRL"


def build(case: Case) -> tuple[Callable[[], object], int]:
    """A call per update, and the number of trainable weights."""
    root = Path(os.environ[VARIABLE])
    sys.path.insert(0, str(root / "src"))
    import torch
    from dreamer.dreamer import DreamerAgent
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    config = OmegaConf.load(root / "config" / "finetune.yaml")
    config.ws.device, config.ws.run_id = case.device, "benchmark"
    sizes = preset(case.size)
    for key in ("deter", "hidden", "stoch", "classes"):
        config.agent.rssm[key] = getattr(sizes.world_model, key)
    config.agent.encoder.cnn_depth, config.agent.reward.units = sizes.world_model.depth, sizes.behaviour.units
    agent = DreamerAgent(config.agent, (3, 64, 64), ACTIONS, MAX_ACTIONS, device=case.device)
    online, offline = _batch(case)
    weights = {id(p): p.numel() for m in (agent.wm, agent._task_behavior.actor, agent._task_behavior.critic)
               for p in m.parameters()}  # fmt: skip
    return lambda: agent.update(dict(online), dict(offline), 0), sum(weights.values())


def _batch(case: Case) -> tuple[dict, dict]:
    import torch

    data, bt = arrays(case), (case.batch, case.length)
    first = np.zeros(bt, bool)
    first[:, 0] = True
    whole = {
        "observation": np.ascontiguousarray(data["pixels"].transpose(0, 1, 4, 2, 3)),
        "action": padded(data["action"]),
        "action_mask": np.ones_like(padded(data["action"])),
        "reward": data["reward"][..., None],
        "discount": np.ones((*bt, 1), np.float32),
        "is_first": first,
        "is_terminal": np.zeros((*bt, 1), bool),
    }
    tensors = {k: torch.from_numpy(v) for k, v in whole.items()}
    cut = case.batch - case.batch // 4
    return {k: v[:cut] for k, v in tensors.items()}, {k: v[cut:] for k, v in tensors.items()}
