"""The environment worker as an RLlib EnvRunner: RLlib starts and restarts it; it collects in a thread of its own."""

from __future__ import annotations

import os
import secrets
import threading
import time
from typing import Any

import ray

from deploy import parts
from deploy.provenance import require_same_sources
from deploy.ray_actors import PRIOR
from deploy.ray_links import RayReplayLink, where
from deploy.rllib import Checkpointable, EnvRunner
from gsa.broadcast import RedisSubscriber

NO_MEMORY = "not enough memory"  # as torch puts it, in a RuntimeError
HUNG_S = 60.0  # beyond the deadline of its environments: a worker that neither steps nor waits for so long hangs


class GSAEnvRunner(EnvRunner, Checkpointable):
    """Collects free of driver and learner once start() was called; the other methods are RLlib's interface."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        require_same_sources(config.sources, "A worker")
        parts.limit_threads(1)
        self.place = f"worker-{self.worker_index}"
        self.name = f"{self.place}/{secrets.token_hex(4)}"  # one that was thought dead may still speak
        self._replay = ray.get_actor(config.replay_name)
        ray.get(self._replay.release.remote(self.place), timeout=60)  # leases of the one that died before
        self._link = RayReplayLink(self._replay, self.name)
        about, self._env_timeout_s = config.architecture, config.finetune.env_timeout_s
        self._weights = RedisSubscriber(config.redis_url, about.run)
        prior = RedisSubscriber(config.redis_url, about.run, PRIOR) if about.prior is not None else None
        self.worker = parts.env_worker(config.finetune, about, self.name, self._link, self._weights, prior)
        self._weights.stage = self.worker.rollout.policy.stage  # type: ignore[attr-defined]
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, name=self.name, daemon=True)

    def start(self) -> tuple[str, dict[str, float], list[str], str | None, tuple[str, int]]:
        """Starts collecting if it has not; returns its name, what was counted and which faults there were since the
        last call, what ended it if so, and where it is."""
        if not self._thread.is_alive() and self._error is None and not self._stopped.is_set():
            self._thread.start()
        last = max(self.worker.last_progress, self._link.last_turn)
        if time.monotonic() - last > HUNG_S + self._env_timeout_s:
            os._exit(1)  # a thread that hangs cannot be stopped otherwise; RLlib starts the worker anew
        error = None if self._error is None else f"{self.place} stopped: {self._error}"
        stats = {**self.worker.stats(), **self._link.meter.stats(), **self._weights.stats()}
        return self.name, stats, self.worker.faults(), error, where()

    def assert_healthy(self) -> None:
        """RLlib's probe: the constructor has run."""
        assert self.worker is not None

    def sample(self, **_: Any) -> list[Any]:
        """Nothing: episodes go to the replay service, never through the driver."""
        return []

    def get_spaces(self) -> dict[str, Any]:
        return {}

    def get_metrics(self) -> dict[str, float]:
        return self.worker.stats()

    def get_state(self, components: Any = None, *, not_components: Any = None, **_: Any) -> dict[str, Any]:
        return {}  # all there is to know lies in leases and snapshots

    def set_state(self, state: Any) -> None:
        pass

    def get_ctor_args_and_kwargs(self) -> tuple[tuple, dict[str, Any]]:
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[Any]:
        return []

    def stop(self) -> None:
        """Ends collecting; hands over what is finished, gives back what is not."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._link.flush(deadline_s=10)
        self._weights.close()
        self.worker.close()

    def _collect(self) -> None:
        try:
            self.worker.run(self._stopped.is_set)
        except BaseException as error:
            if _wants_memory(error):
                os._exit(1)  # RLlib starts a new one, with the memory that this one gives back
            self._error = error


def _wants_memory(error: BaseException | None) -> bool:
    """Whether memory was refused, here or in what made this error."""
    while error is not None and not isinstance(error, MemoryError) and NO_MEMORY not in str(error):
        error = error.__cause__
    return error is not None
