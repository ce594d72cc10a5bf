"""The prior actor: cloned from the rehearsal set, it guides execution (method, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsa import config as configs
from gsa.agent import storage
from gsa.agent.layers import dense, seeded
from gsa.agent.precision import full
from gsa.agent.sizes import IMAGE_SHAPE, PriorConfig
from gsa.agent.vision import Encoder

KIND = "prior_actor"


class PriorActor(nn.Module):
    """Stacked frames to one action. Made for one embodiment."""

    def __init__(self, config: PriorConfig, action_dim: int) -> None:
        super().__init__()
        self.config, self.action_dim = config, action_dim
        self.encoder = Encoder(IMAGE_SHAPE[-1] * config.frames, config.depth, nn.ELU)
        hiddens = dense(32 * config.depth, config.units, nn.ELU) + dense(config.units, config.units, nn.ELU)
        self.net = nn.Sequential(*hiddens, nn.Linear(config.units, action_dim))

    @classmethod
    def create(cls, config: PriorConfig, action_dim: int, seed: int, device: torch.device | str = "cpu") -> PriorActor:
        """A fresh one whose weights depend on `seed` alone."""
        with seeded(seed):
            return cls(config, action_dim).to(device)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 [N, 64, 64, 3·frames] as frame_stack makes them → actions [N, A], not clipped."""
        return full(self.net(self.encoder(frames)))

    def save(self, folder: str | Path, meta: Mapping[str, Any] | None = None) -> None:
        """Writes prior_actor.safetensors and prior_actor.json; `meta` is anything JSON."""
        about = {"prior": configs.to_dict(self.config), "action_dim": self.action_dim}
        storage.save(folder, KIND, self.state_dict(), about, dict(meta or {}))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> PriorActor:
        """Raises UsageError when there is none, FormatError when it is damaged."""
        about, tensors = storage.load(folder, KIND)
        config = configs.from_dict(PriorConfig, about["config"]["prior"], f"{folder}/{KIND}.json")
        prior = cls(config, int(about["config"]["action_dim"]))
        storage.fill(prior, tensors, f"The prior actor in {folder}")
        return prior.to(device)


def frame_stack(pixels: np.ndarray, steps: np.ndarray, frames: int) -> np.ndarray:
    """The frames up to and with each step, oldest first, along channels.

    pixels uint8 [T, 64, 64, 3], steps int [N] → uint8 [N, 64, 64, 3·frames]. Before the first frame stands the first.
    """
    rows = np.maximum(np.asarray(steps)[:, None] - np.arange(frames)[::-1], 0)
    stacked = pixels[rows]  # [N, frames, 64, 64, 3]
    return np.moveaxis(stacked, 1, 3).reshape(*stacked.shape[:1], *pixels.shape[1:3], -1)


def random_shift(frames: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels each way, its edge repeated: [N, H, W, C] of any dtype."""
    n, height, width, _ = frames.shape
    shift = torch.randint(-most, most + 1, (2, n, 1), generator=generator, device=generator.device).to(frames.device)
    rows = (torch.arange(height, device=frames.device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=frames.device) + shift[1]).clamp(0, width - 1)
    return frames[torch.arange(n, device=frames.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
