"""The prior actor: cloned from the rehearsal set, it guides execution (method, section 5).

It sees what the world model sees: the last frames of all images, and the present vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsa import config as configs
from gsa.agent import storage
from gsa.agent.layers import dense, seeded
from gsa.agent.precision import full
from gsa.agent.sizes import IMAGE_SHAPE, PIXELS, ObservationConfig, PriorConfig
from gsa.agent.twohot import symlog
from gsa.agent.vision import Encoder

KIND = "prior_actor"


@dataclass(frozen=True)
class Saved:
    """What a prior actor's file says of it."""

    prior: PriorConfig
    action_dim: int
    observation: ObservationConfig = PIXELS


class PriorActor(nn.Module):
    """Stacked frames and vectors to one action. Made for one embodiment."""

    def __init__(self, config: PriorConfig, action_dim: int, observation: ObservationConfig = PIXELS) -> None:
        super().__init__()
        self.config, self.action_dim, self.observation = config, action_dim, observation
        inputs = self.observation.length
        self.encoder: Encoder | None = None
        if self.observation.images:
            self.encoder = Encoder(self.observation.channels * config.frames, config.depth, nn.ELU)
            inputs += 32 * config.depth
        hiddens = dense(inputs, config.units, nn.ELU) + dense(config.units, config.units, nn.ELU)
        self.net = nn.Sequential(*hiddens, nn.Linear(config.units, action_dim))

    @classmethod
    def create(
        cls, config: PriorConfig, action_dim: int, seed: int, device: torch.device | str = "cpu",
        observation: ObservationConfig = PIXELS,
    ) -> PriorActor:  # fmt: skip
        """A fresh one whose weights depend on `seed` alone."""
        with seeded(seed):
            return cls(config, action_dim, observation).to(device)

    def forward(self, frames: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Frames uint8 [N, 64, 64, 3·cameras·frames] as frame_stack makes them and vectors [N, V] → actions [N, A], not
        clipped. What it does not see is not read."""
        parts = [] if self.encoder is None else [self.encoder(frames)]
        if self.observation.vectors:
            assert vectors is not None
            parts.append(symlog(vectors))
        return full(self.net(parts[0] if len(parts) == 1 else torch.cat(parts, -1)))

    def save(self, folder: str | Path, meta: Mapping[str, Any] | None = None) -> None:
        """Writes prior_actor.safetensors and prior_actor.json; `meta` is anything JSON."""
        about = configs.to_dict(Saved(self.config, self.action_dim, self.observation))
        storage.save(folder, KIND, self.state_dict(), about, dict(meta or {}))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> PriorActor:
        """Raises UsageError when there is none, FormatError when it is damaged."""
        about, tensors = storage.load(folder, KIND)
        saved = configs.from_dict(Saved, about["config"], f"{folder}/{KIND}.json")
        what = f"The prior actor in {folder}"
        return storage.build(lambda: cls(saved.prior, saved.action_dim, saved.observation), tensors, what).to(device)


def cameras(observation: Mapping[str, np.ndarray], seen: ObservationConfig) -> np.ndarray:
    """All images of an observation along channels: uint8 [T, 64, 64, 3·cameras]; without a camera there are none."""
    if len(seen.images) == 1:
        return observation[seen.images[0]]
    blank = np.zeros((len(observation[seen.names[0]]), *IMAGE_SHAPE[:2], 0), np.uint8)
    return np.concatenate([blank, *(observation[name] for name in seen.images)], -1)


def frame_stack(pixels: np.ndarray, steps: np.ndarray, frames: int) -> np.ndarray:
    """The frames up to and with each step, oldest first, along channels.

    pixels uint8 [T, 64, 64, C], steps int [N] → uint8 [N, 64, 64, C·frames]. Before the first frame stands the first.
    """
    rows = np.maximum(np.asarray(steps)[:, None] - np.arange(frames)[::-1], 0)
    stacked = pixels[rows]  # [N, frames, 64, 64, 3]
    return np.moveaxis(stacked, 1, 3).reshape(len(stacked), *pixels.shape[1:3], frames * pixels.shape[3])


def random_shift(frames: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels each way, its edge repeated: [N, H, W, C] of any dtype."""
    n, height, width, _ = frames.shape
    shift = torch.randint(-most, most + 1, (2, n, 1), generator=generator, device=generator.device).to(frames.device)
    rows = (torch.arange(height, device=frames.device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=frames.device) + shift[1]).clamp(0, width - 1)
    return frames[torch.arange(n, device=frames.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
