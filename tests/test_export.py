"""Export: what is written is what others read, and ingesting it gives the store back."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import minari
import numpy as np
import pytest

from gsa.errors import UsageError
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval.export import export
from retrieval.ingest import ingest
from retrieval.store import TrajectoryStore
from tests.test_store import assert_same
from tests.trajectories import counting, counting_spec

SPECS = [counting_spec("dmc/walker"), counting_spec("lab/arm", action_dim=3)]


def stored(index: int, spec: Spec) -> Trajectory:
    """With and without reward, ending and cut off, of two sources, with ids that are hexadecimal and not."""
    trajectory = counting(index, 5 + index, spec, with_reward=index % 2 == 0, ends=index % 3 == 0)
    id = trajectory.id if index % 2 else f"run-7/episode_{index}"
    return dataclasses.replace(trajectory, source=f"{spec.embodiment}/s{index % 2}", id=id, stats={"return": index / 3})


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    with TrajectoryStore.create(tmp_path / "store") as writable:
        for i in range(6):
            writable.append(stored(i, SPECS[i % 2]), SPECS[i % 2])
    return TrajectoryStore.open(tmp_path / "store")


def assert_comes_back(store: TrajectoryStore, out: Path, stats: bool) -> None:
    with TrajectoryStore.create(out.parent / "again") as again:
        for source in sorted({p.parent.parent for p in out.rglob("main_data.hdf5")}) or [out]:
            assert ingest(source, again).failed == []
        assert again.specs == store.specs
        assert len(again) == len(store)
        for row in range(len(store)):
            theirs = store.read(row)
            ours = again.read(again.find(theirs.id))
            assert_same(ours, theirs if stats else dataclasses.replace(theirs, stats={}))


def test_npz_comes_back_equal_with_the_references_names_and_alignment(tmp_path: Path, store: TrajectoryStore) -> None:
    report = export(store, tmp_path / "out", "npz")
    assert (report.written, report.without_reward, report.failed) == (6, 3, [])
    files = sorted((tmp_path / "out").rglob("*.npz"))
    for path in files:
        _, digits, row, length = path.stem.split("-")
        assert int(digits, 16) >= 0
        assert store.catalog.length[int(row)] == int(length)
        with np.load(path) as arrays:
            assert len(arrays["observation"]) == len(arrays["action"]) == int(length) + 1
            np.testing.assert_array_equal(arrays["action"][1:], store.read(int(row)).action)
            assert arrays["observation"].shape[1] == 3
    assert_comes_back(store, tmp_path / "out", stats=False)


def test_an_interrupted_npz_export_goes_on(tmp_path: Path, store: TrajectoryStore) -> None:
    def interrupt(done: int, total: int, numbers: object) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / "out", "npz", interrupt)
    report = export(store, tmp_path / "out", "npz")
    assert (report.kept, report.written) == (4, 2)


def test_minari_reads_what_is_exported_and_it_comes_back_equal(
    tmp_path: Path, store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = export(store, tmp_path / "out", "minari")
    assert (report.written, report.without_reward) == (6, 3)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "out"))
    dataset = minari.load_dataset("dmc/walker-v0")
    assert dataset.total_episodes == 3
    for episode, row in zip(dataset.iterate_episodes(), (0, 2, 4), strict=True):
        theirs = store.read(row)
        np.testing.assert_array_equal(episode.observations["pixels"], theirs.observation["pixels"])
        np.testing.assert_array_equal(episode.actions, theirs.action)
        np.testing.assert_array_equal(episode.rewards, theirs.reward)
        assert episode.terminations.tolist() == (theirs.discount == 0).tolist()
        assert episode.truncations[-1] == (theirs.discount[-1] == 1)
    assert_comes_back(store, tmp_path / "out", stats=True)


def test_a_minari_export_is_whole_or_not_there(tmp_path: Path, store: TrajectoryStore) -> None:
    def interrupt(done: int, total: int, numbers: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / "out", "minari", interrupt)
    assert not (tmp_path / "out").exists()
    export(store, tmp_path / "out", "minari")
    assert sorted(os.listdir(tmp_path)) == ["out", "store"]
    with pytest.raises(UsageError, match="is there already"):
        export(store, tmp_path / "out", "minari")


def test_what_a_format_cannot_hold_is_said(tmp_path: Path, store: TrajectoryStore) -> None:
    spec = dataclasses.replace(SPECS[0], observation={**SPECS[0].observation, "state": ArraySpec((2,), "float32")})
    one = stored(0, SPECS[0])
    both = dataclasses.replace(
        one, observation={**one.observation, "state": np.arange(12, dtype=np.float32).reshape(6, 2)},
        discount=np.full(5, 0.5, np.float32),
    )  # fmt: skip
    with TrajectoryStore.create(tmp_path / "both") as other:
        other.append(both, spec)
        with pytest.raises(UsageError, match="pixels, state, and an npz holds one"):
            export(other, tmp_path / "out", "npz")
        assert not (tmp_path / "out").exists()
        assert export(other, tmp_path / "out", "npz", observation="state").written == 1
        ((id, reason),) = export(other, tmp_path / "minari", "minari").failed
        assert id == both.id
        assert "neither 0 nor 1" in reason
    with TrajectoryStore.create(tmp_path / "again") as again:
        ingest(tmp_path / "out", again)
        np.testing.assert_array_equal(again.read(0).observation["state"], both.observation["state"])
    shutil.rmtree(tmp_path / "out")
    assert export(store, tmp_path / "out", "npz", embodiment="lab/arm").written == 3
