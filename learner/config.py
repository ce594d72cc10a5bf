"""Settings of the learner's parts. No torch here: the command line makes its flags from these before it loads any."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from gsa.agent.sizes import PIXELS, ObservationConfig, Precision, WorldModelConfig, preset
from gsa.errors import UsageError


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam with a global clip and decoupled weight decay."""

    learning_rate: float = 1e-4
    epsilon: float = 1e-5
    clip_norm: float = 100.0  # of the gradient over all weights of the optimiser
    weight_decay: float = 1e-6  # share of each weight taken away per step; not scaled by the learning rate
    max_skips: int = 20  # gradients in a row that are not finite, before the training stops

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "epsilon", "clip_norm", "max_skips")
        if not 0 <= self.weight_decay < 1:
            raise UsageError(f"weight_decay must be in [0, 1), not {self.weight_decay}.")


@dataclass(frozen=True)
class ComputeConfig:
    """Where and how precisely to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    precision: Precision = "auto"  # of matrix products; auto: bfloat16 where the hardware has units for it
    threads: int = 0  # CPU threads; 0 leaves them as they are
    compile: Literal["auto", "on", "off"] = "auto"  # CPU: kernels in C; GPU: CUDA graphs. auto: where they work

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UsageError(f"threads must be 0 or more, not {self.threads}.")


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training of the world model on a pool, without rewards."""

    model: str = "small"  # a size: tiny, small, reference-small, paper
    max_action_dim: int = 21  # actions of fewer dimensions are padded with zeros
    observe: tuple[str, ...] = ()  # images and vectors to see, by name; default: all that the embodiments share
    updates: int = 200_000
    batch: int = 16  # sequences
    length: int = 64  # observation rows a sequence
    seed: int = 0
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    log_every: int = 50  # updates
    checkpoint_every: int = 1000  # updates
    keep: int = 2  # checkpoints
    strip_context: int = 5  # observations that an open-loop prediction is given before it predicts
    strip_every: int = 5000  # updates between pictures of open-loop predictions; 0: only at the end
    deadline_s: float = 600.0  # without an answer of another process that trains too, after which to give up

    def __post_init__(self) -> None:
        _positive(self, "updates", "batch", "log_every", "checkpoint_every", "keep", "strip_context", "deadline_s")
        if self.strip_every < 0:
            raise UsageError(f"strip_every must be 0 or more, not {self.strip_every}.")
        if self.length < 2:
            raise UsageError(f"length must be at least 2 rows, not {self.length}: the dynamics need a transition.")
        if self.strip_context >= self.length:
            raise UsageError(f"strip_context {self.strip_context} leaves nothing to predict of {self.length} rows.")
        self.world_model()

    def world_model(self, observation: ObservationConfig = PIXELS) -> WorldModelConfig:
        """The model that is trained. Raises UsageError for an unknown size."""
        return replace(
            preset(self.model).world_model, max_action_dim=self.max_action_dim, precision=self.compute.precision,
            observation=observation,
        )  # fmt: skip


@dataclass(frozen=True)
class CloneConfig:
    """Behaviour cloning of the prior actor."""

    steps: int = 0  # 0: as many as fit the world model's size, 150,000 at the paper's
    batch: int = 0  # steps of trajectories in a batch; 0: likewise, 256 at the paper's size
    learning_rate: float = 0.0  # 0: likewise, 1e-4 at the paper's size
    seed: int = 0
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    holdout: float = 0.1  # share of the trajectories that only the validation loss sees
    evaluate_every: int = 500  # steps between validation losses; the weights of the best one are kept
    patience: int = 0  # validation losses in a row without a new best, after which to stop; 0 never stops early
    checkpoint_every_s: float = 60.0  # seconds between checkpoints, at least

    def __post_init__(self) -> None:
        _positive(self, "evaluate_every")
        for name in ("steps", "batch", "learning_rate"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"holdout must be in [0, 1), not {self.holdout}.")
        if self.patience < 0 or (self.patience and not self.holdout):
            raise UsageError("patience must be 0 or more, and needs a holdout: without one nothing tells when to stop.")

    def for_size(self, model: str = "paper") -> CloneConfig:
        """With what was left open filled in: the paper's, or less where the networks are made for a CPU.

        The small ones take minutes: 2,000 steps of 0.05 s at "tiny", 8,000 of 0.15 s at "small", on one core.
        """
        preset(model)
        scaled = {"tiny": (2_000, 64, 3e-4), "small": (8_000, 128, 1e-4)}.get(model, (150_000, 256, 1e-4))
        steps, batch, learning_rate = scaled
        return replace(
            self, steps=self.steps or steps, batch=self.batch or batch,
            learning_rate=self.learning_rate or learning_rate,
        )  # fmt: skip


@dataclass(frozen=True)
class LearnerConfig:
    """Fine-tuning: one update of world model, reward head, actor and critic on a mixed batch."""

    world_model: OptimiserConfig = field(default_factory=OptimiserConfig)
    reward: OptimiserConfig = field(default_factory=OptimiserConfig)
    actor: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(learning_rate=8e-5))
    critic: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(learning_rate=8e-5))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    publish_every: int = 1  # updates between published snapshots, at least
    publish_every_s: float = 0.0  # seconds between published snapshots, at least
    publish_bf16: bool = False  # matrices are rounded to bfloat16 where they are published: half the bytes

    def __post_init__(self) -> None:
        _positive(self, "publish_every")
        if self.publish_every_s < 0:
            raise UsageError(f"publish_every_s must be 0 or more, not {self.publish_every_s}.")


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UsageError(f"{name} must be above 0, not {getattr(config, name)}.")
