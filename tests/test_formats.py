"""Every format comes out in our alignment: what is ingested is what the counting environment played."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from gsa.errors import UsageError
from gsa.schema import ArraySpec
from retrieval.formats.images import channels_last, resized
from retrieval.formats.isolated import Isolated
from retrieval.ingest import Options, ingest, open_source
from retrieval.merge import merge
from retrieval.store import TrajectoryStore
from tests.datasets import Play, assert_aligned, play, write_lerobot, write_minari, write_robomimic
from tests.test_ingest import record, save

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


def test_a_folder_of_several_minari_datasets_is_not_taken_for_robomimic(tmp_path: Path, store: TrajectoryStore) -> None:
    for version in ("v0", "v1"):
        write_minari(tmp_path / "door" / version, PLAYS[:1])
    with pytest.raises(UsageError, match=r"none of .*Seen: 2 .* files and 2 .* files"):
        ingest(tmp_path / "door", store)


def test_an_unknown_observation_is_named(tmp_path: Path, store: TrajectoryStore) -> None:
    write_lerobot(tmp_path / "lab", PLAYS)
    with pytest.raises(UsageError, match=r"'observation.images.tip'. Did you mean observation.images.top"):
        ingest(tmp_path / "lab", store, options=Options(("pixels=observation.images.tip",)))


def test_exorl_by_its_folders(tmp_path: Path, store: TrajectoryStore) -> None:
    arrays = record()
    arrays["observation"] = np.arange((len(arrays["action"])) * 24, dtype=np.float64).reshape(-1, 24)
    save(tmp_path / "walker" / "proto" / "buffer", "episode_000000_9.npz", **arrays)
    assert ingest(tmp_path / "walker", store).failed == []
    found = store.read(0)
    assert (found.embodiment, found.source, store.spec(0).action_repeat) == ("dmc/walker", "exorl/walker/proto", 1)
    np.testing.assert_array_equal(found.observation["state"], arrays["observation"])
    np.testing.assert_array_equal(found.action, arrays["action"][1:])


def test_an_ingestion_that_was_killed_goes_on_within_a_large_file(tmp_path: Path) -> None:
    plays = [play(seed, 6) for seed in range(1, 13)]
    write_robomimic(tmp_path / "many.hdf5", plays)
    code = (
        "import sys\nfrom retrieval.ingest import ingest\nfrom retrieval import ingest as module\n"
        "from retrieval.store import TrajectoryStore\nmodule.COMMIT_S = 0\n"
        f"with TrajectoryStore.create({str(tmp_path / 'pool')!r}) as store:\n"
        f"    ingest({str(tmp_path / 'many.hdf5')!r}, store, progress=lambda *a: print(a[0], flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 5:
                process.kill()
                break
    with TrajectoryStore.open(tmp_path / "pool", write=True) as store:
        had = len(store)
        assert 4 <= had < 12
        report = ingest(tmp_path / "many.hdf5", store)
        assert (report.skipped_known, report.added, report.failed) == (had, 12 - had, [])
        assert_all(store, plays)
        assert store.verify() == []


def test_parallel_decoding_changes_nothing(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "many.hdf5", PLAYS)
    crcs = []
    for jobs in (1, 3):
        with TrajectoryStore.create(tmp_path / f"pool-{jobs}") as store:
            ingest(tmp_path / "many.hdf5", store, jobs=jobs)
            crcs.append((store.catalog.crc.tolist(), [store.catalog.id(row) for row in range(3)]))
    assert crcs[0] == crcs[1]


def test_a_grown_dataset_adds_what_is_new(tmp_path: Path, store: TrajectoryStore) -> None:
    write_lerobot(tmp_path / "a" / "lab", PLAYS[:2])
    write_lerobot(tmp_path / "b" / "lab", PLAYS)
    assert ingest(tmp_path / "a" / "lab", store).added == 2
    report = ingest(tmp_path / "b" / "lab", store)
    assert (report.skipped_known, report.added) == (2, 1)


def test_a_robots_actions_are_scaled_from_the_same_bounds_for_good(tmp_path: Path, store: TrajectoryStore) -> None:
    write_lerobot(tmp_path / "a", PLAYS[:2], scale=30)
    write_lerobot(tmp_path / "b", PLAYS[1:], scale=30)
    ingest(tmp_path / "a", store)
    half = Options(action_low=(-60,), action_high=(60,))
    with pytest.raises(UsageError, match=r"scaled from \[-30, -30\] to \[30, 30\].*would be from \[-60\] to \[60\]"):
        ingest(tmp_path / "b", store, options=half)
    with TrajectoryStore.create(tmp_path / "other") as other:
        ingest(tmp_path / "b", other, options=half)
        np.testing.assert_allclose(other.read(0).action, PLAYS[1].action / 2, atol=1e-6)
        for take in (lambda: ingest(tmp_path / "other", store), lambda: merge(other, store)):
            with pytest.raises(UsageError, match=r"lerobot/so100 .* scaled from \[-30, -30\]"):
                take()
    write_lerobot(tmp_path / "c", PLAYS[2:])  # as it is, in [-1, 1]
    assert ingest(tmp_path / "c", store).added == 1


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_robomimic(tmp_path / "a.hdf5", PLAYS)
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"needs about 0.0 GB.*0.0 GB free: make room"):
        ingest(tmp_path / "a.hdf5", store)
    assert len(store) == 0
    assert ingest(tmp_path / "a.hdf5", store, options=Options(resize=8)).added == 3


def test_images_are_resized_by_the_mean_of_the_area_and_have_three_channels() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (128, 192, 3), np.uint8)
    mean = image.reshape(64, 2, 64, 3, 3).astype(np.float64).mean((1, 3))
    assert np.abs(resized(image, 64) - mean).max() <= 1
    for given in (image, image.transpose(2, 0, 1), np.dstack([image, image[..., :1]])):
        np.testing.assert_array_equal(channels_last(given), image)
    grey = image[..., 0]
    for given in (grey, grey[..., None], grey[None]):
        np.testing.assert_array_equal(channels_last(given), np.dstack([grey] * 3))


def test_large_images_are_never_in_memory_together(tmp_path: Path) -> None:
    """370 MB of camera images, resized on the way."""
    write_robomimic(tmp_path / "a.hdf5", PLAYS[:1], next_obs=False)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        del file["data/demo_0/obs/agentview_image"], file["data/demo_0/actions"], file["data/demo_0/rewards"]
        file.create_dataset("data/demo_0/obs/agentview_image", (400, 480, 640, 3), "u1", chunks=(1, 480, 640, 3))
        file["data/demo_0/actions"], file["data/demo_0/rewards"] = np.zeros((400, 2)), np.zeros(400)
    options = Options(("pixels=agentview_image",), resize=64)
    with contextlib.closing(open_source(tmp_path / "a.hdf5", options=options)) as source:
        assert isinstance(source, Isolated)
        assert len(source.load(0).trajectory) == 399
        status = Path(f"/proc/{source._idle[0]._process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 300_000  # type: ignore[index]
