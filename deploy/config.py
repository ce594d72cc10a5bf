"""What a fine-tuning run is told: one frozen dataclass that drives flags, YAML and docs. No torch, no Ray."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from actors.guidance import GuidanceConfig
from gsa import config as configs
from gsa.errors import UsageError
from learner.config import CloneConfig, LearnerConfig
from replay_service.config import ReplayConfig

LEASE_S = 120.0  # without a sign of life of a worker: then what it has under way goes back to the budget
Method = Literal["scratch", "naive", "rehearsal", "random-rehearsal", "gsa", "jsrl"]
Imports = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        name="import", aliases=["--imports"], metavar="MODULE", help="Modules that register Gymnasium environments."
    ),
]


@dataclass(frozen=True)
class FinetuneConfig:
    """Specialise a pre-trained world model to one task with few online interactions."""

    task: str
    """dmc/<domain>-<task>, metaworld/<name>-v3 or gym/<EnvId>; `gsa tasks` lists them."""
    store: Path | None = None
    """The pool: a trajectory store. Needed by every method but scratch."""
    world_model: Path | None = None
    """Folder of a pre-trained world model. Needed by every method but scratch."""
    out: Path | None = None
    """The run's folder; default runs/<task>-<method>-seed<N>."""
    method: Method = "gsa"
    """scratch: nothing pre-trained. naive: pre-trained only. rehearsal: + retrieved trajectories in every batch.
    random-rehearsal: the same with randomly drawn ones. gsa: rehearsal + guidance by the prior actor.
    jsrl: as gsa, but the prior begins each episode and the policy ends it."""
    budget_frames: int = 150_000
    """Simulator frames to collect online; exact."""
    seed: int = 0
    local: bool = False
    """One process without Ray or Redis: deterministic, step-locked."""
    workers: int = 2
    """Processes that step environments."""
    envs: int = 1
    """Environments a worker steps in one batch, each in a process of its own."""
    env_timeout_s: float = 60.0
    """Seconds that an environment may take for a reset or an agent step; then it is ended and made anew."""
    guide: str | None = None
    """module:factory of a guide that may take over from the policy, such as a person at a device: docs/guidance.md."""
    redis_url: str | None = field(default_factory=lambda: os.environ.get("GSA_REDIS_URL"))
    """Redis for the weight broadcast; default: the environment's GSA_REDIS_URL, else one of our own."""
    ray_address: str | None = field(default_factory=lambda: os.environ.get("GSA_RAY_ADDRESS"))
    """A running Ray cluster ("auto" or host:port); default: GSA_RAY_ADDRESS, else one of our own."""
    render: Literal["fast", "faithful"] = "fast"
    """Render profile; the pool's should be the same."""
    imports: Imports = ()
    model: str = "small"
    """Size of the world model where none is loaded (scratch)."""
    max_action_dim: int = 21
    """Padded action size where no world model is loaded (scratch)."""
    retrieve_k: int = 500
    """Trajectories to retrieve for the rehearsal set."""
    queries: int = 1
    """First frames of the task to retrieve with."""
    warmup_frames: int = 15_000
    """Frames collected by the prior alone (uniform random where there is none) before learning starts …"""
    warmup_episodes: int = 5
    """… and episodes; whichever is more."""
    eval_every_frames: int = 10_000
    eval_episodes: int = 5
    final_episodes: int = 20
    """Episodes of the last evaluation, of each of random policy, prior and fine-tuned policy."""
    batch: int = 16
    """Sequences a batch."""
    length: int = 64
    """Observation rows a sequence."""
    rehearsal_share: float | str = 0.25
    """Share of each batch that is rehearsed: 4 of 16. Or a schedule over agent steps, as for guidance."""
    train_ratio: float = 256.0
    """Replayed steps for each agent step collected."""
    capacity_frames: int | None = None
    """Newest online frames that batches are drawn from; default: all."""
    imagination_starts: int | None = None
    """States imagined from in an update; 0 takes all of the batch; default: the model size's own."""
    learn_end: bool = False
    """Learn when the task ends, and imagine no further: for gym/… tasks that terminate early."""
    checkpoint_every_frames: int = 10_000
    """Frames collected between two checkpoints, at most …"""
    checkpoint_every_s: float = 600.0
    """… and seconds."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; that of the best evaluation is kept besides."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    clone: CloneConfig = field(default_factory=CloneConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        at_least_one = ("budget_frames", "workers", "envs", "retrieve_k", "queries", "final_episodes")
        for name in (*at_least_one, "checkpoint_every_frames", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1.")
        if self.imagination_starts is not None and self.imagination_starts < 0:
            raise UsageError("--imagination-starts must be 0, for every state of the batch, or more.")
        if not self.env_timeout_s > 0:
            raise UsageError("--env-timeout-s must be positive.")
        if self.uses_pool and (self.store is None or self.world_model is None):
            raise UsageError(f"Method {self.method} needs --store and --world-model; only scratch goes without.")

    @property
    def uses_pool(self) -> bool:
        """Starts from the pre-trained world model."""
        return self.method != "scratch"

    @property
    def rehearses(self) -> bool:
        """Mixes offline trajectories into every batch."""
        return self.method in ("rehearsal", "random-rehearsal", "gsa", "jsrl")

    @property
    def guides(self) -> bool:
        """Clones a prior actor and lets it take over."""
        return self.method in ("gsa", "jsrl")

    def resolved(self) -> FinetuneConfig:
        """With the method's settings and the default folder filled in: what the run folder keeps."""
        out = self.out or Path("runs") / f"{self.task.replace('/', '-')}-{self.method}-seed{self.seed}"
        placement = "prefix" if self.method == "jsrl" else self.guidance.placement
        store, world_model = (None if path is None else path.resolve() for path in (self.store, self.world_model))
        guidance = replace(self.guidance, placement=placement)
        return replace(self, out=out, store=store, world_model=world_model, guidance=guidance)

    def replay(self, action_repeat: int, episode_steps: int) -> ReplayConfig:
        """The replay service's settings; frames become agent steps."""
        warmup_steps = max(1, self.warmup_frames // action_repeat)
        min_size, budget = max(warmup_steps, self.warmup_episodes * episode_steps), self.budget_frames // action_repeat
        if min_size >= budget:
            raise UsageError(
                f"The budget of {self.budget_frames} frames ends within the warm-up of {min_size * action_repeat}: "
                "raise --budget-frames, or lower --warmup-frames and --warmup-episodes."
            )
        return ReplayConfig(
            batch=self.batch,
            length=self.length,
            rehearsal_share=self.rehearsal_share if self.rehearses else 0.0,
            samples_per_insert=self.train_ratio,
            min_size=min_size,
            parallel_episodes=1 if self.local else self.workers * self.envs,
            lease_timeout_s=math.inf if self.local else LEASE_S,
            budget=budget,
            episode_steps=episode_steps,
            warmup_steps=warmup_steps,
            warmup_episodes=self.warmup_episodes,
            capacity=None if self.capacity_frames is None else self.capacity_frames // action_repeat,
        )


def config_of(run: Path) -> FinetuneConfig:
    """What the run in this folder was told, wherever the folder lies now. UsageError where there is no run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{run} has no run to go on with or to look at: it lacks {path.name}.")
    return replace(configs.load(FinetuneConfig, path), out=run)
