"""What `gsa check-env` does: the environments' contract on a task, as a report that a person reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from actors.contract import examine
from actors.environment import Environment, Profile, make
from gsa.errors import UsageError


def check_env(task: str, seed: int, steps: int, render: Profile, image: Path | None, imports: Sequence[str]) -> int:
    """Prints what every check found; writes the first image if asked to. 1 if a check failed."""
    made = functools.partial(make, task, render, imports)
    if image is not None:
        _write_image(made, seed, image)
    failed = 0
    for finding in examine(made, seed, steps or None):
        failed += not finding.ok
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:15} {finding.text}", flush=True)
    print(f"{task}: {f'{failed} checks failed' if failed else 'all checks passed'}.")
    return int(failed > 0)


def _write_image(make: Callable[[], Environment], seed: int, path: Path) -> None:
    from matplotlib.image import imsave

    with make() as environment:
        observation = environment.reset(seed)
        images = [observation[name] for name, spec in environment.spec.observation.items() if spec.is_image]
        if not images:
            raise UsageError(f"{environment.task.name} observes no image.")
    imsave(path, np.hstack(images))
