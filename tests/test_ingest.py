"""Ingestion: the reference's files come out aligned our way, and no file can do harm."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gsa.errors import FormatError, UsageError
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval.formats.npz import read_npz
from retrieval.ingest import forecast, ingest, write_npz
from retrieval.store import TrajectoryStore
from tests.test_store import assert_same, rich
from tests.trajectories import counting, counting_spec

STEPS = 9


class Counter:
    """A simulator whose image is its step counter, each corner in another colour, and that records as the reference
    does: a row an observation, with the action that led to it."""

    def __init__(self, episode: int = 0) -> None:
        self.t, self.episode = 0, episode

    def observation(self) -> np.ndarray:
        image = np.zeros((3, 64, 64), np.uint8)
        image[0, 0, 0], image[1, 0, 63], image[2, 63, 0] = self.t, self.t, self.t
        image[0, 5, 9] = 200 + self.episode
        return image

    def step(self, action: np.ndarray) -> np.ndarray:
        assert round(float(action[0]) * 100) == self.t  # the action encodes the step it is taken at
        self.t += 1
        return self.observation()


def record(episode: int = 0, steps: int = STEPS) -> dict[str, np.ndarray]:
    simulator = Counter(episode)
    rows = [(simulator.observation(), np.zeros(2, np.float32), 0.0, 1.0)]
    for t in range(steps):
        action = np.asarray([t / 100, 1], np.float32)
        rows.append((simulator.step(action), action, 10.0 + t, float(t < steps - 1)))
    observation, action, reward, discount = zip(*rows, strict=True)
    return {
        "observation": np.stack(observation),
        "action": np.stack(action),
        "reward": np.asarray(reward, np.float32)[:, None],
        "discount": np.asarray(discount, np.float32)[:, None],
    }


def save(folder: Path, name: str = "20240101T000000-ab-0-9.npz", **arrays: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / name, **arrays)
    return folder / name


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore.create(tmp_path / "store")


def test_observation_t_plus_1_follows_action_t(tmp_path: Path, store: TrajectoryStore) -> None:
    save(tmp_path / "dmcontrol" / "walker", **record())
    assert ingest(tmp_path, store).failed == []
    found = store.read(0)
    assert len(found) == STEPS
    pixels = found.observation["pixels"]
    for t in range(STEPS):
        assert round(float(found.action[t, 0]) * 100) == t == pixels[t, 0, 0, 0] == pixels[t + 1, 0, 0, 0] - 1
        assert found.reward is not None
        assert found.reward[t] == 10 + t
    assert found.discount.tolist() == [1] * (STEPS - 1) + [0]
    assert pixels.shape == (STEPS + 1, 64, 64, 3)  # row, column, channel: each colour in its corner
    assert (pixels[5, 0, 0, 0], pixels[5, 0, 63, 1], pixels[5, 63, 0, 2]) == (5, 5, 5)


def test_where_a_file_lies_says_what_it_is_of(tmp_path: Path, store: TrajectoryStore) -> None:
    save(tmp_path / "pool" / "dmcontrol" / "walker", **record(0))
    save(tmp_path / "pool" / "metaworld" / "door-open-v2" / "deeper", **record(1))
    report = ingest(tmp_path / "pool", store)
    assert (report.added, report.steps) == (2, 2 * STEPS)
    by_embodiment = {name: list(entry["sources"]) for name, entry in store.info().items()}
    assert by_embodiment == {"dmc/walker": ["dmc/walker"], "metaworld/sawyer": ["metaworld/door-open-v2"]}
    assert store.specs["metaworld/sawyer"].action_repeat == 2


def test_a_spec_beside_the_files_or_above_them_says_what_they_are(tmp_path: Path, store: TrajectoryStore) -> None:
    outer = Spec("robot/a", {"camera": ArraySpec((64, 64, 3), "uint8")}, 2, 4, 12.5, "fast mujoco-3.11.0")
    inner = dataclasses.replace(outer, embodiment="robot/b")
    for folder, spec, source in (("pool", outer, "lab"), ("pool/b", inner, "field")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "spec.json").write_text(json.dumps(spec.to_json() | {"source": source}))
    save(tmp_path / "pool" / "a" / "deep", **record(0))
    save(tmp_path / "pool" / "b", **record(1))
    assert ingest(tmp_path / "pool", store).failed == []
    assert store.specs == {"robot/a": outer, "robot/b": inner}
    assert [store.catalog.source(row) for row in range(2)] == ["lab", "field"]
    assert store.read(0).observation["camera"][3, 0, 0, 0] == 3


def test_a_spec_above_the_folder_given_is_not_looked_for(tmp_path: Path, store: TrajectoryStore) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(counting_spec().to_json()))
    save(tmp_path / "pool", **record())
    ((_, reason),) = ingest(tmp_path / "pool", store).failed
    assert "spec.json beside it" in reason


def test_ingesting_again_adds_only_what_is_new_wherever_it_lies_now(tmp_path: Path, store: TrajectoryStore) -> None:
    folder = tmp_path / "dmcontrol" / "walker"
    for i in range(3):
        save(folder, f"{i}.npz", **record(i))
    assert ingest(tmp_path / "dmcontrol", store).added == 3
    save(folder, "3.npz", **record(3))
    (folder / "1.npz").rename(folder / "moved.npz")
    report = ingest(tmp_path / "dmcontrol", store)
    assert (report.added, report.skipped_known, report.failed) == (1, 3, [])
    assert len(store) == 4


def test_the_same_episode_twice_in_one_source_is_taken_once(tmp_path: Path, store: TrajectoryStore) -> None:
    for name in ("a.npz", "b.npz"):
        save(tmp_path / "dmcontrol" / "walker", name, **record())
    report = ingest(tmp_path / "dmcontrol", store)
    assert (report.added, report.skipped_known, len(store)) == (1, 1, 1)


def test_an_interrupted_ingestion_continues(tmp_path: Path, store: TrajectoryStore) -> None:
    for i in range(5):
        save(tmp_path / "dmcontrol" / "walker", f"{i}.npz", **record(i))

    def interrupt(done: int, total: int, numbers: Any) -> None:
        assert total == 5
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "dmcontrol", store, progress=interrupt)
    assert len(store) == 2
    assert ingest(tmp_path / "dmcontrol", store).added == 3


def test_actions_beyond_the_action_space_are_clipped_as_simulators_do_and_counted(
    tmp_path: Path, store: TrajectoryStore
) -> None:
    arrays = record()
    arrays["action"] = arrays["action"] * 3
    save(tmp_path / "dmcontrol" / "walker", **arrays)
    assert ingest(tmp_path, store).clipped == 1
    assert np.abs(store.read(0).action).max() == 1


def test_exorl_states_and_extra_arrays(tmp_path: Path, store: TrajectoryStore) -> None:
    arrays = record()
    arrays["observation"] = np.arange((STEPS + 1) * 24, dtype=np.float64).reshape(STEPS + 1, 24)
    arrays["action"] = np.asfortranarray(arrays["action"].astype(np.float64))
    arrays["reward"] = arrays["reward"][:, 0]
    save(tmp_path / "dmcontrol" / "walker", physics=np.zeros((STEPS + 1, 18)), **arrays)
    assert ingest(tmp_path, store).failed == []
    found = store.read(0)
    assert found.observation["state"].dtype == np.float32
    np.testing.assert_array_equal(found.observation["state"][4], np.arange(24) + 4 * 24)
    np.testing.assert_array_equal(found.action, arrays["action"][1:].astype(np.float32))


def test_what_is_written_is_the_references_layout_and_reads_back(tmp_path: Path, store: TrajectoryStore) -> None:
    arrays = record()
    save(tmp_path / "dmcontrol" / "walker", **arrays)
    ingest(tmp_path / "dmcontrol", store)
    write_npz(tmp_path / "out.npz", store.read(0), with_reward=True)
    with np.load(tmp_path / "out.npz") as written:
        assert list(written) == ["observation", "action", "discount", "reward"]
        for key, value in arrays.items():
            np.testing.assert_array_equal(written[key], value)
            assert written[key].dtype == value.dtype
    write_npz(tmp_path / "free.npz", store.read(0))
    assert read_npz(tmp_path / "free.npz").reward is None


def test_equal_trajectories_give_equal_files_and_a_failure_leaves_none(tmp_path: Path) -> None:
    trajectory = counting(1, 5, counting_spec())
    for name in ("a", "b"):
        write_npz(tmp_path / f"{name}.npz", trajectory, with_reward=True)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with pytest.raises(UsageError, match="no reward"):
        write_npz(tmp_path / "c.npz", dataclasses.replace(trajectory, reward=None), with_reward=True)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


def test_a_store_is_merged_into_another_with_ids_and_stats(tmp_path: Path) -> None:
    specs = [counting_spec("toy/a"), counting_spec("toy/b", action_dim=3)]
    stored = [rich(i, 20, specs[i % 2]) for i in range(6)]
    with TrajectoryStore.create(tmp_path / "a") as a, TrajectoryStore.create(tmp_path / "b", "zstd") as b:
        for i, trajectory in enumerate(stored):
            a.append(trajectory, specs[i % 2])
        b.append(stored[4], specs[0])
        assert len(forecast(tmp_path / "a").entries) == 6
        report = ingest(tmp_path / "a", b)
        assert (report.added, report.skipped_known) == (5, 1)
        for trajectory in stored:
            assert_same(b.read(b.find(trajectory.id)), trajectory)


def test_forecast_counts_what_is_there_without_unpacking_it(tmp_path: Path) -> None:
    save(tmp_path / "dmcontrol" / "walker", **record())
    (tmp_path / "dmcontrol" / "walker" / "bad.npz").write_bytes(b"PK")
    found = forecast(tmp_path)
    assert (len(found.entries), len(found.failed)) == (1, 1)
    assert (STEPS + 1) * 64 * 64 * 3 < found.bytes < (STEPS + 1) * 64 * 64 * 3 + 5000


def test_nothing_to_ingest_is_said(tmp_path: Path, store: TrajectoryStore) -> None:
    with pytest.raises(UsageError, match="no such file"):
        ingest(tmp_path / "nowhere", store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no file in it"):
        ingest(tmp_path / "empty", store)
    (tmp_path / "empty" / "a.csv").touch()
    with pytest.raises(UsageError, match=r"none of .* a LeRobot dataset, .*Seen: 1 .csv file"):
        ingest(tmp_path / "empty", store)
    with pytest.raises(UsageError, match=r"no npz in it. Seen: 1 .csv file"):
        ingest(tmp_path / "empty", store, format="npz")
    with pytest.raises(UsageError, match=r"'hdf'.*Known: auto, exorl, lerobot, minari, npz, robomimic, store"):
        ingest(tmp_path, store, format="hdf")


# Files that are not what they say


def npy(shape: tuple[int, ...], descr: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An npy file of that header, whatever follows it."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + content


def packed(**members: bytes | np.ndarray) -> bytes:
    """An npz of those members, beside a sound episode's."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in {**record(episode=5), **members}.items():
            if isinstance(value, np.ndarray):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, value)
                value = buffer.getvalue()
            archive.writestr(f"{name}.npy", value)
    return out.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch /tmp/gsa-pickle-was-run",)


