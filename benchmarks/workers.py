"""How collecting scales with workers and environments, and what memory they take.

Workers are real `EnvWorker`s in processes of their own, with their environments in processes of theirs, as in a run;
the acting networks are a toy, so that the system is measured and not the size of a policy. Leases are endless and
episodes are thrown away: replay has a benchmark of its own.

latency   An environment that sleeps 20 ms a step. For layouts of workers × environments: agent steps/s over as many
          times those of 1 × 1, and how busy all cores were. The goal is 95 % of linear wherever they were less than
          90 % busy.
compute   An environment that computes for about 5 ms a step. The rate of as many workers as there are cores over the
          cores times one worker's; the goal is 90 %. `bare` is the environment alone, once and once a core: what the
          cores themselves give.
run       The same latency in whole runs over Ray, Redis and the replay service, with the memory of their workers.

Memory is proportional set size: pages that processes share are counted once between them.

    python -m benchmarks.workers [--quick] [--save]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

LATENCY_S, COMPUTE_S, EPISODE = 0.02, 0.005, 500
TASKS = {"latency": "gym/BenchLatency-v0", "compute": "gym/BenchCompute-v0"}
LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (64, 1), (1, 4), (1, 16), (2, 16), (4, 16))
BUSY = 0.9  # cores busier than this are taken for saturated


class Slow(gym.Env):
    """An image of noise after a step that sleeps or computes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, sleep_s: float = 0.0, rounds: int = 0, render_mode: str | None = None) -> None:
        self.render_mode, self._sleep_s, self._rounds = render_mode, sleep_s, rounds
        self._image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._image, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._rounds:
            compute(self._rounds)
        else:
            time.sleep(self._sleep_s)
        return self._image, 0.0, False, False, {}

    def render(self) -> np.ndarray:
        return self._image


def compute(rounds: int) -> None:
    """Work that stays in the core's own cache."""
    values = np.arange(2000.0)
    for _ in range(rounds):
        values = np.sqrt(values + 1.0)


ROUNDS = int(os.environ.get("GSA_BENCH_ROUNDS", "1000"))  # of `compute` in a step, as the benchmark measured them
gym.register("BenchLatency-v0", Slow, max_episode_steps=EPISODE, kwargs={"sleep_s": LATENCY_S})
gym.register("BenchCompute-v0", Slow, max_episode_steps=EPISODE, kwargs={"rounds": ROUNDS})


def main() -> int:
    from benchmarks import harness

    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    if sys.argv[1:2] == ["bare"]:
        return bare(float(sys.argv[2]))
    options = harness.arguments(__doc__)
    cores, seconds = os.cpu_count() or 1, 2.0 if options.quick else 5.0
    os.environ["GSA_BENCH_ROUNDS"] = str(calibrated())
    layouts = ((1, 1), (1, 4), (2, 4)) if options.quick else LAYOUTS
    latency = [measured("latency", *layout, seconds) for layout in layouts]
    one = latency[0]["steps_per_s"]
    for row in latency:
        row["of_linear"] = row["steps_per_s"] / (row["workers"] * row["envs"] * one)
    computing = {str(n): median("compute", n, seconds, 1 if options.quick else 3) for n in (1, cores)}
    alone = {str(n): sum(lines([["bare", str(seconds)]] * n, "steps_per_s")) for n in (1, cores)}
    free = [row["of_linear"] for row in latency if row["busy"] < BUSY]
    share = computing[str(cores)] / (cores * computing["1"])
    result = {
        "latency": latency, "compute": computing, "bare": alone, "cores": cores,
        "bare_share": alone[str(cores)] / (cores * alone["1"]),
        "runs": [whole_run(*layout) for layout in (((1, 4),) if options.quick else ((2, 16), (64, 1)))],
    }  # fmt: skip
    goals = {
        "latency_of_linear": harness.at_least(min(free, default=0.0), 0.95),  # 0: others kept all cores busy
        "compute_of_cores": harness.at_least(share, 0.9),
    }
    return harness.finish("workers", result, goals, options)


