"""What a suite is told: tasks, methods and seeds, what all trials share, and how each differs. No torch, no Ray."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actors import tasks
from deploy.config import FinetuneConfig, Method
from gsa import config as configs
from gsa.agent.sizes import PRESETS, WorldModelConfig
from gsa.errors import UsageError, unknown
from learner.config import PretrainConfig

SuiteMethod = Literal[Method, "prior"]  # the prior actor alone, which nothing is learned for
FIXED = ("task", "method", "seed", "store", "world_model", "out", "redis_url", "ray_address")  # the suite sets them
PLACES = ("store", "world_model", "out")
PER_RUN = ("workers", "envs", "env_timeout_s", "checkpoint_every_frames", "checkpoint_every_s", "keep_checkpoints")
REHEARSED = ("retrieve_k", "queries", "render", "imports")  # with pool, model and task they decide a rehearsal set


@dataclass(frozen=True)
class PoolSpec:
    """Where the offline trajectories come from: collected for the suite, or a store that is there."""

    sources: tuple[str, ...] = ()  # as for gsa collect: metaworld/reach-v3/scripted-1:20
    seed: int = 0
    codec: Literal["none", "lz4", "zstd"] = "none"
    store: Path | None = None

    def __post_init__(self) -> None:
        if self.sources and self.store is not None:
            raise UsageError("pool has both sources and a store: name one of them.")


@dataclass(frozen=True)
class WorldModelSpec:
    """The pre-trained world model: trained for the suite on its pool, or one that is there."""

    pretrain: PretrainConfig | None = None
    processes: int = 1
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.pretrain is not None and self.folder is not None:
            raise UsageError("world_model has both pretrain and a folder: name one of them.")


@dataclass(frozen=True)
class Variant:
    """Further trials: some tasks and methods under other settings, or beside the grid under the same."""

    name: str = ""  # "": no other settings, only more tasks or methods
    tasks: tuple[str, ...] = ()  # default: the suite's
    methods: tuple[SuiteMethod, ...] = ()
    seeds: tuple[int, ...] = ()
    finetune: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.]*(-[\w.]+)*", self.name):
            raise UsageError(f"A variant's name is of letters, digits, dots and single dashes, not '{self.name}'.")
        if bool(self.name) != bool(self.finetune):
            raise UsageError(f"variant '{self.name}': a name and other finetune settings go together.")


@dataclass(frozen=True)
class Resources:
    """What a trial may take."""

    cpus: int = 1  # cores and numeric threads of a trial
    gpus: float = 0.0  # share of a GPU that a trial takes
    trials: int = 0  # at a time; 0: as many as the cores give room for
    retries: int = 2  # of a trial that fails, each from its own checkpoints

    def __post_init__(self) -> None:
        if self.cpus < 1 or self.trials < 0 or self.retries < 0 or self.gpus < 0:
            raise UsageError("resources: cpus must be at least 1; gpus, trials and retries at least 0.")

    @property
    def at_a_time(self) -> int:
        return self.trials or max(1, (os.cpu_count() or 1) // self.cpus)


@dataclass(frozen=True)
class Scale:
    """What counts as 0 and as 1 when a task's results are put beside another's."""

    score: tuple[float, float] = (0.0, 100.0)
    returns: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for low, high in (self.score, self.returns or (0.0, 1.0)):
            if not low < high:
                raise UsageError(f"A scale goes from a lower to a higher number, not from {low:g} to {high:g}.")


@dataclass(frozen=True)
class Speed:
    """How long the steps of a trial take, in seconds."""

    update_s: float
    step_s: float  # an agent step: simulator and policy

    def __post_init__(self) -> None:
        if self.update_s <= 0 or self.step_s <= 0:
            raise UsageError("speed: update_s and step_s must be above 0.")


@dataclass(frozen=True)
class SuiteConfig:
    """Tasks × methods × seeds on one pool and one pre-trained world model."""

    name: str
    tasks: tuple[str, ...]
    methods: tuple[SuiteMethod, ...]
    seeds: tuple[int, ...] = (0,)
    pool: PoolSpec = field(default_factory=PoolSpec)
    world_model: WorldModelSpec = field(default_factory=WorldModelSpec)
    finetune: dict[str, Any] = field(default_factory=dict)  # settings of gsa finetune for all trials …
    per_task: dict[str, dict[str, Any]] = field(default_factory=dict)  # … for a task's or pattern's, over these
    per_method: dict[str, dict[str, Any]] = field(default_factory=dict)  # … and of a method, over both
    variants: tuple[Variant, ...] = ()
    resources: Resources = field(default_factory=Resources)
    scale: dict[str, Scale] = field(default_factory=dict)  # task → …; default: scores from 0 to 100, but for gym
    keep: tuple[Literal["agent", "online"], ...] = ("agent", "online")  # of a trial that is done, beside its result
    speed: Speed | None = None  # what is known of the hardware; default: measured before the suite starts

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+([.-]\w+)*", self.name):
            raise UsageError(f"A suite's name is of letters, digits, dots and dashes, not '{self.name}'.")
        for name in ("tasks", "methods", "seeds"):
            given = getattr(self, name)
            if not given:
                raise UsageError(f"{name} must name at least one.")
            if len(set(given)) < len(given):
                raise UsageError(f"{name} names one twice.")
        for kind, given, known in (
            ("task in per_task", self.per_task, self._all("tasks")),
            ("task in scale", self.scale, self._all("tasks")),
            ("method in per_method", self.per_method, self._all("methods")),
        ):
            for name in given:
                if name not in known and not (given is self.per_task and fnmatch.filter(known, name)):
                    raise unknown(kind, name, known)

    def trials(self, folder: Path) -> list[Trial]:
        """All trials with their runs below `folder`, in the order in which they are run: those of the first seed
        before those of the second, so that whatever ends early leaves whole comparisons. UsageError for what cannot
        be."""
        grid = Variant(tasks=self.tasks, methods=self.methods, seeds=self.seeds)
        found: dict[str, Trial] = {}
        for variant in (grid, *self.variants):
            for trial in self._of(variant, folder):
                if trial.name in found:
                    raise UsageError(f"{trial.name} is there twice: give the variant another name.")
                found[trial.name] = trial
        order = {seed: at for at, seed in enumerate(dict.fromkeys(t.seed for t in found.values()))}
        return sorted(found.values(), key=lambda trial: order[trial.seed])

    def _of(self, variant: Variant, folder: Path) -> Iterator[Trial]:
        for seed in variant.seeds or self.seeds:
            for task in variant.tasks or self.tasks:
                for method in variant.methods or self.methods:
                    yield self._trial(task, method, variant, seed, folder)

    def _trial(self, task: str, method: SuiteMethod, variant: Variant, seed: int, folder: Path) -> Trial:
        name = "--".join([task.replace("/", "-"), method, *filter(None, [variant.name]), f"seed{seed}"])
        of_task = [settings for pattern, settings in self.per_task.items() if fnmatch.fnmatchcase(task, pattern)]
        layers = (self.finetune, *of_task, self.per_method.get(method, {}), variant.finetune)
        try:
            settings = _merged(layers) | {
                "task": task, "method": "gsa" if method == "prior" else method, "seed": seed,
                "store": self.pool.store or folder / "pool", "out": folder / "trials" / name,
                "world_model": self.world_model.folder or folder / "world_model",
            }  # fmt: skip
            config = configs.from_dict(FinetuneConfig, self._sized(settings), "finetune").resolved()
            about = tasks.find(task, config.imports)
            if method != "prior":
                config.replay(about.action_repeat, about.episode_steps)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        return Trial(name, task, method, variant.name, seed, replace(config, redis_url=None, ray_address=None))

    def _sized(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Trials are local unless told otherwise; what is not pre-trained is of the pre-trained one's size."""
        pretrain, folder, size = self.world_model.pretrain, self.world_model.folder, {}
        if pretrain is not None:
            size = {"model": pretrain.model, "max_action_dim": pretrain.max_action_dim}
        elif folder is not None:
            size = _size_of(folder)
        return {"local": True, **size, **settings}

    def _all(self, what: str) -> list[str]:
        return sorted({*getattr(self, what), *(n for v in self.variants for n in getattr(v, what))})