def with_nan(name: str) -> bytes:
    values = record()[name]
    values[3] = np.nan
    return packed(**{name: values})


def cut(content: bytes, size: int) -> bytes:
    return content[:size]


def flipped(content: bytes) -> bytes:
    """With a bit of the packed observation changed."""
    at = content.index(b"observation.npy") + 200
    return content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :]


rows = STEPS + 1
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle": (lambda: packed(action=np.asarray([Bomb()] * rows, object)), "dtype object"),
    "a bomb of zeros": (lambda: packed(observation=npy((1 << 14, 3, 64, 64), "|u1", bytes(1 << 24))), "observations"),
    "a bomb beyond the limit": (lambda: packed(observation=npy((1 << 20, 3, 64, 64), "|u1")), "at most"),
    "an absurd shape": (lambda: packed(observation=npy((1 << 62, 1 << 62), "<f4")), "at most"),
    "a negative shape": (lambda: packed(action=npy((-rows, 2), "<f4")), "dtype|action"),
    "a huge header": (lambda: packed(action=npy((1,) * 20_000, "<f4", version=b"\x02\x00")), "bad"),
    "code for a header": (lambda: packed(action=b"\x93NUMPY\x01\x00\x10\x00__import__('os')"), "bad"),
    "an unknown npy version": (lambda: packed(action=npy((rows, 2), "<f4", version=b"\x09\x00")), "npy version"),
    "less than the header promises": (lambda: packed(action=npy((rows, 2), "<f4", bytes(7))), "promises 80"),
    "more than the header promises": (lambda: packed(action=npy((rows, 2), "<f4", bytes(99))), "promises 80"),
    "NaN actions": (lambda: with_nan("action"), "NaN"),
    "NaN rewards": (lambda: with_nan("reward"), "reward has NaN"),
    "integer actions": (lambda: packed(action=np.zeros((rows, 2), np.uint8)), "action is"),
    "complex actions": (lambda: packed(action=np.zeros((rows, 2), np.complex64)), "dtype complex64"),
    "float images": (lambda: packed(observation=np.zeros((rows, 3, 8, 8), np.float32)), "observation is"),
    "channels last": (lambda: packed(observation=np.zeros((rows, 64, 64, 3), np.uint8)), "observation is"),
    "one row too few": (lambda: packed(action=np.zeros((STEPS, 2), np.float32)), "does not fit 10"),
    "scalar actions": (lambda: packed(action=np.zeros(rows, np.float32)), "action is"),
    "no actions": (lambda: packed(action=np.zeros((rows, 0), np.float32)), "action_dim"),
    "one observation": (lambda: packed(observation=np.zeros((1, 3, 8, 8), np.uint8)), "at least 2"),
    "cut in the middle": (lambda: cut(packed(), 300), "bad"),
    "cut at the end": (lambda: cut(packed(), -3), "bad"),
    "nothing": (lambda: b"", "bad"),
    "not a zip": (lambda: b"\x93NUMPY" * 100, "bad"),
    "a flipped bit": (lambda: flipped(packed()), "bad"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_named_and_the_rest_ingested(tmp_path: Path, store: TrajectoryStore, name: str) -> None:
    make, reason = HOSTILE[name]
    folder = tmp_path / "dmcontrol" / "walker"
    for i in range(2):
        save(folder, f"good{i}.npz", **record(i))
    (folder / "good0bad.npz").write_bytes(make())
    report = ingest(tmp_path / "dmcontrol", store)
    assert report.added == 2
    ((file, said),) = report.failed
    assert file == "walker/good0bad.npz"
    assert re.search(reason, said), said
    assert not Path("/tmp/gsa-pickle-was-run").exists()
    assert store.verify() == []


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, observation=record()["observation"])
    with pytest.raises(FormatError, match="no action and no discount"):
        read_npz(path)


