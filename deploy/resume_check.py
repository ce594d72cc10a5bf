"""Proof, on a user's own run, that it goes on as if it had not been stopped: `gsa resume-check RUN`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.checkpointing import FOLDER, inputs_digest
from deploy.config import FinetuneConfig, config_of
from deploy.local import LocalRun
from gsa.errors import UsageError
from gsa.metrics import Progress, read_log
from learner.checkpoint import Checkpoints, read
from retrieval.store import TrajectoryStore

PASSED_OVER = ("meter", "inputs")  # what tells of time too, its counts follow from the rest; and what was compared
Key = tuple[int, int, bool, list[int]]


def resume_check(run: Path, scratch: Path | None, progress: Progress) -> list[str]:
    """What is wrong with the run's checkpoints: nothing, or a sentence each. Changes nothing in the run.

    A run in one process is gone on with, in a copy, from an older checkpoint to the next one that was kept, and must
    come to the same state bit for bit. One over Ray cannot repeat itself: its checkpoint, store and log must agree.
    """
    config = config_of(run)
    if not config.local:
        return agreement(run, progress)
    paths = Checkpoints(run / FOLDER).paths()
    if len(paths) < 2:
        raise UsageError(f"{run} has kept {len(paths)} checkpoints; the check goes from one to the next: run on first.")
    with tempfile.TemporaryDirectory(prefix="resume-check-", dir=scratch) as folder:
        copy = Path(shutil.copytree(run, Path(folder) / "run"))
        _, target = read(paths[1])
        for later in paths[1:]:
            shutil.rmtree(copy / FOLDER / later.name)
        return repeated(replace(config, out=copy), copy, target, progress)


def repeated(config: FinetuneConfig, run: Path, target: Mapping[str, Any], progress: Progress) -> list[str]:
    """Goes on with `run` until it stands where `target` was saved; how its state then differs."""
    local = LocalRun(config, run)
    try:
        local.resume()
        for _ in local.turns(lambda *_: None):
            state = local.state()
            progress(int(state["tuner"]["updates"]), int(target["tuner"]["updates"]), {})
            if _stands(state) == _stands(target):
                return differences(target, state)
            if state["tuner"]["updates"] > target["tuner"]["updates"]:
                break
        return [f"The run never came to where its next checkpoint was saved, {_stands(target)}."]
    finally:
        local.close()


def agreement(run: Path, progress: Progress) -> list[str]:
    """Whether a run's newest checkpoint is whole and its own, and whether store and log tell of the same episodes."""
    found: list[str] = []
    restored = Checkpoints(run / FOLDER).load()
    if restored is None:
        raise UsageError(f"{run} has no checkpoint yet.")
    found += restored.damaged
    if restored.state.get("inputs") != inputs_digest(run):
        found.append("The checkpoint was saved with other inputs than lie in the run's folder.")
    with TrajectoryStore.open(run / "online") as store:
        found += [f"Trajectory {row} of the online store: {reason}." for row, reason in store.verify(progress)]
        steps = store.catalog.length[store.rows()].tolist()
    logged = [row["episode/steps"] for row in read_log(run) if "episode/steps" in row]
    if logged != steps[: len(logged)] or len(steps) - len(logged) > 1000:
        found.append(f"The log tells of {len(logged)} episodes, which are not the first of the {len(steps)} stored.")
    return found


def differences(theirs: Any, ours: Any, where: str = "state") -> list[str]:
    """Where two states differ, by the way to it; what only tells of time is passed over."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [k for k in ours if k not in PASSED_OVER]
        missing = [f"{where}.{k} is on one side only" for k in set(keys) ^ (set(theirs) - {*PASSED_OVER})]
        return missing + [d for k in keys if k in theirs for d in differences(theirs[k], ours[k], f"{where}.{k}")]
    if isinstance(theirs, (torch.Tensor, np.ndarray)):
        return [] if np.array_equal(_array(theirs), _array(ours)) else [f"{where} differs"]
    if isinstance(theirs, (list, tuple)) and len(theirs) == len(ours):
        return [d for i, pair in enumerate(zip(theirs, ours, strict=True)) for d in differences(*pair, f"{where}[{i}]")]
    return [] if theirs == json.loads(json.dumps(ours)) else [f"{where}: {theirs} saved, {ours} now"]


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _stands(state: Mapping[str, Any]) -> Key:
    """Where a run stands: updates, episodes stored, whose turn it is, steps of the episodes under way."""
    under_way = [-1 if e is None else len(e["action"]) for e in state["worker"]["rollout"]["episodes"]]
    return int(state["tuner"]["updates"]), int(state["replay"]["rows"]), bool(state["learned"]), under_way
