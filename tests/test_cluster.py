"""Runs on several nodes, whose nodes die and whose network is cut: docker-compose.yml's services, a network namespace
for each. Whatever happens, every step of the budget is collected once.

`pytest -m slow -s tests/test_cluster.py` prints the figures of docs/reliability.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gsa import config as configs
from gsa.metrics import read_log
from tests import namespaces
from tests.gym_counting import STEPS
from tests.processes import children, collected, wait_for
from tests.test_runs import check_counts, config, online

pytestmark = [pytest.mark.skipif(not namespaces.permitted(), reason=namespaces.REASON), pytest.mark.timeout(1800)]
WORKERS = 2
CUT_S = 60  # how long a node is cut off
SHORT_S = 8  # and for how long without being given up
ROUND_S = 15.0  # the driver looks around at least so often, whatever is cut off


class Cluster:
    """Redis, a head with the driver on it and two worker nodes in one network; a run on them."""

    def __init__(self, hosts: dict[str, namespaces.Host], folder: Path) -> None:
        self.run, self.said, self._config = folder / "run", folder / "said", folder / "config.yaml"
        self.redis, self.head, self.nodes = hosts["redis"], hosts["head"], [hosts["worker-1"], hosts["worker-2"]]
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, nodes: int = 2) -> None:
        for host in (self.redis, self.head):
            host.start()
            host.await_health()
        for node in self.nodes[:nodes]:
            node.start()

    def begin(self, budget: int) -> None:
        """A run of so many agent steps, five a second and worker."""
        given = self.head.environment()
        where = {"ray_address": given["GSA_RAY_ADDRESS"], "redis_url": given["GSA_REDIS_URL"]}
        slow = {"task": "gym/LazyCounting-v0", "train_ratio": 1.0, "eval_every_frames": 10_000, "final_episodes": 1}
        configs.save(config(self.run, workers=WORKERS, budget_frames=budget, **slow, **where), self._config)
        self.finetune("--config", str(self._config))

    def finetune(self, *arguments: str) -> None:
        command = self.head.entered(sys.executable, "-m", "deploy.cli", "finetune", *arguments)
        with self.said.open("ab") as said:
            self.driver = subprocess.Popen(command, env=self.head.environment(), stdout=said, stderr=said)

    def until(self, condition: Callable[[], bool], deadline_s: float = 400.0) -> float:
        """Waits for the condition; returns how long, in seconds."""
        began = time.monotonic()
        assert wait_for(self.driver, condition, deadline_s), self.said.read_text()[-3000:]
        return time.monotonic() - began

    def until_collecting(self) -> None:
        self.until(lambda: self.logged("driver/workers") == WORKERS and self.collected >= 3 * STEPS)

    def until_more(self) -> float:
        """Until another episode is collected; returns how long, in seconds."""
        before = self.collected
        return self.until(lambda: self.collected > before)

    def until_workers(self, few: bool) -> float:
        """Until the driver has heard that a worker is gone, or until it has all."""
        return self.until(lambda: (self.logged("driver/workers") < WORKERS) == few)

    def tell(self, signal: signal.Signals) -> None:
        """Sends it to the driver, which is the child of what enters its host."""
        os.kill(children(self.driver.pid, "deploy.cli")[-1], signal)

    def check(self, budget: int) -> None:
        """That the run ends, is whole, and that its driver looked around all the time."""
        code = self.driver.wait(400)
        assert code == 0, self.said.read_text()[-3000:]
        check_counts(self.run, budget)
        episodes = [row["episode/steps"] for row in read_log(self.run) if "episode/steps" in row]
        assert len(episodes) == len(online(self.run))

    def longest_pause_s(self) -> float:
        """Between two rows of the driver's log."""
        return float(np.diff([row["time_s"] for row in read_log(self.run)]).max())

    @property
    def collected(self) -> float:
        return collected(self.run)

    def logged(self, name: str) -> float:
        """The newest value in the log."""
        rows = read_log(self.run) if self.run.joinpath("metrics.jsonl").exists() else []
        return next((row[name] for row in reversed(rows) if name in row), -1)

    def of_a_worker(self) -> namespaces.Host:
        """A node that a worker runs on."""
        return next(node for node in self.nodes if node.running("GSAEnvRunner"))


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with namespaces.made(tmp_path) as hosts:
        yield Cluster(hosts, tmp_path)


def told(**figures: float) -> None:
    print({name: round(value, 1) for name, value in figures.items()})