def test_a_bomb_does_not_take_memory(tmp_path: Path) -> None:
    """250 MB of zeros in 250 kB, with a shape that does not fit the other arrays: refused from the headers."""
    header = npy((250_000_000 // (3 * 64 * 64), 3, 64, 64), "|u1")
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("observation.npy", "w", force_zip64=True) as member:
            member.write(header)
            for _ in range(250):
                member.write(bytes(1_000_000))
        for name, value in record().items():
            if name != "observation":
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, value)
                archive.writestr(f"{name}.npy", buffer.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match="does not fit"):
        read_npz(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_fifo_is_not_waited_for(tmp_path: Path, store: TrajectoryStore) -> None:
    save(tmp_path / "dmcontrol" / "walker", **record())
    os.mkfifo(tmp_path / "dmcontrol" / "walker" / "pipe.npz")
    assert ingest(tmp_path / "dmcontrol", store).added == 1


def test_a_spec_that_is_none_fails_its_files_by_name(tmp_path: Path, store: TrajectoryStore) -> None:
    for i, content in enumerate((b"{", b"[]", b'{"embodiment": 3}', b"\xff")):
        folder = tmp_path / "pool" / str(i)
        save(folder, **record(i))
        (folder / "spec.json").write_bytes(content)
    report = ingest(tmp_path / "pool", store)
    assert (report.added, len(report.failed)) == (0, 4)


def test_the_data_half_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, retrieval.ingest, retrieval.retriever\nassert not {'torch', 'ray'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trajectories_of_one_observation_only_fit_an_npz(tmp_path: Path) -> None:
    one = counting(0, 3, counting_spec())
    two = Trajectory(
        "toy/a", {**one.observation, "state": np.zeros((4, 2), np.float32)}, one.action, one.discount
    )  # fmt: skip
    with pytest.raises(UsageError, match="one observation"):
        write_npz(tmp_path / "x.npz", two)
