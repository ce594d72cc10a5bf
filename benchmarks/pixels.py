"""Pixel agent steps a second: ours against the stock wrappers, for one task of each of the six embodiments.

`stock` is what a user writes, and what the reference does: dm_control's pixels wrapper (64×64, the same camera) under
an action repeat of 2, and Meta-World through Gymnasium with "rgb_array" (64×64, `corner2`, the rows turned), each
rendering every frame; `stock-once` is the same, but renders only the frame that an agent sees. `fast` and `faithful`
are ours.

Each rival is a process of its own with the environment variables a user has (`fast` sets LP_NUM_THREADS, the others do
not), one environment each. They take turns, a stretch of agent steps under random actions each; resets are not counted.
Ratios are medians over rounds.

    python -m benchmarks.pixels [--quick] [--save]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness

TASKS = (
    "dmc/cartpole-balance", "dmc/acrobot-swingup", "dmc/cheetah-run", "dmc/walker-walk", "dmc/quadruped-walk",
    "metaworld/reach-v3",
)  # fmt: skip
STEPS = {"stock": 10, "stock-once": 20, "faithful": 20, "fast": 90}  # agent steps a turn
GOALS = {"fast": 10.0, "faithful": 1.8}
CAMERA, CAMERA_POSITION_M = "corner2", (0.75, 0.075, 0.7)


def main() -> int:
    if sys.argv[1:2] == ["--rival"]:
        return serve(*sys.argv[2:4])
    options = harness.arguments(__doc__)
    rounds, share = (2, 5) if options.quick else (9, 1)
    result: dict[str, Any] = {}
    goals: dict[str, Any] = {}
    for task in TASKS:
        rates = measure(task, rounds, share)
        speedup = {name: round(float(np.median(rates[name] / rates["stock"])), 2) for name in rates}
        result[task] = {
            "agent_steps_per_s": {name: round(float(np.median(r)), 2) for name, r in rates.items()},
            "times_stock": speedup,
        }
        goals |= {f"{name} {task}": harness.at_least(speedup[name], goal) for name, goal in GOALS.items()}
        print(task, result[task], flush=True)
    return harness.finish("pixels", result, goals, options)


def measure(task: str, rounds: int, share: int) -> dict[str, np.ndarray]:
    """Agent steps a second [rounds] of each rival, in turns of STEPS / share."""
    rivals = {name: _Rival(name, task, steps // share) for name, steps in STEPS.items()}
    try:
        rates = np.array([[rival.turn() for rival in rivals.values()] for _ in range(rounds + 1)])[1:]
    finally:
        for rival in rivals.values():
            rival.close()
    return dict(zip(rivals, rates.T, strict=True))


class _Rival:
    """A process that steps one environment when told to."""

    def __init__(self, name: str, task: str, steps: int) -> None:
        self._steps = steps
        environ = {k: v for k, v in os.environ.items() if k != "LP_NUM_THREADS"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.pixels", "--rival", name, task],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ,
        )  # fmt: skip

    def turn(self) -> float:
        """Agent steps a second over one stretch."""
        assert self._process.stdin and self._process.stdout
        print(self._steps, file=self._process.stdin, flush=True)
        return self._steps / float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(rival: str, task: str) -> int:
    """Takes numbers of agent steps from stdin, answers with the seconds they took."""
    reset, step, actions = (stock if rival.startswith("stock") else ours)(rival, task)
    rng = np.random.default_rng(0)
    left = 0
    for line in sys.stdin:
        seconds = 0.0
        for _ in range(int(line)):
            if left == 0:
                reset()
                left = 90  # of the 100 that the shortest episode has
            action = rng.uniform(-1, 1, actions).astype(np.float32)
            started = time.perf_counter()
            step(action)
            seconds += time.perf_counter() - started
            left -= 1
        print(seconds, flush=True)
    return 0


Driven = tuple[Callable[[], object], Callable[[np.ndarray], object], int]


def ours(profile: str, name: str) -> Driven:
    from actors.environment import make

    environment = make(name, profile)  # type: ignore[arg-type]
    return lambda: environment.reset(0), environment.step, environment.task.action_dim


def stock(rival: str, name: str) -> Driven:
    return stock_metaworld(rival, name) if name.startswith("metaworld/") else stock_dmc(rival, name)


def stock_dmc(rival: str, name: str) -> Driven:
    from dm_control import suite
    from dm_control.suite.wrappers import pixels

    domain, task = name.removeprefix("dmc/").split("-", 1)
    camera = {"quadruped": 2}.get(domain, 0)
    environment = suite.load(domain, task, task_kwargs={"random": 0}, environment_kwargs={"flat_observation": True})
    drawn = {"width": 64, "height": 64, "camera_id": camera}
    wrapped = pixels.Wrapper(environment, pixels_only=False, render_kwargs=drawn)

    def every_frame(action: np.ndarray) -> np.ndarray:
        wrapped.step(action)
        return wrapped.step(action).observation["pixels"]

    def once(action: np.ndarray) -> np.ndarray:
        environment.step(action)
        return wrapped.step(action).observation["pixels"]

    return wrapped.reset, once if rival == "stock-once" else every_frame, environment.action_spec().shape[0]


def stock_metaworld(rival: str, name: str) -> Driven:
    import gymnasium
    import metaworld  # noqa: F401  registers its environments

    environment: Any = gymnasium.make(
        "Meta-World/MT1", env_name=name.removeprefix("metaworld/"), render_mode="rgb_array", camera_name=CAMERA,
        width=64, height=64,
    )  # fmt: skip
    environment.unwrapped.model.camera(CAMERA).pos[:] = CAMERA_POSITION_M

    def every_frame(action: np.ndarray) -> np.ndarray:
        environment.step(action)
        environment.render()
        environment.step(action)
        return environment.render()[::-1].copy()

    def once(action: np.ndarray) -> np.ndarray:
        environment.step(action)
        environment.step(action)
        return environment.render()[::-1].copy()

    return environment.reset, once if rival == "stock-once" else every_frame, 4


if __name__ == "__main__":
    sys.exit(main())
