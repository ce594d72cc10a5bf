"""The fault matrix of one machine: each fault in turn in one real run, and the seconds until it steps and learns again.

A run over Ray and Redis, two workers, on an environment that counts its steps and stamps each with the time. Once all
is well a fault is injected. Measured from the injection: the next step of any environment; when all environments step
again; the next update after which the learner's count rises, as the log tells once a second. After the driver's end,
and after SIGTERM, these include the start of Ray under --resume; after a service that hangs they are from its end on,
and how long it was given is told apart. What the run printed about the fault is kept beside.
The clock is set back by 30 days in every Python process of the run. Under memory pressure a worker gets no more memory,
by its resource limit, and asks for some in its next step. Where mounting is permitted the run lies on a small disk,
which is filled up: the run ends with a sentence, and goes on once there is room. In the end: every step of the budget,
once and in order, one row of the log for each episode.

Beside it the pause that a checkpoint costs the training: updates of a learner's loop, a checkpoint taken between two
of them and written by the thread beside them, for two sizes.

    python -m benchmarks.faults [--quick] [--save]
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.soak import checked
from deploy.config import FinetuneConfig
from deploy.redis_server import find_binary
from gsa import config as configs
from gsa.metrics import read_log
from tests.processes import alive, children, wait_for

DEFAULTS = FinetuneConfig("gym/Any-v0", method="scratch")
WORKERS, ENV_TIMEOUT_S, DISK_MB = 2, 3.0, 400
BUDGET, QUICK_BUDGET = 10_000, 1_000  # agent steps, some 20 a second
DEADLINE_S = 300.0  # for a run to be as before; the fault counts as not survived after it
SAYS_S = 90.0  # for the run to say what it did
STOP_S, STEP_S, HUNG_S, PAUSE_PERCENT = 30.0, 90.0, 240.0, 0.1  # goals
RECOVERY = ("next_step_s", "all_steps_s", "next_update_s")
CLOCK = """import os, time
right = time.time
time.time = lambda: right() - 30 * 86_400 * os.path.exists(os.environ["GSA_TEST_CLOCK"])
"""


class Drill:
    """Owns the run, the process of its driver and what it printed."""

    def __init__(self, folder: Path, disk: Path | None, budget: int) -> None:
        self.disk, self.out, self.stamps = disk, (disk or folder) / "run", folder / "stamps"
        self.log, self.clock, self._shim = folder / "log", folder / "clock", folder / "shim"
        self.stamps.mkdir()
        self._shim.mkdir()
        (self._shim / "sitecustomize.py").write_text(CLOCK)
        settings = FinetuneConfig(
            task="gym/Stamped-v0", imports=("tests.gym_counting",), method="scratch", out=self.out, model="tiny",
            budget_frames=budget, warmup_frames=200, batch=4, length=8, train_ratio=4.0, workers=WORKERS,
            env_timeout_s=ENV_TIMEOUT_S, imagination_starts=16, eval_every_frames=10**6, final_episodes=1,
            redis_url=None, guide="tests.guides:greedy", checkpoint_every_frames=200, checkpoint_every_s=60.0,
        )  # fmt: skip
        configs.save(settings, folder / "config.yaml")
        self.process = self._start("--config", str(folder / "config.yaml"))

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "PYTHONPATH": f"{self._shim}:{os.getcwd()}", "OMP_NUM_THREADS": "1",
            "GSA_TEST_STAMPS": str(self.stamps), "GSA_TEST_CLOCK": str(self.clock),
        }  # fmt: skip
        environment.pop("GSA_REDIS_URL", None)
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "deploy.cli", "finetune", *arguments]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def resume(self) -> None:
        self.process = self._start("--resume", str(self.out))

    def parts(self, name: str) -> list[int]:
        return children(self.process.pid, name)

    def steps_since(self, since: float) -> dict[int, float]:
        """Living environment processes that have stepped after `since`, and when they first did."""
        first = {}
        for path in self.stamps.iterdir():
            data = path.read_bytes()
            stamps = np.frombuffer(data[: len(data) // 8 * 8])
            after = stamps[np.searchsorted(stamps, since, "right") :]
            if len(after) and alive(int(path.name)):
                first[int(path.name)] = float(after[0])
        return first

    def rows(self) -> list[dict[str, Any]]:
        """The log's rows of the learner, but for one that is just being written."""
        rows = read_log(self.out) if (self.out / "metrics.jsonl").exists() else []
        return [row for row in rows if "learner/updates" in row]

    def calm(self) -> bool:
        """Waits until every environment steps, the learner learns and there are two checkpoints."""
        since, learned = time.monotonic(), len(self.rows())

        def as_it_should_be() -> bool:
            saved = len(list((self.out / "checkpoints").glob("checkpoint-*"))) >= 2
            return saved and len(self.steps_since(since)) >= WORKERS and len(self.rows()) >= learned + 2

        return wait_for(self.process, as_it_should_be, DEADLINE_S)

    def recovery(self, since: float, ended: bool) -> dict[str, float | None]:
        """Seconds from `since` until a step, until all environments step, and until an update. `ended`: by a new
        driver, whose rows alone count."""
        before = self.rows()
        found: dict[str, float] = {}
        gone = set() if not ended else set(self.steps_since(0.0))

        def as_before() -> bool:
            steps = {pid: at for pid, at in self.steps_since(since).items() if pid not in gone}
            if steps:
                found.setdefault("next_step_s", min(steps.values()) - since)
            if len(steps) >= WORKERS:
                found.setdefault("all_steps_s", sorted(steps.values())[WORKERS - 1] - since)
            updates = [row["learner/updates"] for row in self.rows()[len(before) + (not ended) :]]
            if any(b > a for a, b in itertools.pairwise(updates)):
                found.setdefault("next_update_s", time.monotonic() - since)
            return len(found) == len(RECOVERY)

        wait_for(self.process, as_before, DEADLINE_S)
        return {name: round(found[name], 1) if name in found else None for name in RECOVERY}

    def said(self, since: int) -> list[str]:
        """What the run printed about its parts after so many bytes of its log."""
        lines = self.log.read_bytes()[since:].decode(errors="replace").splitlines()
        return [line for line in lines if re.match(r"(worker-\d+|the [a-z ]+|gsa):", line)]


