"""The trials of a suite on Ray Tune: which runs when and where, and who is tried again. A trial's work is done by a
process of its own below Tune's, so that it can be stopped, killed and looked at like any run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from deploy.distributed import start_ray
from deploy.suite_config import Resources, Trial
from deploy.trial import STOP, write_json
from gsa.errors import UsageError

LOG = "trial.log"
LOOK_S = 0.5  # between two looks at a trial, or at whether it is to stop
KILLED_S = 60.0  # for the kernel to end a killed trial
SAVE_S = 300.0  # for a trial that was told to stop to be saved
STOPPED, WRONG_USE = 143, 2  # exit codes of a trial's process
PASSED_ON = ("PATH", "PYTHONPATH", "MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS", "GOMP_SPINCOUNT")


class Stop(Protocol):
    """Whether nothing more is to be begun."""

    @property
    def now(self) -> bool: ...


def start(resources: Resources, address: str | None, stack: ExitStack) -> None:
    """Joins or starts Ray. UsageError where no node has room for a trial: Tune would wait for ever."""
    start_ray(address, resources.cpus * resources.at_a_time, stack)
    import ray

    wanted = {"CPU": resources.cpus, "GPU": resources.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(kind, 0) >= n for kind, n in wanted.items()) for node in nodes):
        most = {kind: max(node.get(kind, 0) for node in nodes) for kind in wanted}
        raise UsageError(
            f"A trial takes {resources.cpus} CPUs and {resources.gpus:g} GPUs, and no node has them: the most are "
            f"{most['CPU']:g} and {most['GPU']:g}. Lower resources in the suite's file, or add nodes."
        )


def run_trials(
    resources: Resources, trials: Sequence[Trial], folder: Path, stop: Stop, watch: Callable[[], None]
) -> None:
    """Runs the trials, in their order as far as the resources give room. Returns when all have ended, one way or
    another, or once `stop` is set and the running ones are saved. `watch` is called now and then."""
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}  # Ctrl-C and the table are ours
    at_a_time = resources.at_a_time
    with ExitStack() as stack:
        from ray import tune

        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is told by the folder
        work = folder / "tune"
        stack.callback(shutil.rmtree, work, True)
        order, stopper = _order(at_a_time, stop, watch)
        takes = {"cpu": resources.cpus, "gpu": resources.gpus}
        ended = tune.Tuner(
            tune.with_resources(_in_own_process(folder, resources.cpus), takes),
            param_space={"trial": tune.grid_search([trial.name for trial in trials])},
            tune_config=tune.TuneConfig(search_alg=order),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(work), verbose=0, stop=stopper,
                failure_config=tune.FailureConfig(max_failures=resources.retries),
            ),
        ).fit()  # fmt: skip
        for result in ended:
            if result.error is not None and result.config is not None:
                _tell(folder, result.config["trial"], f"Ray: {' '.join(str(result.error).split())[-500:]}")


def _in_own_process(folder: Path, cpus: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What Tune calls for a trial: starts its process, hands a stop on to it, raises where it failed and may be tried
    again."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    here, python = os.getcwd(), sys.executable

    def run(space: dict[str, Any]) -> dict[str, Any]:
        return {"ended": run_process(folder, space["trial"], python, here, variables, cpus)}

    return run


def run_process(folder: Path, name: str, python: str, here: str, variables: dict[str, str], cpus: int) -> str:
    """One attempt at a trial in a process of its own: "done", "stopped" or "failed". Raises where trying again may
    help."""
    run = folder / "trials" / name
    if not folder.is_dir():
        raise RuntimeError(f"{folder} is not on this node: a suite over several nodes needs a folder that all share.")
    if (folder / STOP).exists():
        return "stopped"
    run.mkdir(parents=True, exist_ok=True)
    threads = {name: str(cpus) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    ours = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH") or not k.startswith("RAY_")}
    with (run / LOG).open("ab") as log:
        process = subprocess.Popen(
            [python, "-m", "deploy.trial", str(folder), name], cwd=here, env=ours | variables | threads,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            code = _wait(process, folder / STOP)
        finally:
            process.kill()
            process.wait(KILLED_S)
    if code == 0:
        return "done"
    if (folder / STOP).exists() and code in (STOPPED, -signal.SIGTERM):
        return "stopped"
    return _failed(folder, name, code)


def _wait(process: subprocess.Popen[bytes], stop: Path) -> int:
    """Until it ends; told to stop, it has SAVE_S to be saved."""
    deadline = float("inf")
    while process.poll() is None:
        if deadline == float("inf") and stop.exists():
            process.terminate()
            deadline = time.monotonic() + SAVE_S
        if time.monotonic() > deadline:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_S)
    return process.returncode


def _failed(folder: Path, name: str, code: int) -> str:
    """ "failed" where the same would happen again; else raises, for Tune to try again. The folder tells why."""
    told = folder / "failures" / f"{name}.json"
    if code < 0:
        hint = ", as the kernel does where memory runs out" if code == -signal.SIGKILL else ""
        told.unlink(missing_ok=True)
        _tell(folder, name, f"It was killed by {signal.Signals(-code).name}{hint}.")
    _tell(folder, name, f"It ended with code {code}; see trials/{name}/{LOG}.")
    if code == WRONG_USE:
        return "failed"
    raise RuntimeError(json.loads(told.read_text())["reason"])


def _tell(folder: Path, name: str, reason: str) -> None:
    """Keeps why a trial failed, unless that is known."""
    told = folder / "failures" / f"{name}.json"
    if not told.exists():
        write_json(told, {"name": name, "reason": reason})


def _order(at_a_time: int, stop: Stop, watch: Callable[[], None]) -> tuple[Any, Any]:
    """Tune's searcher and stopper: trials in the order given; once `stop` is set none begins, and all ends when those
    that run have ended."""
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    class InOrder(BasicVariantGenerator):
        def next_trial(self) -> Any:
            return None if stop.now else super().next_trial()

        def running(self) -> int:
            return len(self._live_trials)

    class WhenSaved(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            watch()
            return stop.now and not order.running()

    order = InOrder(max_concurrent=at_a_time)
    return order, WhenSaved()
