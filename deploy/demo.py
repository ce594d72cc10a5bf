"""`gsa demo`: the main job end to end on this machine, small; the commands of the README in one process."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from actors.guidance import GuidanceConfig
from deploy import pool, rehearsal, stages
from deploy import run as runs
from deploy.config import FinetuneConfig
from deploy.data_commands import Collect
from deploy.progress import console
from gsa.errors import UsageError
from learner.config import CloneConfig, ComputeConfig, LearnerConfig, OptimiserConfig, PretrainConfig

TASK = "metaworld/drawer-close-v3"
FAST = 4e-4  # learning rate for hundreds of updates of a tiny model; the paper's 1e-4 is for hundreds of thousands


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    sources: tuple[tuple[str, int], ...]
    pretrain: PretrainConfig
    finetune: FinetuneConfig


def plan(quick: bool, out: Path, seed: int) -> Plan:
    """The full demo takes under 15 minutes on 2 cores, the quick one under 3."""
    n = 2 if quick else 12
    sources = (
        ("metaworld/drawer-close-v3/scripted-2", n), ("metaworld/drawer-close-v3/scripted-1.5", n),
        ("metaworld/window-close-v3/scripted-1", n), ("metaworld/button-press-topdown-v3/scripted-1", n),
        ("metaworld/reach-v3/scripted-0.5", n), ("dmc/cartpole-balance/noise-1", n // 2),
        ("dmc/walker-walk/noise-1", n // 2), ("dmc/walker-walk/planner-0.5", max(1, n // 6)),
    )  # fmt: skip
    optimiser = OptimiserConfig(learning_rate=FAST)
    finetune = FinetuneConfig(
        task=TASK,
        store=out / "pool",
        world_model=out / "world_model",
        out=out / "run",
        seed=seed,
        workers=2,
        budget_frames=1_200 if quick else 8_000,
        warmup_frames=600 if quick else 2_000,
        warmup_episodes=2,
        batch=16,
        length=16 if quick else 32,
        train_ratio=16.0 if quick else 64.0,
        retrieve_k=2 * n,
        eval_every_frames=600 if quick else 2_000,
        eval_episodes=1 if quick else 5,
        final_episodes=2 if quick else 20,
        guidance=GuidanceConfig(schedule="linear(1,0.1,4000)"),
        clone=CloneConfig(
            steps=60 if quick else 600, batch=64, evaluate_every=30 if quick else 100, seed=seed, learning_rate=FAST
        ),
        learner=LearnerConfig(
            world_model=optimiser, reward=optimiser, actor=optimiser, critic=optimiser,
            compute=ComputeConfig(threads=os.cpu_count() or 1),
        ),
    )  # fmt: skip
    pretrain = PretrainConfig(
        model="tiny", updates=20 if quick else 350, batch=finetune.batch, length=finetune.length, seed=seed,
        optimiser=optimiser,
    )  # fmt: skip
    return Plan(sources, pretrain, finetune)


def demo(out: Path, quick: bool, seed: int) -> int:
    """Collect, ingest, pre-train, index, fine-tune, report; prints times and where things lie."""
    from actors.rendering import choose_backend

    choose_backend()
    out = out.resolve()
    if (out / "run").exists():
        raise UsageError(f"{out / 'run'} is there from an earlier demo; delete {out} or choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    settings = plan(quick, out, seed)
    started = time.perf_counter()
    with runs.stage(out, "collect"):
        pool.collect(Collect(tuple(f"{name}:{n}" for name, n in settings.sources), out / "episodes", seed=seed))
    with runs.stage(out, "ingest"):
        pool.ingest(out / "episodes", out / "pool", "auto", "none")
    pool.store_info(out / "pool")
    with runs.stage(out, "pre-train"):
        stages.pretrain(out / "pool", settings.pretrain, out / "world_model")
    with runs.stage(out, "index"):
        rehearsal.index(out / "pool", out / "world_model")
    runs.finetune(settings.finetune)
    _print_times(out, time.perf_counter() - started)
    return 0


def _print_times(out: Path, seconds: float) -> None:
    import json

    table = Table(title="Time", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for folder in (out, out / "run"):
        for row in json.loads((folder / "stages.json").read_text()):
            table.add_row(row["stage"], f"{row['seconds']:.0f}")
    table.add_row("all", f"{seconds:.0f}")
    console.print(table)
    for name, what in (
        ("episodes", "collected episodes"), ("pool", "trajectory store"), ("world_model", "pre-trained world model"),
        ("run", "fine-tuning run: report.html, video.mp4, contact_sheet.png, metrics.jsonl, agent/"),
    ):  # fmt: skip
        console.print(f"{out / name}: {what}", soft_wrap=True)
