"""Environments in this process and in one of their own: alike while all is well, contained when it is not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from actors import env_process
from actors.environment import make
from actors.hosting import InProcess, Isolated
from gsa.errors import EnvironmentFault, UsageError
from tests.gym_counting import STEPS
from tests.gym_faulty import ALL

FAULTY, COUNTING = ("tests.gym_faulty",), ("tests.gym_counting",)
TIMEOUT_S = 2.0
SAYS = {
    "Hangs": "no answer within 2 s", "HangsInC": "no answer within 2 s", "Crashes": "its process ended by SIGSEGV",
    "Raises": "RuntimeError: the simulator broke", "Shape": "shape", "NaN": "the reward is nan",
}  # fmt: skip


def play(host, actions, seed=3):
    """Observation 0 and the steps of an episode."""
    first, steps = host.reset(seed), []
    for action in actions:
        host.ask_step(action)
        steps.append(host.answer())
    return first, steps


@pytest.mark.parametrize("task", ["gym/Counting-v0", "dmc/walker-walk", "gym/Large-v0"])
def test_an_environment_is_the_same_in_a_process_of_its_own(task):
    modules = (*COUNTING, *FAULTY)
    with (
        closing(InProcess(partial(make, task, "fast", modules))) as here,
        closing(Isolated(task, "fast", modules)) as apart,
    ):
        assert here.spec == apart.spec and here.task == apart.task
        actions = np.random.default_rng(0).uniform(-2, 2, (STEPS, here.spec.action_dim))
        (first, steps), (other_first, other_steps) = (play(host, actions) for host in (here, apart))
        for name in here.spec.observation:
            assert np.array_equal(first[name], other_first[name])
        for ours, theirs in zip(steps, other_steps, strict=True):
            assert all(np.array_equal(ours.observation[k], theirs.observation[k]) for k in ours.observation)
            assert np.array_equal(ours.action, theirs.action)
            assert _numbers(ours) == _numbers(theirs)


def _numbers(step):
    return step.reward, step.discount, step.last, step.success


@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("way", ALL)
def test_a_fault_in_a_process_of_its_own_is_a_sentence_within_its_deadline(way, where):
    if (way, where) == ("NaN", "reset"):
        pytest.skip("a reset has no reward")
    task = f"gym/{way}{'InReset' if where == 'reset' else ''}-v0"
    with closing(Isolated(task, imports=FAULTY, timeout_s=TIMEOUT_S)) as host:
        assert host.spec.action_dim == 2  # it is up
        started = time.monotonic()
        with pytest.raises(EnvironmentFault, match=SAYS[way]) as caught:
            play(host, np.zeros((STEPS, 2)))
        assert f"{task} failed in {where}" in str(caught.value)
        assert time.monotonic() - started < TIMEOUT_S + 10
    assert host._process.poll() is not None  # nothing is left


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("BabblesAndStops", "no answer within 0.5 s"), ("Babbles", "not its own"), ("BabblesAnswers", "not its own"),
        ("BabblesErrors", "not its own"),
    ],
)  # fmt: skip
def test_an_environment_that_writes_where_answers_belong_is_a_fault_within_its_deadline(task, says, monkeypatch):
    monkeypatch.setattr(env_process, "EXIT_S", 0.3)  # until what does not end is killed
    with closing(Isolated(f"gym/{task}-v0", imports=FAULTY, timeout_s=0.5)) as host:
        started = time.monotonic()
        host.reset(0)
        with pytest.raises(EnvironmentFault, match=says):
            host.ask_step(np.zeros(2))
            host.answer()
        assert time.monotonic() - started < 60
    assert host._process.poll() is not None


def test_a_message_is_whole_wherever_it_is_cut_on_its_way():
    sent = env_process.message(b"S", bytes(range(40)))
    for expected in (0, 16, 40, 80):
        for cut in range(len(sent)):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setblocking(False)
                theirs.sendall(sent[:cut])
                kind, content = env_process.receive(ours, expected, lambda: theirs.sendall(sent[cut:]))  # noqa: B023
                assert (kind, bytes(content)) == (b"S", bytes(range(40)))


@pytest.mark.parametrize("way", ["Hangs", "Raises", "Shape", "NaN"])
def test_a_fault_in_this_process_is_the_same_sentence_where_python_gets_a_turn(way):
    before = signal.getsignal(signal.SIGALRM)
    host = InProcess(partial(make, f"gym/{way}-v0", "fast", FAULTY), timeout_s=0.5)
    with pytest.raises(EnvironmentFault, match=SAYS[way].replace("2 s", "0.5 s")):
        play(host, np.zeros((STEPS, 2)))
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_environment_that_cannot_be_made_says_why():
    with (
        closing(Isolated("gym/Unborn-v0", imports=FAULTY)) as host,
        pytest.raises(EnvironmentFault, match="no licence"),
    ):
        host.reset(0)
    with closing(Isolated("dmc/walker-fly")) as host, pytest.raises(UsageError, match="Unknown task"):
        host.reset(0)


def test_an_answer_that_comes_in_time_is_taken_whatever_is_asked_before_it_is_up():
    with closing(Isolated("gym/Counting-v0", imports=COUNTING)) as host:
        host.ask_reset(5)  # at once, while it still starts
        assert host.ready(60)
        assert host.answer()["pixels"][0, 0, 0] == 0


@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_no_process_outlives_the_one_that_started_it(state):
    """Killed by SIGKILL, it can tell nobody."""
    script = (
        "from actors.hosting import Isolated; import numpy as np, time\n"
        "host = Isolated('gym/HangsInC-v0', imports=('tests.gym_faulty',), timeout_s=3)\n"
        "host.reset(0)\n"
        "for _ in range(6): host.ask_step(np.zeros(2)); host.answer()\n"
        f"{'host.ask_step(np.zeros(2))' if state == 'hanging' else ''}\n"
        "print(host._process.pid, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    end = time.monotonic() + 20
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_environments_in_processes_of_their_own_step_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GSA_TEST_MEETING", str(tmp_path))
    hosts = [Isolated("gym/Together-v0", imports=FAULTY) for _ in range(2)]
    for host in hosts:
        host.ask_reset(0)
    assert all(host.answer()["pixels"].shape == (64, 64, 3) for host in hosts)
    for _ in range(3):
        for host in hosts:
            host.ask_step(np.zeros(2))
        assert [host.answer().last for host in hosts] == [False, False]
    for host in hosts:
        host.close()
