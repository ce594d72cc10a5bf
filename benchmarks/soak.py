"""Hours of runs whose parts are killed about every minute: nothing may be lost, repeated, reordered, leaked or left.

Runs over Ray and Redis on an environment that counts its steps, one after another until the time is over. About every
minute one part, drawn at random, is killed by SIGKILL: a worker, all workers, the replay service, the learner, the
evaluator, Redis (it starts again, empty), or the driver and all of Ray with it (gone on with by --resume).
After the time the last run is left in peace to its end. Of every run: the budget is collected exactly, each episode is
whole and in order, and each has one row in the log. Memory: the anonymous memory of every process of a run, sampled
every ten seconds; the slope is that of a regression over time with an intercept for each process, and its 95 %
interval, from five minutes of its age on: until then allocators and caches fill. In the end: no process that carries
the mark of this soak, no new shared memory under the names that a run's processes give it, no key in Redis that stays
for more than a minute.

--peace STEPS does another thing: one run of so many steps (45,000: a good hour) in which nothing is killed, recorded as
soak-peace. Only there do processes live long enough to tell what fills once from what grows for ever: the slope is
taken from twenty minutes of age on, and that of each quarter of an hour is told beside it.

    python -m benchmarks.soak [--quick] [--save] [--hours 2] [--peace STEPS]
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import redis

from benchmarks import harness
from deploy.config import FinetuneConfig
from deploy.redis_server import EmbeddedRedis
from gsa import config as configs
from gsa.metrics import read_log
from gsa.redis_link import GRACE_S
from retrieval.store import TrajectoryStore
from tests.gym_counting import STEPS, Counting
from tests.processes import alive, children, start

gym.register("Soak-v0", Counting, max_episode_steps=STEPS, kwargs={"pause_s": 0.1})

MARK = "GSA_SOAK"
WORKERS, BUDGET, SEED = 2, 12_000, 0  # agent steps: some fifteen minutes a run
SHARED = ("plasma", "ray", "torch_", "psm_", "sem.")
KILL_EVERY_S, SAMPLE_EVERY_S, YOUNG_S, QUARTER_S = 60.0, 10.0, 300.0, 900.0
SETTLED_S = 1200.0  # of age: in a run that is left in peace
PARTS = {  # what is killed: the title of its processes, and how often it is drawn
    "a worker": ("GSAEnvRunner", 4), "all workers": ("GSAEnvRunner", 1), "replay": ("ReplayActor", 2),
    "learner": ("LearnerActor", 2), "evaluator": ("EvaluatorActor", 1), "redis": ("", 2), "driver": ("", 2),
}  # fmt: skip


class Soak:
    """Owns the server, the run under way and what was counted so far."""

    def __init__(self, folder: Path, end: float, every_s: float, budget: int) -> None:
        self.folder, self.end, self.every_s, self.budget = folder, end, every_s, budget
        self.mark, self.rng = secrets.token_hex(8), random.Random(SEED)
        self.redis = EmbeddedRedis()
        self.kills: Counter[str] = Counter()
        self.recovered: list[tuple[str, float]] = []  # seconds from a kill to the next step collected
        self.memory: list[tuple[int, str, float, float]] = []  # process, its part, time and megabytes
        self.runs: list[dict[str, Any]] = []
        self._born: dict[int, float] = {}

    def run(self, number: int) -> None:
        """One run to its end, with kills while there is time."""
        out = self.folder / f"run{number}"
        settings = FinetuneConfig(
            task="gym/Soak-v0", imports=("benchmarks.soak",), method="scratch", out=out, model="tiny", seed=number,
            budget_frames=self.budget, warmup_frames=200, batch=4, length=8, train_ratio=4.0, workers=WORKERS,
            imagination_starts=16, eval_every_frames=4000, eval_episodes=1, final_episodes=1, redis_url=self.redis.url,
            checkpoint_every_frames=1000, checkpoint_every_s=60.0,
        )  # fmt: skip
        file = self.folder / f"run{number}.yaml"
        configs.save(settings, file)
        process, next_kill, next_sample = self._start(["--config", str(file)]), self._next(), time.time()
        awaited: tuple[str, float, float] | None = None
        drivers = 1
        while process.poll() is None:
            time.sleep(0.5)
            now, steps = time.time(), _collected(out)
            if awaited is not None and steps > awaited[2]:
                self.recovered.append((awaited[0], now - awaited[1]))
                awaited = None
            if now >= next_sample:
                self._sample(process.pid)
                next_sample = now + SAMPLE_EVERY_S
            if now >= next_kill and now < self.end and 0 < steps < self.budget:
                part = self._kill(process)
                awaited, next_kill = awaited or (part, now, steps), self._next()
                if part == "driver":
                    process.wait()
                    process, drivers = self._start(["--resume", str(out)]), drivers + 1
        log = self.folder / "log"
        self.runs.append({"exit": process.returncode, "drivers": drivers, **checked(out, self.budget)})
        if process.returncode:
            print(log.read_text()[-4000:], file=sys.stderr)

    def leaks(self, shared_memory: set[str]) -> dict[str, int]:
        """What is left when all is over."""
        deadline = time.time() + 60
        while (left := marked(self.mark)) and time.time() < deadline:
            time.sleep(1)
        client = redis.Redis.from_url(self.redis.url)
        keys = client.scan_iter("gsa:*")
        lasting = [key for key in keys if (left_s := client.ttl(key)) == -1 or left_s > GRACE_S]
        return {
            "processes": len(left),
            "shared_memory_files": len(_shared_memory() - shared_memory),
            "lasting_redis_keys": len(lasting),
        }

    def slope(self, part: str = "", age: tuple[float, float] = (YOUNG_S, math.inf)) -> dict[str, float | None]:
        """Megabytes an hour that a process grows by, with its 95 % interval; None where too little was sampled. Of all
        processes, or of those of one part; while they are as old as `age` says, in seconds."""
        data = [
            (pid, t, mb)
            for pid, of, t, mb in self.memory
            if age[0] < t - self._born[pid] <= age[1] and part in ("", of)
        ]
        if len(data) < 10:
            return {"mb_per_hour": None, "low": None, "high": None, "samples": len(data)}
        pids = np.array([pid for pid, *_ in data])
        x, y = np.array([t / 3600 for _, t, _ in data]), np.array([mb for *_, mb in data])
        for pid in np.unique(pids):  # an intercept for each process
            own = pids == pid
            x[own] -= x[own].mean()
            y[own] -= y[own].mean()
        slope = float(x @ y / (x @ x))
        spread = np.sqrt(((y - slope * x) ** 2).sum() / max(len(x) - len(np.unique(pids)) - 1, 1) / (x @ x))
        low, high = slope - 1.96 * spread, slope + 1.96 * spread
        return {"mb_per_hour": slope, "low": float(low), "high": float(high), "samples": len(data)}

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        variables = {MARK: self.mark, "GSA_REDIS_URL": self.redis.url}
        return start(self.folder / "log", *arguments, **variables)

    def _next(self) -> float:
        return time.time() + self.rng.expovariate(1 / self.every_s)

    def _kill(self, process: subprocess.Popen[bytes]) -> str:
        part = self.rng.choices(list(PARTS), [weight for _, weight in PARTS.values()])[0]
        if part == "driver":
            process.kill()
        elif part == "redis":
            os.kill(self.redis.pid, signal.SIGKILL)
        else:
            found = children(process.pid, PARTS[part][0])
            for pid in found if part == "all workers" else found[:1]:
                os.kill(pid, signal.SIGKILL)
        self.kills[part] += 1
        return part

    def _sample(self, driver: int) -> None:
        for pid in children(driver):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if match := re.search(r"RssAnon:\s+(\d+)", status):
                self._born.setdefault(pid, time.time())
                part = next((name for name, (needle, _) in PARTS.items() if needle and needle in title), "other")
                self.memory.append((pid, part, time.time(), int(match[1]) / 1e3))


def main() -> int:
    options = harness.arguments(__doc__, {"--hours": 2.0, "--peace": 0.0})
    hours, every_s, budget = (0.02, 20.0, 800) if options.quick else (options.hours, KILL_EVERY_S, BUDGET)
    if options.peace:
        hours, budget = 0.0, int(options.peace)
    shared_memory, started = _shared_memory(), time.time()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), started + 3600 * hours, every_s, budget)
        while not soak.runs or time.time() < soak.end:
            soak.run(len(soak.runs))
            print(json.dumps({"hours": (time.time() - started) / 3600, **soak.runs[-1], "kills": dict(soak.kills)}))
        leaks = soak.leaks(shared_memory)
        soak.redis.close()
    wrong = {key: sum(run[key] for run in soak.runs) for key in ("missing_steps", "disordered", "log_rows_wrong")}
    goals = {
        name: {"value": value, "goal": "== 0", "holds": value == 0}
        for name, value in {**wrong, "failed_runs": sum(r["exit"] != 0 for r in soak.runs), **leaks}.items()
    }
    age = (SETTLED_S if options.peace else YOUNG_S, math.inf)
    parts, slope = sorted({row[1] for row in soak.memory}), soak.slope(age=age)
    goals["memory_slope_mb_per_hour"] = {
        "value": slope["mb_per_hour"], "goal": "interval reaches down to 0, or slope < 5",
        "holds": slope["low"] is None or slope["low"] <= 0 or bool(slope["mb_per_hour"] < 5),
    }  # fmt: skip
    result = {
        "hours": (time.time() - started) / 3600, "runs": soak.runs, "kills": dict(soak.kills),
        "steps": sum(run["steps"] for run in soak.runs), "memory": slope, "seed": SEED,
        "memory_by_part": {part: soak.slope(part, age) for part in parts},
    }  # fmt: skip
    if options.peace:
        starts = np.arange(0.0, time.time() - started, QUARTER_S)
        result["memory_by_quarter"] = {
            part or "all": [soak.slope(part, (start, start + QUARTER_S))["mb_per_hour"] for start in starts]
            for part in ("", *parts)
        }
    else:
        result["seconds_to_next_step"] = _medians(soak.recovered)
    return harness.finish("soak-peace" if options.peace else "soak", result, goals, options)


def _shared_memory() -> set[str]:
    """What is in shared memory under the names that Ray, torch and Python give, whoever put it there."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(SHARED)}