def kill(name: str, every: bool = False, by: signal.Signals = signal.SIGKILL) -> Callable[[Drill], None]:
    """A fault: a signal to the first or to every process whose title has `name`."""

    def inject(drill: Drill) -> None:
        found = drill.parts(name)
        for pid in found if every else found[:1]:
            os.kill(pid, by)

    return inject


def hang(name: str) -> Callable[[Drill], dict[str, Any]]:
    """A fault: a service is stopped, not ended. How long it takes until the run has killed it."""

    def fault(drill: Drill) -> dict[str, Any]:
        started, hung = time.monotonic(), drill.parts(f"ray::{name}")[0]
        os.kill(hung, signal.SIGSTOP)
        wait_for(drill.process, lambda: not alive(hung), DEADLINE_S)
        return {"killed_after_s": round(time.monotonic() - started, 1)}

    return fault


def stop_an_environment(drill: Drill) -> None:
    os.kill(min(drill.steps_since(time.monotonic() - 2)), signal.SIGSTOP)  # one that a worker steps


def damage_and_kill_learner(drill: Drill) -> None:
    newest = max((drill.out / "checkpoints").glob("checkpoint-*"))
    os.truncate(newest / "tensors.safetensors", 1000)
    kill("LearnerActor")(drill)


def no_more_memory(drill: Drill) -> None:
    pid = drill.parts("GSAEnvRunner")[0]
    resource.prlimit(pid, resource.RLIMIT_DATA, (1 << 20, resource.prlimit(pid, resource.RLIMIT_DATA)[1]))


def fill_disk(drill: Drill) -> None:
    assert drill.disk is not None
    with (drill.disk / "ballast").open("wb") as file:
        while free := shutil.disk_usage(drill.disk).free:
            try:
                file.write(bytes(min(free, 1 << 20)))
                file.flush()
            except OSError:
                break


def end_driver(inject: Callable[[Drill], None]) -> Callable[[Drill], dict[str, Any]]:
    """A fault that the driver does not outlive: how long it takes to end, and its exit code. Then the run goes on."""

    def fault(drill: Drill) -> dict[str, Any]:
        started = time.monotonic()
        inject(drill)
        code = drill.process.wait(DEADLINE_S)
        ended = round(time.monotonic() - started, 1)
        if drill.disk is not None:
            (drill.disk / "ballast").unlink(missing_ok=True)
        drill.resume()
        return {"exit_code": code, "ended_after_s": ended}

    return fault


Fault = Callable[[Drill], dict[str, Any] | None]
BACK, REDIS = "back after", "was started again"
FAULTS: dict[
    str, tuple[Fault, str]
] = {  # and what the run says in the end; "": nothing, as nothing fails or nobody is left
    "worker killed": (kill("GSAEnvRunner"), BACK),
    "all workers killed": (kill("GSAEnvRunner", every=True), BACK),
    "replay service killed": (kill("ReplayActor"), BACK),
    "learner killed": (kill("LearnerActor"), BACK),
    "Redis killed": (kill(Path(find_binary()).name), REDIS),
    "environment hangs": (stop_an_environment, "no answer within"),
    "worker without memory": (no_more_memory, BACK),
    "newest checkpoint damaged, learner killed": (damage_and_kill_learner, "is damaged"),
    "clock set back 30 days": (lambda drill: drill.clock.touch(), ""),
    "Redis hangs": (kill(Path(find_binary()).name, by=signal.SIGSTOP), REDIS),
    "replay service hangs": (hang("ReplayActor"), BACK),
    "learner hangs": (hang("LearnerActor"), BACK),
    "driver told to stop (SIGTERM)": (end_driver(lambda drill: drill.process.terminate()), "to go on"),
    "driver killed": (end_driver(lambda drill: drill.process.kill()), ""),
    "disk full": (end_driver(fill_disk), "Free some space"),
}
QUICK = ("worker killed", "learner killed", "driver told to stop (SIGTERM)")


