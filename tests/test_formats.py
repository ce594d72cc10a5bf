"""Every format comes out in our alignment: what is ingested is what the counting environment played."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gsa.errors import UsageError
from gsa.schema import ArraySpec
from retrieval.ingest import Options, ingest
from retrieval.store import TrajectoryStore
from tests.datasets import Play, assert_aligned, play, write_lerobot, write_minari, write_robomimic

PLAYS = [play(seed, steps) for seed, steps in ((1, 8), (2, 5), (3, 9))]
TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore.create(tmp_path / "store")


def assert_all(store: TrajectoryStore, plays: list[Play] = PLAYS, lost: int = 0) -> None:
    assert len(store) == len(plays)
    for row, played in enumerate(plays):
        assert_aligned(store.read(row), played, len(played.action) - lost)


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "chunks": (3, 64, 64, 3)}], ids=["plain", "gzip"])
def test_robomimic(tmp_path: Path, store: TrajectoryStore, options: dict) -> None:
    write_robomimic(tmp_path / "lift" / "image.hdf5", PLAYS, **options)
    report = ingest(tmp_path / "lift", store)
    assert (report.added, report.failed) == (3, [])
    assert_all(store)
    found, spec = store.read(0), store.spec(0)
    assert (spec.embodiment, spec.control_hz, found.source) == ("robomimic/panda", 20, "robomimic/Lift/image")
    assert found.reward is not None
    assert found.reward.tolist() == PLAYS[0].reward.tolist()
    assert set(found.discount) == {1}  # `dones` ends a demonstration, not the task


def test_robomimic_without_next_obs_leaves_out_the_last_action(tmp_path: Path, store: TrajectoryStore) -> None:
    write_robomimic(tmp_path / "image.hdf5", PLAYS, next_obs=False)
    assert ingest(tmp_path / "image.hdf5", store).failed == []
    assert_all(store, lost=1)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("jpeg", [True, False], ids=["jpeg", "raw"])
def test_minari(tmp_path: Path, store: TrajectoryStore, data_format: str, jpeg: bool) -> None:
    write_minari(tmp_path / "counting-v0", PLAYS, data_format, jpeg)
    report = ingest(tmp_path / "counting-v0", store, options=Options(embodiment="test/counter"))
    assert (report.added, report.failed) == (3, [])
    assert_all(store)
    found = store.read(1)
    assert found.source == "test/counting-v0"
    assert found.reward is not None
    assert found.reward.tolist() == PLAYS[1].reward.tolist()


def test_minari_knows_a_true_end_from_a_time_limit(tmp_path: Path) -> None:
    for ends in (False, True):
        write_minari(tmp_path / f"{ends}", PLAYS, ends=ends)
        with TrajectoryStore.create(tmp_path / f"store-{ends}") as store:
            ingest(tmp_path / f"{ends}", store, options=Options(embodiment="test/counter"))
            assert store.read(0).discount.tolist() == [1] * 7 + [0 if ends else 1]


def test_minari_scales_actions_from_the_action_space_and_says_so(tmp_path: Path, store: TrajectoryStore) -> None:
    write_minari(tmp_path / "d", PLAYS, scale=40, env="Pendulum-v1")
    assert ingest(tmp_path / "d", store).failed == []
    assert_all(store)
    assert store.spec(0).embodiment == "gym/Pendulum-v1"
    line = json.loads((store.path / "ingested.jsonl").read_text())
    assert line["actions"] == {
        "gym/Pendulum-v1": {"low": [-40, -40], "high": [40, 40], "origin": "the action space"}
    }  # fmt: skip


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
@pytest.mark.parametrize("per_file", [1, 3])
def test_lerobot_video(tmp_path: Path, store: TrajectoryStore, codec: str, per_file: int) -> None:
    write_lerobot(tmp_path / "lab", PLAYS, per_file=per_file, codec=codec)
    report = ingest(tmp_path / "lab", store)
    assert (report.added, report.failed) == (3, [])
    assert_all(store)  # not what was recorded at the last observation: where it led to is not known
    found, spec = store.read(2), store.spec(2)
    assert (spec.embodiment, spec.control_hz, found.source) == ("lerobot/so100", 20, "lerobot/lab/count to 10")
    assert found.reward is not None
    assert found.reward.tolist() == PLAYS[2].reward.tolist()


def test_lerobot_images_in_parquet(tmp_path: Path, store: TrajectoryStore) -> None:
    write_lerobot(tmp_path / "lab", PLAYS, embedded=True)
    assert ingest(tmp_path / "lab", store).failed == []
    assert_all(store)


def test_cameras_and_vectors_are_taken_under_the_names_given_and_resized(
    tmp_path: Path, store: TrajectoryStore
) -> None:
    write_lerobot(tmp_path / "lab", PLAYS, cameras=(TOP, WRIST))
    with pytest.raises(UsageError, match=f"several cameras: {TOP}, {WRIST}. Say which"):
        ingest(tmp_path / "lab", store)
    names = (f"pixels={TOP}", f"wrist={WRIST}", "joints=observation.state")
    options = Options(names, resize=32, embodiment="lab/arm", action_repeat=3, drop_rewards=True)
    assert ingest(tmp_path / "lab", store, options=options).failed == []
    assert store.specs["lab/arm"].observation == {
        "pixels": ArraySpec((32, 32, 3), "uint8"), "wrist": ArraySpec((32, 32, 3), "uint8"),
        "joints": ArraySpec((3,), "float32"),
    }  # fmt: skip
    assert store.specs["lab/arm"].action_repeat == 3
    for row, played in enumerate(PLAYS):
        found = store.read(row)
        assert found.reward is None
        assert_aligned(found, played)
        np.testing.assert_array_equal(found.observation["joints"], played.state)
        assert np.abs(found.observation["wrist"][:, ::-1, ::-1].astype(int) - found.observation["pixels"]).max() < 12


def test_an_unknown_observation_is_named(tmp_path: Path, store: TrajectoryStore) -> None:
    write_lerobot(tmp_path / "lab", PLAYS)
    with pytest.raises(UsageError, match=r"'observation.images.tip'. Did you mean observation.images.top"):
        ingest(tmp_path / "lab", store, options=Options(("pixels=observation.images.tip",)))
