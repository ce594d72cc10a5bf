"""What a run will need of the disk and of memory, said before it starts and before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.models import TRAINED_BYTES, networks, parameters, unfilled
from deploy.progress import console
from gsa.agent.sizes import preset
from gsa.errors import UsageError
from retrieval.layout import Column, Layout

if TYPE_CHECKING:
    from deploy.config import FinetuneConfig
    from gsa.agent.sizes import WorldModelConfig
    from gsa.schema import Spec
    from learner.config import PretrainConfig

SAVED_BYTES = 12  # of a parameter in a checkpoint: its value and Adam's two moments
WEIGHT_BYTES = 4
PROCESS_BYTES = 300 << 20  # of anonymous memory in a process with torch, a simulator and Ray, before any network
RECORD_BYTES = 2048  # of an episode beside its arrays: headers, its line in the catalog


@dataclass(frozen=True)
class Forecast:
    """Bytes. Memory is without the activations of an update, which depend on the device."""

    on_disk: Mapping[str, int]  # what → at most
    in_memory: Mapping[str, int]  # what → at least
    free: int  # on the disk of the run's folder
    available: int | None  # memory of this machine; None where it is not known
    smaller: str  # the flags that ask for less disk
    lighter: str  # the flags that ask for less memory

    @property
    def disk(self) -> int:
        return sum(self.on_disk.values())

    @property
    def memory(self) -> int:
        return sum(self.in_memory.values())

    def say(self) -> None:
        """Prints it. UsageError if the disk has no room; a warning if memory is short."""
        disk, memory = f"{gb(self.disk)} of disk", f"{gb(self.memory)} of memory"
        console.print(
            f"The run needs at most about {disk} ({_parts(self.on_disk)}); {gb(self.free)} are free.", soft_wrap=True
        )
        console.print(
            f"It needs at least about {memory} ({_parts(self.in_memory)}); activations come on top.", soft_wrap=True
        )
        if self.disk > self.free:
            raise UsageError(
                f"The run needs about {disk} and {gb(self.free)} are free: make room, choose another --out, or lower "
                f"{self.smaller}."
            )
        if self.available is not None and self.memory > self.available:
            console.print(
                f"Warning: {gb(self.available)} of memory are available here. {self.lighter} need less.",
                soft_wrap=True,
            )


def forecast(config: FinetuneConfig, model: WorldModelConfig, size: str, spec: Spec, episode_steps: int) -> Forecast:
    """Of a run with a world model `model` of the named size on a task with that spec."""
    world_model, behaviour, prior = networks(replace(preset(size), world_model=model), spec.action_dim)
    trained = parameters(world_model) + parameters(behaviour)
    acting = trained + (parameters(prior) if config.guides else 0)
    steps = config.budget_frames // spec.action_repeat
    episodes = -(-steps // episode_steps)
    step_bytes = sum(column.step_bytes for column in Layout.of(spec).columns)
    kept = config.keep_checkpoints + 2  # that of the best evaluation, and the one being written
    batches = 4 * config.batch * config.length * step_bytes
    processes = 0 if config.local else 2 + config.workers * (1 + config.envs)  # driver and replay service
    others = processes * PROCESS_BYTES + config.workers * WEIGHT_BYTES * acting
    return Forecast(
        {
            "episodes": (steps + episodes) * step_bytes + episodes * RECORD_BYTES,
            "checkpoints": kept * SAVED_BYTES * trained,
            "agent": WEIGHT_BYTES * trained,
        },
        {"learner": PROCESS_BYTES + TRAINED_BYTES * trained + batches, "other processes": others},
        shutil.disk_usage(existing(config.out or Path())).free, available_memory(),
        "--budget-frames", "Fewer --workers or --envs",
    )  # fmt: skip


def pretrain_forecast(config: PretrainConfig, model: WorldModelConfig, out: Path, processes: int = 1) -> Forecast:
    """Of pre-training a world model `model` in so many processes of this machine. What an earlier part of it has on
    the disk counts as room: it is replaced."""
    from gsa.agent.world_model import WorldModel

    trained = parameters(unfilled(WorldModel, model))
    step_bytes = sum(Column("", np.dtype(o.dtype), o.shape).step_bytes for o in model.observation.specs().values())
    batches = 4 * config.batch * config.length * (step_bytes + WEIGHT_BYTES * model.max_action_dim)  # of all processes
    held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Forecast(
        {
            "checkpoints": (config.keep + 1) * SAVED_BYTES * trained,  # one is being written
            "world model": WEIGHT_BYTES * trained,
        },
        {"weights and optimiser": processes * (PROCESS_BYTES + TRAINED_BYTES * trained), "batches": batches},
        shutil.disk_usage(existing(out)).free + held, available_memory(),
        "--keep or --model", "Fewer --processes or a smaller --model",
    )  # fmt: skip


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.resolve()
    return path if path.exists() else existing(path.parent)


def available_memory() -> int | None:
    """Bytes that processes of this machine can still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{gb(size)} {part}" for part, size in sizes.items())


def gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
