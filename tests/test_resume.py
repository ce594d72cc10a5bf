"""A run that was stopped or killed goes on as if it had not been: the same weights, metrics and online store."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deploy import run as runs
from deploy.cli import main as gsa
from deploy.config import FinetuneConfig, config_of
from deploy.local import run_local
from deploy.run import STOP_S
from gsa import config as configs
from gsa.errors import FormatError, GsaError, Stopped
from gsa.metrics import read_log
from learner.checkpoint import Checkpoints, read
from learner.config import LearnerConfig
from retrieval.store import TrajectoryStore
from tests.gym_counting import STEPS
from tests.processes import alive, children, collected, kill_at, start, wait_for
from tests.test_runs import check_counts, config, online, pool  # noqa: F401

GOOD = 11.0  # of 20; random actions make 7.5
PREEMPTED_S = 30  # from SIGTERM to the machine's end
TIMED = ("_per_s", "_ms", "_s", "checkpoint/")  # metrics that tell of time


def settings(out: Path, pool, **changes) -> FinetuneConfig:  # noqa: F811
    """Two environments, so that a checkpoint finds episodes under way, and weights that are published every third
    update."""
    learner = LearnerConfig(publish_every=3)
    return config(out, pool, local=True, envs=2, checkpoint_every_frames=20, learner=learner, **changes)


@pytest.fixture(scope="module")
def prepared(pool, tmp_path_factory) -> Path:  # noqa: F811
    """A run up to where collecting begins."""
    folder = tmp_path_factory.mktemp("resume")
    return runs.prepare(settings(folder / "prepared", pool).resolved(), lambda: None)


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    return continue_run(copy(prepared, tmp_path_factory.mktemp("whole") / "run"))


def copy(prepared: Path, to: Path) -> Path:
    return Path(shutil.copytree(prepared, to))


def continue_run(run: Path, stop: threading.Event | None = None) -> Path:
    run_local(config_of(run), run, lambda *_: None, stop)
    return run


def assert_same_run(one: Path, other: Path) -> None:
    for file in sorted((one / "agent").glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(other / "agent" / file.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    with TrajectoryStore.open(one / "online") as a, TrajectoryStore.open(other / "online") as b:
        assert len(a) == len(b)
        for row in range(len(a)):
            first, second = a.read(row), b.read(row)
            assert (first.id, first.stats) == (second.id, second.stats)
            for name in ("action", "reward", "discount", "controller", "policy_version"):
                np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
            np.testing.assert_array_equal(first.observation["pixels"], second.observation["pixels"])
    assert untimed(one) == untimed(other)


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in read_log(run)]


def killed(prepared: Path, run: Path, kills: int, seed: int) -> Path:
    copy(prepared, run)
    command = [sys.executable, "-m", "tests.killing", str(run), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill struck: the run is too short"
    return run


def test_killed_at_random_points_it_is_the_same_run(prepared, whole, tmp_path):
    assert_same_run(killed(prepared, tmp_path / "run", 3, seed=0), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_many_points_it_is_the_same_run(prepared, whole, tmp_path):
    for seed in range(10, 18):
        assert_same_run(killed(prepared, tmp_path / f"run{seed}", 4, seed), whole)


def test_stopped_at_any_turn_it_is_the_same_run(prepared, whole, tmp_path):
    """Every ninth look at the stop event ends the run: between updates and agent steps, with episodes under way."""

    class Ninth(threading.Event):
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks % 9 == 0

    run, stops = copy(prepared, tmp_path / "run"), 0
    while True:
        try:
            continue_run(run, Ninth())
            break
        except Stopped:
            stops += 1
    assert stops > 20
    assert_same_run(run, whole)


def test_a_damaged_newest_checkpoint_is_passed_over(prepared, whole, tmp_path):
    run = copy(whole, tmp_path / "run")
    shutil.rmtree(run / "agent")
    newest = max((run / "checkpoints").iterdir())
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    assert_same_run(continue_run(run), whole)


def test_refuses_to_go_on_with_other_inputs(whole, tmp_path):
    run = copy(whole, tmp_path / "run")
    rehearsal = run / "rehearsal.json"
    rehearsal.write_text(rehearsal.read_text() + " ")
    with pytest.raises(FormatError, match=r"rehearsal\.json.* have changed"):
        continue_run(run)


def test_refuses_to_become_another_run(whole, tmp_path, capfd):
    assert gsa(["finetune", "--resume", str(whole), "--seed", "3"]) == 2
    assert "Another run would come of it: seed 0 → 3" in capfd.readouterr().err
    assert gsa(["finetune", "--resume", str(tmp_path)]) == 2
    assert "has no run to go on with" in capfd.readouterr().err


def test_sigterm_saves_and_the_command_goes_on(pool, tmp_path):  # noqa: F811
    """What pre-emption does: the signal, half a minute at most, and the same command with --resume elsewhere."""
    assert STOP_S < PREEMPTED_S
    file = tmp_path / "config.yaml"
    configs.save(settings(tmp_path / "run", pool, budget_frames=2_000, train_ratio=16.0), file)
    command = [sys.executable, "-m", "deploy.cli", "finetune"]
    run = subprocess.Popen([*command, "--config", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=PREEMPTED_S)
    assert run.returncode == 143, said
    assert "to go on: gsa finetune --resume" in said
    frames = read_log(tmp_path / "run")[-1]["frames"]
    assert 0 < frames < 2_000


def test_resume_check_proves_it_for_ones_own_run(whole, tmp_path, capfd):
    run = copy(whole, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert gsa(["resume-check", str(run), "--scratch", str(tmp_path)]) == 0
    assert "goes on as if it had not been stopped" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_resume_check_finds_a_state_that_does_not_follow(whole, tmp_path, capfd):
    run = copy(whole, tmp_path / "run")
    folder = Checkpoints(run / "checkpoints", keep=9)
    step, state = read(folder.paths()[1])
    shutil.rmtree(folder.paths()[1])
    name, weight = next(iter(state["tuner"]["agent"].items()))
    weight.view(-1)[0] += 1e-3
    folder.save(step, state)
    assert gsa(["resume-check", str(run)]) == 1
    assert f"state.tuner.agent.{name} differs" in capfd.readouterr().out
    shutil.rmtree(run / "checkpoints")
    assert gsa(["resume-check", str(run)]) == 2


def test_a_clock_that_is_set_back_a_day_changes_nothing(prepared, whole, tmp_path, monkeypatch):
    right, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: right() - (86_400 if next(looks) > 20 else 0))
    assert_same_run(continue_run(copy(prepared, tmp_path / "run")), whole)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 24 MB: checkpoints fill it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_first_and_nothing_that_was_collected(prepared, whole, tmp_path, small_disk):
    """The disk fills up while the run saves and stores. It ends with a sentence, or goes on without checkpoints;
    with room again it goes on to the same end."""
    run = copy(prepared, small_disk / "run")
    room = shutil.disk_usage(small_disk).free
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(room - 1_500_000))  # a few episodes fit, no checkpoint does
    with pytest.raises(GsaError, match="space"):
        continue_run(run)
    ballast.unlink()
    with TrajectoryStore.open(run / "online") as store:
        kept = len(store)
        assert store.verify() == []
    assert 0 < kept < len(online(whole))
    moved = Path(shutil.move(run, tmp_path / "run"))
    assert_same_run(continue_run(moved), whole)


# Over Ray and Redis


@pytest.mark.timeout(600)
def test_a_distributed_run_survives_its_learner_and_its_driver(pool, tmp_path):  # noqa: F811
    """The learner is killed and restarted from its checkpoint within the run; then the driver, and with it all of Ray;
    then the run is told to stop. Each time it goes on: every step once, every episode in the log once."""
    out, log = tmp_path / "run", tmp_path / "log"
    changes = {"method": "naive", "task": "gym/SlowCounting-v0", "checkpoint_every_frames": 20}
    configs.save(config(out, pool, workers=2, **changes), tmp_path / "config.yaml")
    process = start(log, "--config", str(tmp_path / "config.yaml"))
    try:
        assert kill_at(process, out, 3 * STEPS, "LearnerActor") == 1
        below = children(process.pid)
        assert wait_for(process, lambda: collected(out) >= 5 * STEPS), log.read_text()[-3000:]
        process.kill()
        process.wait()
        assert wait_for(None, lambda: not any(map(alive, below))), "orphans are left"
        process = start(log, "--resume", str(out))
        assert wait_for(process, lambda: collected(out) >= 7 * STEPS), log.read_text()[-3000:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PREEMPTED_S) == 143, log.read_text()[-3000:]
        process = start(log, "--resume", str(out), "--workers", "1")
        assert process.wait(300) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    assert "the learner: Its process ended, or cannot be reached. Ray starts it again" in log.read_text()
    check_counts(out)
    assert gsa(["resume-check", str(out)]) == 0
    episodes = [row["episode/steps"] for row in read_log(out) if "episode/steps" in row]
    assert len(episodes) == len(online(out))
    assert max(row.get("learner/updates", 0) for row in read_log(out)) == 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_score_after_a_distributed_resume_is_that_of_before(tmp_path):
    """The driver is killed once the policy is good. The first evaluation after the resume lies in the 95 % prediction
    interval of the five before, and so does the mean of three."""
    out, log = tmp_path / "run", tmp_path / "log"
    learning = {"train_ratio": 8.0, "batch": 8, "length": 16, "imagination_starts": 64, "warmup_frames": 200}
    watched = {"eval_every_frames": 60, "eval_episodes": 3, "checkpoint_every_frames": 100, "budget_frames": 8000}
    configs.save(config(out, workers=2, **learning, **watched), tmp_path / "config.yaml")

    def scores() -> list[float]:
        rows = read_log(out) if (out / "metrics.jsonl").exists() else []
        return [row["eval/score"] for row in rows if "eval/score" in row]

    process = start(log, "--config", str(tmp_path / "config.yaml"))
    try:
        assert wait_for(process, lambda: len(scores()) >= 6 and min(scores()[-5:]) > GOOD, 700), scores()
        below = children(process.pid)
        process.kill()
        process.wait()
        before = scores()
        assert wait_for(None, lambda: not any(map(alive, below))), "orphans are left"
        process = start(log, "--resume", str(out))
        assert wait_for(process, lambda: len(scores()) >= len(before) + 3, 300), log.read_text()[-3000:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PREEMPTED_S) == 143, log.read_text()[-3000:]
    finally:
        process.kill()
    last, after = np.array(before[-5:]), scores()[len(before) :][:3]
    half = 2.776 * last.std(ddof=1) * np.sqrt(1 + 1 / len(last))  # Student's t of four degrees of freedom
    print({"before": last.round(2).tolist(), "half_width": round(half, 2), "after": np.round(after, 2).tolist()})
    assert abs(after[0] - last.mean()) <= half
    assert abs(np.mean(after) - last.mean()) <= half


NEVER_ENDS = """if True:
    import pathlib, signal, sys, time
    from deploy.processes import Budget, stop_on
    budget = Budget(0.5, pathlib.Path("runs/mine"))
    with stop_on(signal.SIGTERM, begin=budget.begin) as stop:
        print("ready", flush=True)
        while True:  # saves, and saves
            time.sleep(1)