def test_what_cannot_be_reached_is_said_within_its_deadline(cluster):
    """A node that is cut off finds neither Ray nor Redis; nobody tells it so."""
    node = cluster.nodes[0]
    node.lose(cluster.head)
    node.lose(cluster.redis)
    alone = ["ip", "netns", "exec", node.namespace, sys.executable, "-c"]
    ray = "from deploy.distributed import _require_answer as ask; ask('10.77.9.12:6379')"
    redis = f"from deploy.run import _require_redis as ask; ask('redis://:secret@{cluster.redis.address}:6379/0')"
    for call, sentence in ((ray, "Cannot join the Ray cluster"), (redis, "The Redis server of --redis-url does not")):
        asked = subprocess.run([*alone, call], env=node.environment(), capture_output=True, text=True, timeout=30)
        assert f"UsageError: {sentence}" in asked.stderr


@pytest.mark.slow
def test_worker_nodes_die_and_are_cut_off(cluster):
    """One node dies, and its worker finds room on the other; that is cut off with it, and there is no room until it is
    back; then it dies, too, and one worker alone ends the run."""
    budget = 900
    cluster.start()
    cluster.begin(budget)
    cluster.until_collecting()
    cluster.of_a_worker().die()
    died = {"noticed_s": cluster.until_workers(few=True), "next_episode_s": cluster.until_more()}
    died["after_that_all_workers_s"] = cluster.until_workers(few=False)
    told(**died)

    cut = cluster.of_a_worker()
    raylet, began = cut.running("raylet"), time.monotonic()
    cut.cut_off()
    told(cut_next_episode_s=cluster.until_more())
    cluster.until_workers(few=True)
    told(cut_noticed_s=time.monotonic() - began)
    episodes = cluster.collected / STEPS
    cluster.until(lambda: time.monotonic() - began > CUT_S)
    told(episodes_meanwhile=cluster.collected / STEPS - episodes)
    cut.connect()
    back = {"node_again_s": cluster.until(lambda: not set(raylet) & set(cut.running("raylet")))}
    back["all_workers_s"] = back["node_again_s"] + cluster.until_workers(few=False)
    told(**back)
    assert len(cut.running("GSAEnvRunner")) == len(cut.running("actors.env_process")) == 1, "the old ones are left"

    cut.die()
    cluster.until_workers(few=True)
    told(alone_next_episode_s=cluster.until_more())
    cluster.check(budget)
    told(longest_pause_s=cluster.longest_pause_s())
    assert cluster.longest_pause_s() < ROUND_S


@pytest.mark.slow
def test_a_worker_node_without_redis_acts_on_and_a_short_cut_costs_nothing(cluster):
    """First Redis alone is lost, then the whole network, for less time than Ray waits."""
    cluster.start()
    cluster.begin(700)
    cluster.until_collecting()
    node = cluster.of_a_worker()
    node.lose(cluster.redis)
    began, errors = time.monotonic(), cluster.logged("broadcast/fetch_errors")
    told(first_error_s=cluster.until(lambda: cluster.logged("broadcast/fetch_errors") > max(errors, 0)))
    cluster.until(lambda: time.monotonic() - began > 30)
    assert cluster.logged("driver/workers") == WORKERS
    stale, newest = cluster.logged("worker/policy_version"), cluster.logged("broadcast/version")
    assert stale < newest, "both workers have the newest weights"
    node.find(cluster.redis)
    told(newest_weights_s=cluster.until(lambda: cluster.logged("worker/policy_version") >= newest))

    node.cut_off()
    cluster.until(lambda began=time.monotonic(): time.monotonic() - began > SHORT_S)
    node.connect()
    cluster.check(700)
    assert cluster.logged("driver/worker_restarts") == 0
    assert cluster.logged("driver/faults") == 0


@pytest.mark.slow
def test_a_run_is_stopped_beside_a_node_that_is_cut_off_and_goes_on_when_its_head_is_gone(cluster):
    budget = 400
    cluster.start()
    cluster.begin(budget)
    cluster.until_collecting()
    cut = cluster.of_a_worker()
    cut.cut_off()
    cluster.tell(signal.SIGTERM)
    began = time.monotonic()
    assert cluster.driver.wait(60) == 143, cluster.said.read_text()[-3000:]
    told(stopped_s=time.monotonic() - began)
    cut.connect()

    cluster.head.die()
    cluster.head.start()
    began = time.monotonic()
    cluster.head.await_health()
    cluster.finetune("--resume", str(cluster.run))
    cluster.until_more()
    told(head_lost_next_episode_s=time.monotonic() - began)
    cluster.head.die()  # the driver this time, too
    began = time.monotonic()
    cluster.head.start()
    cluster.head.await_health()
    cluster.finetune("--resume", str(cluster.run))
    cluster.until_more()
    told(head_and_driver_lost_next_episode_s=time.monotonic() - began)
    cluster.tell(signal.SIGKILL)
    cluster.driver.wait(10)
    cluster.finetune("--resume", str(cluster.run))  # at once, on the same cluster
    cluster.check(budget)
