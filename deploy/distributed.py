"""A whole run over Ray and Redis: starts what it is not given, drives the algorithm to its budget, ends it in order."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from deploy import parts
from deploy.config import FinetuneConfig
from deploy.progress import console
from deploy.provenance import require_own_packages
from deploy.redis_server import EmbeddedRedis
from gsa.errors import GsaError, UsageError
from gsa.metrics import Progress

CONNECT_S = 10.0
START_TRIES = 3  # of a Ray of our own, which gives itself 30 s to come up: too few where the machine is busy
JOIN_S = 90.0  # for nodes to join a cluster, also those of a head that is gone, and for a killed driver's to be free
SAVE_S = 15.0  # for what the learner has learned to be on disk, once the run is told to stop
STALLED_S = 600.0  # neither collected nor replayed: what hangs is not restarted in time, which is 180 s and a start
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONWARNINGS": "ignore",
    "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_task_events_report_interval_ms": "0",  # a history of calls that grows
}  # fmt: skip
SILENT = {"log_to_driver": False, "logging_level": logging.ERROR}


def launch(config: FinetuneConfig, services: ExitStack) -> str:
    """Joins or starts Ray, and Redis where no URL is given; `services` ends them. Returns the URL of Redis."""
    require_own_packages()
    start_ray(config.ray_address, needed_cpus(config), services)
    _await_cpus(config)
    return config.redis_url or _start_redis(config, services)


def run_distributed(
    config: FinetuneConfig, run: Path, redis_url: str, progress: Progress, stop: threading.Event | None = None
) -> Path:
    """Workers, replay service, learner and evaluator as actors of a launched Ray. Returns the agent's folder.

    Goes on where the run in this folder stood. With `stop` set it saves, if that is done within SAVE_S, and raises
    Stopped.
    """
    from deploy.algorithm import GSAConfig  # imports rllib, so only after the environment is set

    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    algorithm = GSAConfig().for_run(config, run, redis_url).build_algo()
    try:
        algorithm.told = stop or algorithm.told
        moved, seen = time.monotonic(), (-1.0, -1.0)
        while not algorithm.done:
            algorithm.train()
            if algorithm.told.is_set():
                raise parts.stopped(algorithm.frames, run, saved=algorithm.save_now(SAVE_S))
            now = (algorithm.frames, algorithm.latest.get("replay/sampled", 0.0))
            if now != seen:
                moved, seen = time.monotonic(), now
            elif time.monotonic() - moved > STALLED_S:
                why = algorithm.trouble or f"See {run / 'metrics.jsonl'}."
                raise GsaError(f"Nothing was collected or learned for {STALLED_S:.0f} s. {why}")
            progress(algorithm.frames, config.budget_frames, parts.headline(algorithm.latest))
        return algorithm.finish()
    finally:
        algorithm.stop()


def needed_cpus(config: FinetuneConfig) -> int:
    """Workers, driver, replay service, learner and evaluator; each is one of Ray's CPUs."""
    return config.workers + 4


def start_ray(address: str | None, cpus: int, stack: ExitStack) -> None:
    """Joins the cluster at `address`, or starts one on this machine that accepts nobody from outside and gives out at
    least so many CPUs; `stack` ends it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address is None and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    _require_answer(address)
    import ray

    if ray.is_initialized():
        raise UsageError("Ray is already initialised in this process; gsa starts or joins a cluster itself.")
    handed_on = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS", "GOMP_SPINCOUNT")
    variables = {k: os.environ[k] for k in handed_on if k in os.environ}
    runtime = {"env_vars": {**variables, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}}
    # "local": left out, Ray would look for a cluster of anybody's on this machine, even for one that is gone.
    own = {"address": "local", "num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
    where = own if address is None else {"address": address}
    for left in reversed(range(START_TRIES if address is None else 1)):
        try:
            ray.init(**where, runtime_env=runtime, **SILENT)
            break
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if not left:
                raise UsageError(_no_ray(address, error)) from error
            console.print(f"Ray did not start: {_words(error)}. Trying again.", soft_wrap=True, markup=False)
    stack.callback(ray.shutdown)


def _await_cpus(config: FinetuneConfig) -> None:
    """Raises UsageError where the run finds no room; in a cluster that others start it waits for it, and says so."""
    import ray

    needed, end = needed_cpus(config), 0.0
    while (free := ray.available_resources().get("CPU", 0)) < needed:
        if config.ray_address is not None and not end:
            console.print(f"The cluster has {free:g} free CPUs of {needed}: waiting {JOIN_S:.0f} s for more to join.")
            end = time.monotonic() + JOIN_S
        if time.monotonic() > end:
            raise UsageError(
                f"The cluster has {free:g} free CPUs; {config.workers} workers, driver, replay service, learner and "
                f"evaluator need {needed}: lower --workers or add nodes."
            )
        time.sleep(0.5)


def _require_answer(address: str | None) -> None:
    """Raises UsageError if nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdigit()) or "://" in host:
        return  # none, "auto", or a form that Ray judges
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UsageError(f"Cannot join the Ray cluster at '{address}': {error.strerror or error}.") from None


def _no_ray(address: str | None, error: Exception) -> str:
    if address is None:
        return f"Ray does not start on this machine, not in {START_TRIES} tries: {_words(error)}."
    return f"Cannot join the Ray cluster at '{address}': {_words(error)}."


def _words(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _start_redis(config: FinetuneConfig, stack: ExitStack) -> str:
    """A server of our own: on loopback, or on this node's address where the workers may be elsewhere."""
    host = "127.0.0.1"
    if config.ray_address is not None:
        import ray

        host = ray.util.get_node_ip_address()
    return stack.enter_context(EmbeddedRedis(host)).url
