"""Device, threads and random numbers of a training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gsa.agent import kernels
from gsa.errors import UsageError
from learner.config import ComputeConfig


def set_up(config: ComputeConfig) -> torch.device:
    """The device to compute on. Sets this process's CPU threads where the config gives a number, and whether it takes
    the kernels of gsa.agent.kernels. Raises UsageError where what is asked for is not there."""
    if config.threads:
        torch.set_num_threads(config.threads)
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError(
            f"There is no GPU that torch {torch.__version__} can use: take --device cpu, or install torch for CUDA."
        )
    device = torch.device("cuda" if available and config.device != "cpu" else "cpu")
    kernels.enabled = config.compile != "off"
    if config.compile == "on" and device.type == "cpu" and not kernels.available():
        raise UsageError(
            "The CPU's kernels cannot be compiled: install a C compiler ('cc', or name one in CC), or take "
            "--compute.compile auto, which does without."
        )
    return device


def generator_for(device: torch.device, seed: int, update: int) -> torch.Generator:
    """Random numbers that depend on the seed and the update alone, so that a count is all a resume needs."""
    return seed_for(torch.Generator(device), seed, update)


def seed_for(generator: torch.Generator, seed: int, update: int) -> torch.Generator:
    """The same, out of a generator that there is already."""
    mixed = np.random.SeedSequence([seed, update]).generate_state(1, np.uint64)[0]
    return generator.manual_seed(int(mixed))


def to_floats(part: str, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """{name: scalar} → {part_name: number}, with one wait for the device. Without a part the names stay."""
    values = torch.stack([v.detach().float() for v in metrics.values()]).tolist()
    return {f"{part}_{name}" if part else name: value for name, value in zip(metrics, values, strict=True)}
