"""How collecting scales with workers and environments, and what memory they take.

Workers are real `EnvWorker`s in processes of their own, with their environments in processes of theirs, as in a run;
the acting networks are a toy, so that the system is measured and not the size of a policy. Leases are endless and
episodes are thrown away: replay has a benchmark of its own.

latency   An environment that sleeps 20 ms a step, in layouts of workers × environments. Beside each layout stands one
          worker with one environment. They collect in turns, a few seconds each, several times: `of_linear` is the
          median over these rounds of the layout's agent steps/s over as many times those of the one worker in the same
          round, so that the machine's moods fall on both. `cpu_ms` is the time of cores that a step took, of worker
          (`worker_cpu_ms`) and environment together.
          How long can it be linear? `demand` is the share of all cores that the layout would use at the linear rate:
          cpu_ms × environments × the one worker's rate / cores. Above 1 no program could be linear. Somewhat below, a
          step that finds every core taken has to wait its turn: on c cores with independent arrivals that happens at
          a share C of all steps (Erlang's formula; `must_wait`), whatever the program. A layout with C above half is
          past saturation: there is no goal of linearity for it but that it keeps the cores in use, `busy` (of all that
          runs on the machine) at least 90 % of what it is worth: min(demand, 1). The goal for all others is 95 %.
compute   An environment that computes for about 5 ms a step. The rate of as many workers as there are cores over the
          cores times one worker's, in turns as above; the goal is 90 %. `bare` is the environment alone, once and once
          a core: what the cores themselves give.
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
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.slow import EPISODE, TASKS, calibrated

LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (64, 1), (1, 4), (1, 16), (2, 16), (4, 16))
SETTLE_S = 0.5
MAX_WAIT = 0.5  # share of steps that have to wait for a core, above which cores are taken for saturated


def main() -> int:
    from benchmarks import harness

    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2], int(sys.argv[3]))
    if sys.argv[1:2] == ["bare"]:
        return bare()
    options = harness.arguments(__doc__)
    cores, seconds, rounds = len(os.sched_getaffinity(0)), *((1.5, 1) if options.quick else (3.0, 5))
    os.environ["GSA_BENCH_ROUNDS"] = str(calibrated())
    layouts = ((1, 1), (1, 4), (2, 4)) if options.quick else LAYOUTS
    latency = [scaled(*layout, cores, seconds, rounds) for layout in layouts]
    computing = computed(cores, seconds, rounds)
    runs = [whole_run(*layout) for layout in (((1, 4),) if options.quick else ((2, 16), (64, 1)))]
    result = {"cores": cores, "latency": latency, "compute": computing, "runs": runs}
    free = [row["of_linear"] for row in latency if not row["saturated"]]
    full = [row["busy"] / min(row["demand"], 1.0) for row in latency if row["saturated"]]
    goals = {
        "latency_of_linear": harness.at_least(min(free), 0.95),
        "compute_of_cores": harness.at_least(computing["of_cores"], 0.9),
    }
    if full:
        goals["saturated_cores_in_use"] = harness.at_least(min(full), 0.9)
    return harness.finish("workers", result, goals, options)


# ---------------------------------------------------------------------- one process


def worker(task: str, envs: int) -> int:
    """Does what it is told on lines of input, and prints what came of it: `memory`, or how many seconds to collect."""
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
    make = partial(Isolated, task, "fast", ("benchmarks.slow",))
    rollout = Rollout(make, envs, policy, GuidanceConfig("constant(0)"), False, seed=0, lockstep=False)
    weights = MemoryBroadcast()
    tensors = {k: v.numpy() for k, v in policy._nets.state_dict().items()}
    weights.publisher().publish(WeightSnapshot(0, tensors))
    collecting = EnvWorker("worker", rollout, Endless(), weights.subscriber(), None)
    while not collecting.stats().get("worker/agent_steps"):
        collecting.tick()
    processes = [host._process.pid for host in rollout.hosts]  # type: ignore[attr-defined]
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "memory\n":
            found = {"worker_mb": pss_mb(os.getpid()), "env_mb": float(np.mean([pss_mb(pid) for pid in processes]))}
        else:
            found = collected(collecting, processes, float(line))
        print(json.dumps(found), flush=True)
    collecting.close()
    return 0


def collected(collecting: Any, processes: Sequence[int], seconds: float) -> dict[str, float]:
    """The rate of `seconds`, and the CPU time of a step. The first steps do not count: they waited for the line."""

    def until(end: float) -> tuple[float, float, float, float]:
        collecting.run(lambda: time.perf_counter() > end)
        steps = collecting.stats()["worker/agent_steps"]
        return steps, time.perf_counter(), time.process_time(), sum(map(cpu_s, processes))

    begun = time.perf_counter() + SETTLE_S
    before = until(begun)
    steps, spent, own, theirs = (b - a for a, b in zip(before, until(begun + seconds), strict=True))
    return {"steps_per_s": steps / spent, "worker_cpu_ms": 1e3 * own / steps, "cpu_ms": 1e3 * (own + theirs) / steps}


class Endless:
    """Leases without end; what is collected is thrown away."""

    def __init__(self) -> None:
        self._episode = 0

    def lease(self, worker: str, held: Collection[int]) -> Any:
        from gsa.schema import Lease

        self._episode += 1
        return Lease(self._episode, EPISODE, 0, False)

    def add(self, worker: str, episode: int, trajectory: object) -> None:
        pass

    def release(self, worker: str, episode: int) -> None:
        raise RuntimeError("an environment of the benchmark failed")


def bare() -> int:
    """The environment alone. Told as `worker` is."""
    environment = gym.make("BenchCompute-v0", render_mode="rgb_array")
    environment.reset(seed=0)
    print("ready", flush=True)
    for line in sys.stdin:
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < float(line):
            if environment.step(np.zeros(4, np.float32))[3]:
                environment.reset()
            steps += 1
        print(json.dumps({"steps_per_s": steps / (time.perf_counter() - started)}), flush=True)
    return 0


# ---------------------------------------------------------------------- many


class Crew:
    """Processes of this benchmark that do nothing until they are told, and then all at once."""

    def __init__(self, count: int, *command: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = (sys.executable, "-m", "benchmarks.workers", *command)
        self._processes = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
        for process in self._processes:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a process of the benchmark did not start")

    def tell(self, line: object) -> list[dict[str, float]]:
        """What each of them printed."""
        for process in self._processes:
            print(line, file=process.stdin, flush=True)
        return [json.loads(process.stdout.readline()) for process in self._processes]

    def rate(self, seconds: float) -> float:
        return sum(row["steps_per_s"] for row in self.tell(seconds))

    def close(self) -> None:
        for process in self._processes:
            process.communicate(timeout=60)


def scaled(workers: int, envs: int, cores: int, seconds: float, rounds: int) -> dict[str, Any]:
    """A layout in turns with one worker of one environment: the row of the table."""
    rows: list[dict[str, float]] = []
    with (
        closing(Crew(1, "worker", TASKS["latency"], "1")) as one,
        closing(Crew(workers, "worker", TASKS["latency"], str(envs))) as many,
    ):
        for _ in range(rounds):
            alone = one.rate(seconds)
            before = cpu_times()
            told = many.tell(seconds)
            used, idle = (b - a for a, b in zip(before, cpu_times(), strict=True))
            row = {name: float(np.mean([each[name] for each in told])) for name in told[0]}
            row |= {"steps_per_s": sum(each["steps_per_s"] for each in told), "one_steps_per_s": alone}
            rows.append(
                row | {"busy": used / (used + idle), "of_linear": row["steps_per_s"] / (workers * envs * alone)}
            )
        memory = many.tell("memory")
    found: dict[str, Any] = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    found["demand"] = found["cpu_ms"] / 1e3 * workers * envs * found["one_steps_per_s"] / cores
    found["must_wait"] = must_wait(found["demand"], cores)
    found["saturated"] = found["must_wait"] > MAX_WAIT
    found |= {name: float(np.mean([each[name] for each in memory])) for name in memory[0]}
    found = {"workers": workers, "envs": envs, **found, "rounds": [round(row["of_linear"], 3) for row in rows]}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def must_wait(demand: float, cores: int) -> float:
    """The share of arrivals that find all of `cores` servers taken, where they are in use to `demand` (Erlang C)."""
    if demand >= 1:
        return 1.0
    blocked = 1.0  # of the arrivals at n servers without a queue (Erlang B)
    for n in range(1, cores + 1):
        blocked = demand * cores * blocked / (n + demand * cores * blocked)
    return blocked / (1 - demand * (1 - blocked))


def computed(cores: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Rates of 1 and of `cores` workers, and of the environment alone, in turns."""
    kinds = {"worker": ("worker", TASKS["compute"], "1"), "bare": ("bare",)}
    with ExitStack() as stack:
        crews = {
            (kind, count): stack.enter_context(closing(Crew(count, *command)))
            for kind, command in kinds.items()
            for count in (1, cores)
        }
        rates = [{key: crew.rate(seconds) for key, crew in crews.items()} for _ in range(rounds)]
    shares = {
        kind: float(np.median([row[kind, cores] / (cores * row[kind, 1]) for row in rates])) for kind in kinds
    }  # fmt: skip
    medians = {f"{kind} × {count}": float(np.median([row[kind, count] for row in rates])) for kind, count in crews}
    return {"steps_per_s": medians, "of_cores": shares["worker"], "bare_of_cores": shares["bare"]}


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, of all its threads: its clock as clock_getcpuclockid(3) names it."""
    return time.clock_gettime(~pid << 3 | 2)


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
            "task": TASKS["latency"], "imports": "benchmarks.slow", "method": "scratch", "model": "tiny",
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
