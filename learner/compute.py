"""Device, threads and random numbers of a training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gsa.errors import UsageError
from learner.config import ComputeConfig


def set_up(config: ComputeConfig) -> torch.device:
    """The device to compute on. Sets this process's CPU threads where the config gives a number."""
    if config.threads:
        torch.set_num_threads(config.threads)
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError(
            f"There is no GPU that torch {torch.__version__} can use: take --device cpu, or install torch for CUDA."
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def generator_for(device: torch.device, seed: int, update: int) -> torch.Generator:
    """Random numbers that depend on the seed and the update alone, so that a count is all a resume needs."""
    mixed = np.random.SeedSequence([seed, update]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def to_floats(part: str, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """{name: scalar} → {part_name: number}, with one wait for the device. Without a part the names stay."""
    values = torch.stack([v.detach().float() for v in metrics.values()]).tolist()
    return {f"{part}_{name}" if part else name: value for name, value in zip(metrics, values, strict=True)}
