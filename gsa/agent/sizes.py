"""How large the networks are: configs of the world model, the behaviour and the prior actor. No torch.

Axis letters: D deterministic state, Z = stoch·classes stochastic state, A action.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gsa.errors import SpecMismatch, UsageError, unknown
from gsa.schema import ArraySpec

IMAGE_SHAPE = (64, 64, 3)  # [height, width, channel] uint8 of every image the agent sees
Precision = Literal["float32", "bfloat16", "auto"]
MAX_SIZE, MAX_LAYERS, MAX_FRAMES = 1 << 20, 64, 64  # a file that asks for more is hostile or damaged


class ArrayLike(Protocol):
    """An array, a tensor or an ArraySpec."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class ObservationConfig:
    """What the networks see of an observation: images of 64×64 RGB and vectors, by name."""

    images: tuple[str, ...] = ("pixels",)  # uint8 [64, 64, 3] each
    vectors: tuple[tuple[str, int], ...] = ()  # name and length of each

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise UsageError(f"A model sees at least one observation, each once; not {list(self.names)}.")
        if any(not 1 <= n <= MAX_SIZE for _, n in self.vectors):
            raise UsageError(f"The vectors of an observation have 1 to {MAX_SIZE} numbers, not {dict(self.vectors)}.")

    @classmethod
    def of(cls, observation: Mapping[str, ArraySpec], only: Collection[str] = ()) -> ObservationConfig:
        """All of an embodiment's observation, or what is named in `only`.

        Raises UsageError for a name that is not there, SpecMismatch for what no network sees: images of another size,
        arrays that are no vectors.
        """
        for name in only:
            if name not in observation:
                raise unknown("observation", name, observation)
        chosen = {k: v for k, v in sorted(observation.items()) if k in (only or observation)}
        for name, spec in chosen.items():
            if spec.shape != IMAGE_SHAPE and (len(spec.shape) != 1 or spec.dtype != "float32"):
                raise SpecMismatch(
                    f"The observation '{name}' is {_describe(spec)}; the networks see images of {list(IMAGE_SHAPE)} "
                    f"uint8 and float32 vectors: resize it when it is ingested, or leave it out by naming the others."
                )
        images = tuple(k for k, v in chosen.items() if v.is_image)
        return cls(images, tuple((k, v.shape[0]) for k, v in chosen.items() if not v.is_image))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.images, *(name for name, _ in self.vectors))

    @property
    def channels(self) -> int:
        """Of all images together: they are laid side by side along their channels."""
        return IMAGE_SHAPE[-1] * len(self.images)

    @property
    def length(self) -> int:
        """Of all vectors together."""
        return sum(length for _, length in self.vectors)

    def specs(self) -> dict[str, ArraySpec]:
        images = {name: ArraySpec(IMAGE_SHAPE, "uint8") for name in self.images}
        return images | {name: ArraySpec((length,), "float32") for name, length in self.vectors}

    def require(self, found: Mapping[str, ArrayLike], ours: str, theirs: str, lead: tuple[int, ...] = ()) -> None:
        """Raises SpecMismatch, naming both sides, unless all that is seen is in `found`: specs, arrays or tensors with
        leading dimensions `lead`. What is there beside it is ignored, and so is how wide a float is."""
        wanted = {k: ((*lead, *v.shape), v.dtype.rstrip("32")) for k, v in self.specs().items()}
        for name, (shape, kind) in wanted.items():
            value = found.get(name)
            if value is None or tuple(value.shape) != shape or not _dtype(value).startswith(kind):
                seen = ", ".join(f"{k} {list(shape)} {kind}" for k, (shape, kind) in wanted.items())
                there = ", ".join(f"{k} {_describe(v)}" for k, v in found.items()) or "nothing"
                raise SpecMismatch(f"{ours} sees {seen}; {theirs} has {there}: '{name}' does not fit.")


PIXELS = ObservationConfig()  # the paper's case


def _dtype(value: ArrayLike) -> str:
    return str(value.dtype).removeprefix("torch.")


def _describe(value: ArrayLike) -> str:
    return f"{list(value.shape)} {_dtype(value)}"


def _sizes(config: object, *names: str, most: int = MAX_SIZE) -> None:
    for name in names:
        if not 1 <= getattr(config, name) <= most:
            raise UsageError(f"{name} must be 1 to {most}, not {getattr(config, name)}.")


@dataclass(frozen=True)
class WorldModelConfig:
    """A block RSSM on images and vectors."""

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
    observation: ObservationConfig = PIXELS

    def __post_init__(self) -> None:
        _sizes(self, "deter", "hidden", "stoch", "classes", "depth", "blocks", "max_action_dim")
        if self.deter % self.blocks or (2 * self.hidden) % self.blocks:
            raise UsageError(f"deter {self.deter} and hidden {self.hidden} do not divide into {self.blocks} blocks.")

    @property
    def latent(self) -> int:
        """Z, the length of the flattened stochastic state."""
        return self.stoch * self.classes

    @property
    def features(self) -> int:
        """The length of what the encoder makes of an observation, which is also the retrieval key."""
        return 32 * self.depth * bool(self.observation.images) + self.hidden * bool(self.observation.vectors)


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
        _sizes(self, "units")
        _sizes(self, "actor_layers", "critic_layers", "reward_layers", most=MAX_LAYERS)
        if self.horizon < 2:
            raise UsageError("The imagination horizon must be at least 2: an action is judged by the step after it.")


@dataclass(frozen=True)
class PriorConfig:
    """The prior actor: behaviour cloning from stacked frames."""

    depth: int = 48
    units: int = 512
    frames: int = 3
    shift: int = 3  # pixels; random shift of training images, each way

    def __post_init__(self) -> None:
        _sizes(self, "depth", "units")
        _sizes(self, "frames", most=MAX_FRAMES)
        if not 0 <= self.shift < IMAGE_SHAPE[0]:
            raise UsageError(f"shift must be 0 to {IMAGE_SHAPE[0] - 1} pixels, not {self.shift}.")


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
