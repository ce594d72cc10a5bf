"""An observation as the networks take it: cameras side by side along their channels, vectors end to end in symlog.

Pixels alone are the paper's case. Vectors are scaled by symlog, so that joint angles and forces in newtons both fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gsa.agent.layers import Layers, dense
from gsa.agent.precision import full
from gsa.agent.sizes import ObservationConfig, WorldModelConfig
from gsa.agent.twohot import symexp, symlog
from gsa.agent.unroll import Map
from gsa.agent.vision import Encoder, to_patches


class Inputs(NamedTuple):
    """N observations as the networks take them; None for what the model does not see."""

    patches: Tensor | None  # int8 [N, 32, 32, 12·cameras]: vision.to_patches of the images
    vectors: Tensor | None  # [N, V] symlog


def prepare(config: ObservationConfig, observation: Mapping[str, Tensor]) -> Inputs:
    """name → [..., shape of one], with the same leading dimensions for all, which are flattened to N."""
    images = [observation[name] for name in config.images]
    patches = to_patches(images[0] if len(images) == 1 else torch.cat(images, -1)) if images else None
    vectors = [observation[name] for name, _ in config.vectors]
    return Inputs(patches, symlog(torch.cat(vectors, -1)).flatten(0, -2) if vectors else None)


def lead(config: ObservationConfig, observation: Mapping[str, Tensor]) -> torch.Size:
    """The leading dimensions that all of an observation have."""
    one = observation.get(config.names[0])
    return torch.Size() if one is None else one.shape[: -3 if config.images else -1]


def split(config: ObservationConfig, images: Tensor | None, vectors: Tensor | None) -> dict[str, Tensor]:
    """The observation by name, of images [..., 64, 64, 3·cameras] and vectors in symlog [..., V]."""
    found = {} if images is None else dict(zip(config.images, images.split(3, -1), strict=True))
    if vectors is not None:
        lengths = [length for _, length in config.vectors]
        parts = symexp(full(vectors)).split(lengths, -1)
        found |= {name: part for (name, _), part in zip(config.vectors, parts, strict=True)}
    return found


def encoders(config: WorldModelConfig) -> tuple[Encoder | None, Layers | None]:
    """The network that sees the images and the one that sees the vectors."""
    seen, hidden = config.observation, config.hidden
    images = Encoder(seen.channels, config.depth) if seen.images else None
    vectors = Layers(*dense(seen.length, hidden), *dense(hidden, hidden)) if seen.vectors else None
    return images, vectors


def encode(images: Map | None, vectors: Map | None, inputs: Inputs) -> Tensor:
    """What `encoders` make of N observations: features [N, F], the images' first. `images`: of patches."""
    parts = []
    if images is not None and inputs.patches is not None:
        parts.append(images(inputs.patches))
    if vectors is not None and inputs.vectors is not None:
        parts.append(vectors(inputs.vectors))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
