"""Pre-training in several processes, and one that is killed: the gradients of one process, exact continuation, and an
end with its cause where a process is lost."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.processes import launch
from gsa.agent.world_model import WorldModel
from gsa.errors import GsaError, UsageError
from learner.config import ComputeConfig, PretrainConfig
from learner.pretrain import Pretraining, pretrain
from retrieval.store import TrajectoryStore
from tests import dots

SMALL = PretrainConfig(
    model="tiny", max_action_dim=3, updates=12, batch=4, length=8, log_every=2, checkpoint_every=3, strip_context=3,
    compute=ComputeConfig("cpu", "float32", threads=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "store"
    with dots.make_store(path, count=3, action_dims=(1, 2)) as store:
        store.append(dots.trajectory(np.random.default_rng(0), 3), dots.spec(2))  # shorter than a sequence
    return path


@pytest.fixture(scope="module")
def through(store, tmp_path_factory):
    """Weights of a pre-training that nothing disturbed."""
    with TrajectoryStore.open(store) as pool:
        return pretrain(pool, SMALL, tmp_path_factory.mktemp("through")).state_dict()


def gradients(path, out, file):
    """Each process's own, after they were added up, and the metrics."""
    with TrajectoryStore.open(path) as pool:
        training = Pretraining(pool, SMALL, Path(out))
        seen = {}
        training._optimiser._adam.register_step_pre_hook(
            lambda *_: seen.update({k: p.grad.clone() for k, p in training.model.named_parameters()})
        )
        metrics = training.update()
        torch.save({"gradients": seen, "metrics": metrics}, f"{file}-{training.ranks.rank}")
        training.close()


def train(path, out, config=SMALL):
    with TrajectoryStore.open(path) as pool:
        pretrain(pool, config, Path(out))


def train_and_die(path, out, how):
    """Process 1 ends in the middle: between two updates, while the other one waits for it."""
    if os.environ["RANK"] == "1":
        update, calls = Pretraining.update, []

        def dying(self):
            calls.append(self)
            if len(calls) == 5:
                os.kill(os.getpid(), how)
            return update(self)

        Pretraining.update = dying
    train(path, out, dataclasses.replace(SMALL, deadline_s=5.0))


def test_two_processes_make_the_gradient_of_one(store, tmp_path):
    gradients(store, tmp_path / "one", tmp_path / "one")
    launch(gradients, (store, tmp_path / "two", tmp_path / "two"), 2, threading.Event())
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("one-0", "two-0", "two-1"))
    for each in two:
        assert each["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        for key, expected in one["gradients"].items():
            error = (each["gradients"][key] - expected).norm()
            assert error <= 1e-4 * expected.norm() + 1e-7, key
    assert all(torch.equal(two[0]["gradients"][k], two[1]["gradients"][k]) for k in one["gradients"])


def test_a_lost_process_ends_the_training_with_its_cause_and_all_go_on_exactly(store, tmp_path):
    launch(train, (store, tmp_path / "through"), 2, threading.Event())
    started = time.monotonic()
    with pytest.raises(GsaError, match=r"Process 1 of 2 was killed by SIGKILL.*goes on from the last checkpoint"):
        launch(train_and_die, (store, tmp_path / "parts", signal.SIGKILL), 2, threading.Event())
    assert time.monotonic() - started < 60
    assert not (tmp_path / "parts" / "world_model.json").exists()
    launch(train, (store, tmp_path / "parts"), 2, threading.Event())
    whole, parts = (WorldModel.load(tmp_path / name).state_dict() for name in ("through", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_training_within_the_deadline(store, tmp_path):
    started = time.monotonic()
    with pytest.raises(GsaError, match="had no answer in time"):
        launch(train_and_die, (store, tmp_path / "out", signal.SIGSTOP), 2, threading.Event())
    assert time.monotonic() - started < 60


def test_a_process_that_fails_is_quoted(store, tmp_path):
    train(store, tmp_path / "out", dataclasses.replace(SMALL, updates=1))
    with pytest.raises(UsageError, match=r"other settings.*seed 0 → 1"):
        launch(train, (store, tmp_path / "out", dataclasses.replace(SMALL, seed=1)), 2, threading.Event())


def command(store, out, *more):
    flags = ("--model", "tiny", "--max-action-dim", "3", "--updates", "12", "--batch", "4", "--length", "8")
    rest = ("--checkpoint-every", "3", "--log-every", "2", "--strip-context", "3", "--compute.threads", "1")
    where = ("--compute.device", "cpu", "--compute.precision", "float32", "--store", str(store), "--out", str(out))
    return [sys.executable, "-m", "deploy.cli", "pretrain", *flags, *rest, *where, *more]


def killed_after(process, log, updates):
    """Kills a pre-training once its log tells of so many updates; whether it was still alive."""
    while process.poll() is None:
        rows = log.read_text().count("\n") if log.exists() else 0
        if 2 * rows >= updates:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    return process.wait() == -signal.SIGKILL


def test_a_killed_pre_training_goes_on_bit_for_bit(store, through, tmp_path):
    process = subprocess.Popen(command(store, tmp_path / "out"))
    assert killed_after(process, tmp_path / "out" / "metrics.jsonl", 4)
    subprocess.run(command(store, tmp_path / "out"), check=True)
    found = WorldModel.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[k], through[k]) for k in through)


@pytest.mark.slow
def test_killed_at_random_points_again_and_again_it_ends_bit_for_bit(store, through, tmp_path):
    rng = random.Random(0)
    for kill in range(20):
        process = subprocess.Popen(command(store, tmp_path / str(kill)))
        try:
            process.wait(timeout=rng.uniform(1.5, 9.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        subprocess.run(command(store, tmp_path / str(kill)), check=True)
        found = WorldModel.load(tmp_path / str(kill)).state_dict()
        assert all(torch.equal(found[k], through[k]) for k in through), kill


@pytest.mark.slow
def test_told_to_stop_it_saves_says_so_and_goes_on(store, through, tmp_path):
    process = subprocess.Popen(command(store, tmp_path / "out", "--processes", "2"), stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "goes on from there" in said
    assert (tmp_path / "out" / "world_model.json").exists()
    subprocess.run(command(store, tmp_path / "out", "--processes", "2"), check=True)
    assert "open_loop_error" in log.read_text().splitlines()[-1]


def test_a_batch_that_does_not_divide_is_refused_at_once(store, tmp_path):
    result = subprocess.run(
        command(store, tmp_path / "out", "--processes", "3"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "--batch 4 does not divide into --processes 3" in result.stderr