def _collected(run: Path) -> float:
    """Agent steps collected as the last lines of the log have it."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20_000))
            found = re.findall(rb'"replay/collected": ([\d.]+)', file.read())
        return float(found[-1]) if found else 0.0
    except OSError:
        return 0.0


def checked(run: Path, budget: int) -> dict[str, int]:
    """Whether the run has every step once and in order, and each episode once in its log."""
    with TrajectoryStore.open(run / "online") as store:
        trajectories = [store.read(row) for row in store.rows()]
        counts = [t.observation["pixels"][:, 0, 0, 0] for t in trajectories]
        disordered = sum(not np.array_equal(c, np.arange(len(c))) for c in counts)
        steps, twice = sum(map(len, trajectories)), len(trajectories) - len({t.id for t in trajectories})
    rows = [row["episode/steps"] for row in read_log(run) if "episode/steps" in row]
    wrong = abs(len(rows) - len(trajectories)) + int(sum(rows) != steps)
    return {
        "steps": steps, "missing_steps": abs(budget - steps), "disordered": disordered + twice, "log_rows_wrong": wrong,
    }  # fmt: skip


def marked(mark: str) -> list[int]:
    """Living processes that were started under this soak, whoever their parent is now."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if alive(pid)]


def _medians(recovered: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    by_part: dict[str, list[float]] = {}
    for part, seconds in recovered:
        by_part.setdefault(part, []).append(seconds)
    return {p: {"median": float(np.median(s)), "max": max(s), "n": len(s)} for p, s in sorted(by_part.items())}


if __name__ == "__main__":
    sys.exit(main())
