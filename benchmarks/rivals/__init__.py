"""Learners that benchmarks.learner compares, each built in a process of its own: `build(case)` → a call per update.

All get the same random batch of pixels, actions and rewards, in the layout each of them trains on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ACTIONS, MAX_ACTIONS = 6, 21


@dataclass(frozen=True)
class Case:
    """What one rival is asked to run."""

    size: str  # a preset of gsa.agent.sizes
    batch: int  # sequences
    length: int  # observation rows a sequence
    precision: str = "float32"
    starts: int = 0  # states that imagination starts from; 0 takes all
    device: str = "cpu"
    compile: str = "auto"  # ours: kernels in C, or on a GPU CUDA graphs
    parameters: int = 0  # trainable ones to come near to; only where a rival has sizes of its own


def arrays(case: Case) -> dict[str, np.ndarray]:
    """pixels [B, T, 64, 64, 3] uint8, action [B, T, 6], reward [B, T]: smooth images, so that losses are finite."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (case.batch, case.length, 8, 8, 3), dtype=np.uint8)
    return {
        "pixels": coarse.repeat(8, 2).repeat(8, 3),
        "action": rng.uniform(-1, 1, (case.batch, case.length, ACTIONS)).astype(np.float32),
        "reward": rng.random((case.batch, case.length)).astype(np.float32),
    }


def padded(action: np.ndarray) -> np.ndarray:
    return np.pad(action, ((0, 0), (0, 0), (0, MAX_ACTIONS - action.shape[-1])))
