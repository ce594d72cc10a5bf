"""A suite's folder filled with made-up results, for reports and analyses that need many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

FRAMES = (2000, 4000, 6000, 8000)


def result(task: str, method: str, seed: int, score: float, variant: str = "") -> dict:
    """A trial whose curve rises straight to its score."""
    share = [frames / FRAMES[-1] for frames in FRAMES]
    curve = [{"frames": f, "score": score * s, "return": 10 * score * s} for f, s in zip(FRAMES, share, strict=True)]
    return {
        "task": task, "method": method, "variant": variant, "seed": seed, "score": score, "return": 10 * score,
        "frames": 0 if method == "prior" else FRAMES[-1], "seconds": 60.0, "curve": [] if method == "prior" else curve,
    }  # fmt: skip


def fill(folder: Path, tasks: Sequence[str], levels: Mapping[str, float], seeds: int = 3, **suite) -> Path:
    """`levels`: method → mean score, or "method variant" → mean score on the first task."""
    rng = np.random.default_rng(0)
    methods = [name for name in levels if " " not in name]
    about = {"name": "made-up", "tasks": list(tasks), "methods": methods, "seeds": list(range(seeds)), **suite}
    (folder / "results").mkdir(parents=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(about))
    for name, level in levels.items():
        method, _, variant = name.partition(" ")
        for task in tasks[:1] if variant else tasks:
            for seed in range(seeds):
                found = result(task, method, seed, float(level + rng.uniform(-5, 5)), variant)
                file = "--".join([task.replace("/", "-"), *name.split(), f"seed{seed}.json"])
                (folder / "results" / file).write_text(json.dumps(found))
    return folder