# ---------------------------------------------------------------------- one process


def worker(task: str, envs: int, seconds: float) -> int:
    """Says that it is ready, waits for a line, collects for so long, prints what it did."""
    from functools import partial

    import torch

    from actors.guidance import GuidanceConfig
    from actors.hosting import Isolated
    from actors.rollout import Rollout
    from actors.worker import EnvWorker
    from gsa.agent.policy import GuidedPolicy
    from gsa.agent.sizes import BehaviourConfig, WorldModelConfig
    from gsa.broadcast import MemoryBroadcast
    from gsa.schema import WeightSnapshot

    torch.set_num_threads(1)
    small = WorldModelConfig(deter=16, hidden=8, stoch=4, classes=4, depth=2, blocks=4, max_action_dim=4)
    behaviour = BehaviourConfig(units=16, actor_layers=1, critic_layers=1, reward_layers=1)
    policy = GuidedPolicy(small, behaviour, 4, envs)
    make = partial(Isolated, task, "fast", ("benchmarks.workers",))
    rollout = Rollout(make, envs, policy, GuidanceConfig("constant(0)"), False, seed=0, lockstep=False)
    weights = MemoryBroadcast()
    tensors = {k: v.numpy() for k, v in policy._nets.state_dict().items()}
    weights.publisher().publish(WeightSnapshot(0, tensors))
    collecting = EnvWorker("worker", rollout, Endless(), weights.subscriber(), None)
    while not collecting.stats().get("worker/agent_steps"):
        collecting.tick()
    print("ready", flush=True)
    sys.stdin.readline()
    before, started = collecting.stats()["worker/agent_steps"], time.perf_counter()
    collecting.run(lambda: time.perf_counter() - started > seconds)
    rate = (collecting.stats()["worker/agent_steps"] - before) / (time.perf_counter() - started)
    environments = [pss_mb(host._process.pid) for host in rollout.hosts]  # type: ignore[attr-defined]
    print(json.dumps({"steps_per_s": rate, "worker_mb": pss_mb(os.getpid()), "env_mb": environments}), flush=True)
    sys.stdin.readline()  # memory is looked at while all are there
    collecting.close()
    return 0


class Endless:
    """Leases without end; what is collected is thrown away."""

    def __init__(self) -> None:
        self._episode = 0

    def lease(self, worker: str) -> Any:
        from gsa.schema import Lease

        self._episode += 1
        return Lease(self._episode, EPISODE, 0, False)

    def add(self, worker: str, episode: int, trajectory: object) -> None:
        pass

    def release(self, worker: str, episode: int) -> None:
        raise RuntimeError("an environment of the benchmark failed")


def bare(seconds: float) -> int:
    """The environment alone."""
    environment = gym.make("BenchCompute-v0", render_mode="rgb_array")
    environment.reset(seed=0)
    print("ready", flush=True)
    sys.stdin.readline()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        if environment.step(np.zeros(4, np.float32))[3]:
            environment.reset()
        steps += 1
    print(json.dumps({"steps_per_s": steps / (time.perf_counter() - started)}), flush=True)
    sys.stdin.readline()
    return 0


# ---------------------------------------------------------------------- many


