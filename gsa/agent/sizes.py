"""How large the networks are: configs of the world model, the behaviour and the prior actor. No torch.

Axis letters: D deterministic state, Z = stoch·classes stochastic state, A action.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gsa.errors import UsageError, unknown

IMAGE_SHAPE = (64, 64, 3)  # [height, width, channel] uint8 of every observation the agent sees
Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class WorldModelConfig:
    """A block RSSM on 64×64 RGB images."""

    deter: int  # D
    hidden: int
    stoch: int
    classes: int
    depth: int  # channels of the encoder's first convolution; features are 32·depth
    blocks: int = 8
    max_action_dim: int = 21  # actions of fewer dimensions are padded with zeros
    gates: Literal["per-block", "flat"] = "per-block"  # "flat" splits all gates at once, across blocks
    unimix: float = 0.01  # share of the uniform distribution in every categorical
    free_nats: float = 1.0  # per step
    recon_scale: float = 1.0
    dyn_scale: float = 1.0
    rep_scale: float = 0.1
    precision: Precision = "auto"  # of matrix products; weights and statistics stay float32

    def __post_init__(self) -> None:
        if self.deter % self.blocks or (2 * self.hidden) % self.blocks:
            raise UsageError(f"deter {self.deter} and hidden {self.hidden} do not divide into {self.blocks} blocks.")
        if min(self.deter, self.hidden, self.stoch, self.classes, self.depth, self.max_action_dim) < 1:
            raise UsageError("Every size of a world model must be at least 1.")

    @property
    def latent(self) -> int:
        """Z, the length of the flattened stochastic state."""
        return self.stoch * self.classes

    @property
    def features(self) -> int:
        """The length of the encoder's output, which is also the retrieval key."""
        return 32 * self.depth


@dataclass(frozen=True)
class BehaviourConfig:
    """Actor, critic and reward head, and how they learn in imagination."""

    units: int = 512
    actor_layers: int = 3
    critic_layers: int = 3
    reward_layers: int = 2
    horizon: int = 16  # agent steps
    discount: float = 0.99
    lambda_: float = 0.95
    entropy: float = 1e-4  # weight of the entropy bonus in the actor's objective
    slow_critic_rate: float = 0.02  # share of the critic that its slow copy takes over at every update
    imagination_starts: int = 0  # states that imagination starts from; 0 takes every state of the batch
    learn_end: bool = False  # for tasks that end early: learn from the data's discount where they do

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise UsageError("The imagination horizon must be at least 2: an action is judged by the step after it.")


@dataclass(frozen=True)
class PriorConfig:
    """The prior actor: behaviour cloning from stacked frames."""

    depth: int = 48
    units: int = 512
    frames: int = 3
    shift: int = 3  # pixels; random shift of training images, each way


@dataclass(frozen=True)
class Preset:
    """A named size of everything."""

    world_model: WorldModelConfig
    behaviour: BehaviourConfig
    prior: PriorConfig


PRESETS = {
    "tiny": Preset(
        WorldModelConfig(deter=256, hidden=128, stoch=16, classes=16, depth=8),
        BehaviourConfig(units=128, imagination_starts=256),
        PriorConfig(depth=12, units=128),
    ),
    "small": Preset(
        WorldModelConfig(deter=512, hidden=256, stoch=32, classes=16, depth=16),
        BehaviourConfig(units=256, imagination_starts=512),
        PriorConfig(depth=24, units=256),
    ),
    "reference-small": Preset(
        WorldModelConfig(deter=1024, hidden=512, stoch=32, classes=32, depth=32), BehaviourConfig(), PriorConfig()
    ),
    "paper": Preset(
        WorldModelConfig(deter=12288, hidden=1536, stoch=32, classes=96, depth=96), BehaviourConfig(), PriorConfig()
    ),
}


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise unknown("model size", name, PRESETS)
    return PRESETS[name]
