"""Stores into one: everything of the source is in the pool once, and nothing is written where anything is wrong."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from deploy import cli
from gsa.errors import SpecMismatch, UsageError
from gsa.schema import Trajectory
from retrieval.merge import merge
from retrieval.store import TrajectoryStore
from tests.test_store import assert_same, rich
from tests.trajectories import counting, counting_spec

SPEC = counting_spec()


def made(path: Path, trajectories: Sequence[Trajectory], codec: str = "none") -> Path:
    with TrajectoryStore.create(path, codec) as store:
        for trajectory in trajectories:
            store.append(trajectory, SPEC)
    return path


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_what_is_new_joins_the_pool_as_it_was_and_what_is_known_is_left(tmp_path: Path, codec: str) -> None:
    shared = [rich(i, 20 + i, SPEC) for i in range(3)]
    new = [rich(i, 20 + i, SPEC) for i in range(3, 6)]
    other = counting_spec("toy/other", action_dim=5)
    pool, run = made(tmp_path / "pool", shared), made(tmp_path / "run", [*new, *shared], codec)
    with TrajectoryStore.open(run, write=True) as store:
        store.append(counting(9, 7, other), other)
    with TrajectoryStore.open(run) as source, TrajectoryStore.open(pool, write=True) as store:
        report = merge(source, store)
        assert (report.added, report.known, report.failed, report.steps) == (4, 3, [], 23 + 24 + 25 + 7)
        assert store.specs == {"toy/a": SPEC, "toy/other": other}
        for trajectory in (*shared, *new):
            row = store.find(trajectory.id)
            assert row is not None
            assert_same(store.read(row), trajectory)
        assert merge(source, store).known == 7
        assert len(store) == 7
        assert store.verify() == []


def test_a_merge_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pool = made(tmp_path / "pool", [rich(0, 5, SPEC)])
    unlike, elsewhere = dataclasses.replace(SPEC, action_repeat=4), dataclasses.replace(SPEC, renderer="faithful")
    new = counting_spec("toy/new")
    for name, spec, error, said in (
        ("unlike", unlike, SpecMismatch, "action_repeat: 2 / 4"),
        ("elsewhere", elsewhere, SpecMismatch, "rendered by '' .* by 'faithful'.*--mix-renderers"),
    ):
        with TrajectoryStore.create(tmp_path / name) as source:
            source.append(counting(1, 5, new), new)
            source.append(rich(1, 5, spec), spec)
            with TrajectoryStore.open(pool, write=True) as store:
                with pytest.raises(error, match=said):
                    merge(source, store)
                assert (len(store), list(store.specs)) == (1, ["toy/a"])
    with TrajectoryStore.open(tmp_path / "elsewhere") as source, TrajectoryStore.open(pool, write=True) as store:
        assert merge(source, store, mix_renderers=True).added == 2
        with pytest.raises(UsageError, match="the same store"):
            merge(store, store)


def test_what_is_damaged_or_another_of_its_id_is_named_and_left_out(tmp_path: Path) -> None:
    stored = [rich(i, 20, SPEC) for i in range(4)]
    twin = dataclasses.replace(rich(7, 9, SPEC), id=stored[3].id)
    pool, run = made(tmp_path / "pool", [twin]), made(tmp_path / "run", stored)
    (shard,) = (run / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[content.index(stored[1].observation["pixels"].tobytes()) + 100] ^= 1
    shard.write_bytes(content)
    with TrajectoryStore.open(run) as source, TrajectoryStore.open(pool, write=True) as store:
        report = merge(source, store)
        assert report.added == 2
        assert {id for id, _ in report.failed} == {stored[1].id, stored[3].id}
        assert any("checksum" in reason for _, reason in report.failed)
        assert store.find(stored[1].id) is None
        assert_same(store.read(0), twin)


def test_a_disk_without_room_is_said_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, run = made(tmp_path / "pool", []), made(tmp_path / "run", [rich(0, 500, SPEC)])
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("retrieval.merge.shutil.disk_usage", lambda _: usage)
    with (
        TrajectoryStore.open(run) as source,
        TrajectoryStore.open(pool, write=True) as store,
        pytest.raises(UsageError, match="make room"),
    ):
        merge(source, store)


MERGER = """
import sys
from retrieval import writer
from retrieval.merge import merge
from retrieval.store import TrajectoryStore
writer.GROUP_BYTES = 50_000
with TrajectoryStore.open(sys.argv[1]) as source, TrajectoryStore.open(sys.argv[2], write=True) as pool:
    merge(source, pool, progress=lambda done, *_: print(done, flush=True))
"""


def test_a_merge_that_was_killed_is_continued_by_the_same_command(tmp_path: Path) -> None:
    stored = [rich(i, 50, SPEC) for i in range(60)]
    pool, run = made(tmp_path / "pool", []), made(tmp_path / "run", stored)
    process = subprocess.Popen([sys.executable, "-c", MERGER, run, pool], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 40:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with TrajectoryStore.open(run) as source, TrajectoryStore.open(pool, write=True) as store:
        before = len(store)
        assert before > 10
        report = merge(source, store)
        assert (report.known, report.added) == (before, 60 - before)
        for row, trajectory in enumerate(stored):
            assert_same(store.read(row), trajectory)


def test_the_command_takes_runs_and_stores_and_says_what_it_did(tmp_path: Path, capsys) -> None:
    made(tmp_path / "run" / "online", [rich(0, 5, SPEC), rich(1, 5, SPEC)])
    other = made(tmp_path / "other", [rich(2, 5, SPEC)], "lz4")
    pool = tmp_path / "pool"
    assert cli.main(["store", "merge", str(tmp_path / "run"), str(other), "--into", str(pool)]) == 0
    assert capsys.readouterr().err.count(" added, 0 known before, 0 not taken.") == 2
    with TrajectoryStore.open(pool) as store, TrajectoryStore.open(other) as source:
        assert len(store) == 3
        np.testing.assert_array_equal(store.read(2).action, source.read(0).action)
    assert cli.main(["store", "merge", str(tmp_path / "nothing"), "--into", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