def drill(folder: Path, disk: Path | None, quick: bool) -> dict[str, Any]:
    """Every fault in turn, then the run to its end."""
    budget = QUICK_BUDGET if quick else BUDGET
    run, rows = Drill(folder, disk, budget), {}
    try:
        for name, (fault, says) in FAULTS.items():
            if (quick and name not in QUICK) or (name == "disk full" and disk is None):
                continue
            if not run.calm():
                raise SystemExit(f"The run was not well before '{name}': {run.log.read_text()[-3000:]}")
            started, printed = time.monotonic(), run.log.stat().st_size
            about = fault(run) or {}
            recovered = run.recovery(started + about.get("killed_after_s", 0.0), "exit_code" in about)
            is_told = wait_for(run.process, lambda: not says or says in "".join(run.said(printed)), SAYS_S)  # noqa: B023
            rows[name] = {**about, **recovered, "told": is_told, "said": run.said(printed)}
            print(f"{name:42} {told(rows[name])}", file=sys.stderr)
        code = run.process.wait(2 * BUDGET)
        return {"faults": rows, "exit": code, **checked(run.out, budget)}
    finally:
        run.process.kill()


def told(row: dict[str, Any]) -> str:
    numbers = {k: v for k, v in row.items() if k not in ("said", "told")}
    return "  ".join(f"{k} {v}" for k, v in numbers.items()) + "".join(f"\n    {line}" for line in row["said"])


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of DISK_MB of its own in `folder`; None, aloud, where mounting is not permitted."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        print("The full disk is left out: mounting a small one is not permitted here.", file=sys.stderr)
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def checkpoint_pause(size: str, batch: int, length: int, saves: int) -> dict[str, Any]:
    """What checkpoints cost a learner: the pause for each, and how much slower updates are while one is written."""
    from benchmarks.rivals import Case, ours
    from deploy.checkpointing import RunCheckpoints

    case = Case(size, batch, length)
    tuner, data = ours.tuner(case), ours.batch(case)
    tuner.update(data)
    pauses: list[float] = []
    writing: list[float] = []
    alone: list[float] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pause-") as folder:
        checkpoints = RunCheckpoints(Path(folder), DEFAULTS)
        for step in range(saves):
            started = time.perf_counter()
            checkpoints.save(step, {"tuner": tuner.state()})
            pauses.append(time.perf_counter() - started)
            for times in (writing, alone):
                started = time.perf_counter()
                tuner.update(data)
                times.append(time.perf_counter() - started)
                checkpoints.flush()
            seconds.append(checkpoints.stats()["checkpoint/write_s"])
        size_mb = sum(f.stat().st_size for f in max(Path(folder).glob("*/checkpoint-*")).iterdir()) / 1e6
    median = {k: float(np.median(v)) for k, v in {"p": pauses, "w": writing, "a": alone, "s": seconds}.items()}
    return {
        "batch": batch, "length": length, "checkpoint_mb": round(size_mb, 1), "pause_ms": round(1e3 * median["p"], 1),
        "write_s": round(median["s"], 3), "update_s": round(median["a"], 3),
        "update_while_writing_s": round(median["w"], 3),
    }  # fmt: skip


def main() -> int:
    options = harness.arguments(__doc__)
    sizes = [("tiny", 16, 64, 3 if options.quick else 9)]
    sizes += [] if options.quick else [("reference-small", 8, 32, 5)]
    pauses = {size: checkpoint_pause(size, *rest) for size, *rest in sizes}
    print(*pauses.items(), sep="\n", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="faults-") as name, small_disk(Path(name)) as disk:
        result = drill(Path(name), disk, options.quick)
    return harness.finish("faults", {**result, "checkpoint": pauses}, goals(result, pauses), options)


def goals(result: dict[str, Any], pauses: dict[str, Any]) -> dict[str, Any]:
    rows, every_s = result["faults"], DEFAULTS.checkpoint_every_s
    exact = {name: result[name] for name in ("missing_steps", "disordered", "log_rows_wrong", "exit")}
    worst = max(DEADLINE_S if row[k] is None else row[k] for row in rows.values() for k in RECOVERY)
    found = {name: {"value": value, "goal": "== 0", "holds": value == 0} for name, value in exact.items()}
    found["slowest_recovery_s"] = harness.at_most(worst, STEP_S)
    if hung := [row["killed_after_s"] for row in rows.values() if "killed_after_s" in row]:
        found["hung_service_killed_s"] = harness.at_most(max(hung), HUNG_S)
    stop = rows["driver told to stop (SIGTERM)"]
    found["sigterm_s"] = harness.at_most(stop["ended_after_s"], STOP_S)
    found["sigterm_exit_code"] = {"value": stop["exit_code"], "goal": "== 143", "holds": stop["exit_code"] == 143}
    silent = [name for name, row in rows.items() if not row["told"]]
    found["faults_not_told"] = {"value": silent, "goal": "none", "holds": not silent}
    for size, row in pauses.items():
        found[f"{size}_pause_percent_of_time"] = harness.at_most(row["pause_ms"] / 1e3 / every_s * 100, PAUSE_PERCENT)
    return found


if __name__ == "__main__":
    sys.exit(main())