"""


@pytest.mark.parametrize("reader", ["reads", "is gone", "has stopped"])
def test_a_process_that_does_not_come_to_its_end_is_ended_within_its_budget(reader):
    """Also where nobody can be told: what it says goes through a pipe, to `tee` for one, that got the signal too."""
    command = [sys.executable, "-c", NEVER_ENDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        if reader == "is gone":
            process.stderr.close()
        elif reader == "has stopped":
            full = os.open(f"/proc/self/fd/{process.stderr.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                while os.write(full, bytes(4096)):
                    pass
            os.close(full)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        if reader == "reads":
            assert process.stderr.read().decode().count("to go on: gsa finetune --resume runs/mine") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_learner_hangs_ends_within_half_a_minute_of_sigterm(pool, tmp_path):  # noqa: F811
    """It cannot be saved then; the checkpoint before it stands, and the sentence says so."""
    out, log = tmp_path / "run", tmp_path / "log"
    changes = {"method": "naive", "task": "gym/SlowCounting-v0", "checkpoint_every_frames": 20}
    configs.save(config(out, pool, workers=2, **changes), tmp_path / "config.yaml")
    process = start(log, "--config", str(tmp_path / "config.yaml"))
    try:
        assert wait_for(process, lambda: collected(out) >= 4 * STEPS), log.read_text()[-3000:]
        (learner,) = children(process.pid, "LearnerActor")
        os.kill(learner, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PREEMPTED_S) == 143, log.read_text()[-3000:]
        assert "too late to save" in log.read_text()
        assert wait_for(None, lambda: not alive(learner)), "an orphan is left"
        process = start(log, "--resume", str(out))
        assert process.wait(300) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    check_counts(out)