def together(commands: Sequence[Sequence[str]]) -> tuple[list[dict[str, Any]], float]:
    """Runs processes side by side, released at once. What each printed, and the share of all cores in use meanwhile."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "benchmarks.workers"]
    processes = [subprocess.Popen([*command, *rest], **pipes) for rest in commands]  # type: ignore[call-overload]
    try:
        for process in processes:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a worker of the benchmark did not start")
        before = cpu_times()
        for process in processes:
            print(file=process.stdin, flush=True)
        printed = [json.loads(process.stdout.readline()) for process in processes]
        spent = [b - a for a, b in zip(before, cpu_times(), strict=True)]
        return printed, spent[0] / sum(spent)
    finally:
        for process in processes:
            process.communicate("\n", timeout=60)


def lines(commands: Sequence[Sequence[str]], name: str) -> list[float]:
    return [row[name] for row in together(commands)[0]]


def measured(kind: str, workers: int, envs: int, seconds: float) -> dict[str, Any]:
    rows, busy = together([["worker", TASKS[kind], str(envs), str(seconds)]] * workers)
    found = {
        "workers": workers, "envs": envs, "steps_per_s": sum(row["steps_per_s"] for row in rows), "busy": busy,
        "worker_mb": float(np.mean([row["worker_mb"] for row in rows])),
        "env_mb": float(np.mean([mb for row in rows for mb in row["env_mb"]])),
    }  # fmt: skip
    print(kind, json.dumps(found), file=sys.stderr, flush=True)
    return found


def median(kind: str, workers: int, seconds: float, rounds: int) -> float:
    return float(np.median([measured(kind, workers, 1, seconds)["steps_per_s"] for _ in range(rounds)]))


def calibrated() -> int:
    """Rounds of `compute` that take COMPUTE_S on this machine."""
    rounds, spent = 100, []
    for _ in range(30):
        started = time.perf_counter()
        compute(rounds)
        spent.append(time.perf_counter() - started)
    return max(1, round(rounds * COMPUTE_S / float(np.median(spent))))


def cpu_times() -> tuple[float, float]:
    """Time in use and idle, over all cores since the machine started."""
    fields = [float(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle = fields[3] + fields[4]
    return sum(fields[:8]) - idle, idle


def pss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


# ---------------------------------------------------------------------- a whole run


def whole_run(workers: int, envs: int) -> dict[str, float]:
    """A run over Ray that hardly learns: its rate of steps, and the memory of its workers and environments."""
    steps = max(40, 4 * workers * envs) * EPISODE
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "task": TASKS["latency"], "imports": "benchmarks.workers", "method": "scratch", "model": "tiny",
            "workers": workers, "envs": envs, "budget-frames": steps, "warmup-frames": steps - 2 * EPISODE,
            "warmup-episodes": 1, "train-ratio": 0.1, "eval-every-frames": 10**9, "final-episodes": 1, "batch": 2,
            "length": 16, "out": f"{folder}/run",
        }  # fmt: skip
        command = [sys.executable, "-m", "deploy.cli", "finetune"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                rates, memory = watched(process, Path(folder, "run"))
            finally:
                process.terminate()
                process.wait(120)
        if not rates:
            raise RuntimeError(Path(folder, "log").read_text()[-2000:])
    return {"workers": workers, "envs": envs, "steps_per_s": float(np.median(rates)), **memory}


def watched(process: subprocess.Popen, run: Path) -> tuple[list[float], dict[str, float]]:
    """The rates that the run logged while all worked, and memory seen after the first minute or the last row."""
    from gsa.metrics import read_log

    rates: list[float] = []
    memory: dict[str, float] = {}
    while process.poll() is None and len(rates) < 12:
        time.sleep(2.0)
        rows = read_log(run) if (run / "metrics.jsonl").exists() else []
        rates = [r["worker/agent_steps_per_s"] for r in rows if r.get("worker/agent_steps_per_s")][2:]
        if rates:
            memory = {"worker_mb": mean_pss("ray::GSAEnvRunner"), "env_mb": mean_pss("actors.env_process")}
    return rates, memory


def mean_pss(title: str) -> float:
    def of(folder: Path, read: Callable[[int], float]) -> float | None:
        try:
            named = title in (folder / "cmdline").read_text().replace("\0", " ")
            return read(int(folder.name)) if named else None
        except (OSError, StopIteration):
            return None

    found = [of(f, pss_mb) for f in Path("/proc").iterdir() if f.name.isdigit()]
    return float(np.mean([mb for mb in found if mb is not None] or [0.0]))


if __name__ == "__main__":
    sys.exit(main())