@dataclass(frozen=True)
class Trial:
    """One run of the suite."""

    name: str
    task: str
    method: SuiteMethod
    variant: str
    seed: int
    config: FinetuneConfig

    @property
    def label(self) -> str:
        """Method and variant, as tables name them."""
        return f"{self.method} {self.variant}".strip()

    @property
    def rehearsal(self) -> str:
        """A name for its rehearsal set, which trials with the same settings share."""
        kind = "random" if self.config.method == "random-rehearsal" else "nearest"
        decides = [kind, *(getattr(self.config, k) for k in REHEARSED)]
        digest = hashlib.blake2b(json.dumps(decides).encode(), digest_size=3).hexdigest()
        return f"{self.task.replace('/', '-')}--{kind}-{digest}"

    def settings(self) -> dict[str, Any]:
        """What makes its result: everything but where it lies and how it is run."""
        skip = (*PLACES, "redis_url", "ray_address", *PER_RUN)
        return {k: v for k, v in configs.to_dict(self.config).items() if k not in skip}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """What of the settings that a result was made under is not this trial's, in words.

        A setting that the result does not tell is younger than it, and had its default.
        """
        places = {key: str(value) for key in PLACES if (value := getattr(self.config, key)) is not None}
        before = replace(self, config=configs.from_dict(FinetuneConfig, {**settings, **places})).settings()
        return [f"{k} {before[k]} → {value}" for k, value in self.settings().items() if before[k] != value]


def chosen(trials: Sequence[Trial], only: Sequence[str]) -> list[Trial]:
    """The trials with a name like one of the patterns; all without any. UsageError for a pattern like none."""
    for pattern in only:
        if not any(fnmatch.fnmatch(trial.name, pattern) for trial in trials):
            raise UsageError(f"No trial is like '{pattern}'; one is called {trials[0].name}.")
    return [t for t in trials if not only or any(fnmatch.fnmatch(t.name, pattern) for pattern in only)]


def _size_of(folder: Path) -> dict[str, Any]:
    """The named size nearest to that of the world model in the folder."""
    about = folder / "world_model.json"
    if not about.is_file():
        raise UsageError(f"There is no world model in {folder}: it lacks {about.name}.")
    model = configs.from_dict(WorldModelConfig, json.loads(about.read_text())["config"], str(about))
    name = min(PRESETS, key=lambda name: abs(PRESETS[name].world_model.deter - model.deter))
    return {"model": name, "max_action_dim": model.max_action_dim}


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Later settings over earlier ones, mappings in them likewise."""
    merged: dict[str, Any] = {}
    for key, value in (pair for layer in layers for pair in layer.items()):
        if key in FIXED:
            raise UsageError(f"{key} is the suite's to set: leave it out of the finetune settings.")
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged
