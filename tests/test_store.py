"""The trajectory store: what goes in comes out, whatever the codec, the process and the order."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.schema import ArraySpec, Controller, Spec, Trajectory
from retrieval import writer
from retrieval.files import WholeFile
from retrieval.layout import CODECS
from retrieval.store import TrajectoryStore
from tests.trajectories import counting, counting_spec

OPTIONAL = ("reward", "controller", "policy_version")


def assert_same(found: Trajectory, stored: Trajectory) -> None:
    for key in ("embodiment", "id", "source"):
        assert getattr(found, key) == getattr(stored, key)
    assert dict(found.stats) == dict(stored.stats)
    assert set(found.observation) == set(stored.observation)
    for key, value in stored.observation.items():
        np.testing.assert_array_equal(found.observation[key], value)
    for key in ("action", "discount", *OPTIONAL):
        value = getattr(stored, key)
        assert (getattr(found, key) is None) == (value is None)
        if value is not None:
            np.testing.assert_array_equal(getattr(found, key), value)
            assert getattr(found, key).dtype == value.dtype


def rich(index: int, steps: int, spec: Spec) -> Trajectory:
    """A trajectory that has everything."""
    return dataclasses.replace(
        counting(index, steps, spec),
        controller=np.full(steps, Controller.PRIOR, np.uint8),
        policy_version=np.arange(-1, steps - 1, dtype=np.int64),
        source=f"toy/source-{index % 3}",
        stats={"return": 0.1 + index, "score": 1e-7},
    )


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_appended_is_read_back_now_and_after_reopening(tmp_path: Path, codec: str) -> None:
    spec = counting_spec()
    lengths = [1, 2, 62, 63, 64, 65, 127, 128, 200]  # on both sides of a compressed record batch
    stored = [rich(i, n, spec) for i, n in enumerate(lengths)]
    stored += [counting(i + 50, n, spec, with_reward=False, ends=True) for i, n in enumerate(lengths)]
    with TrajectoryStore.create(tmp_path / "s", codec) as store:
        assert [store.append(t, spec) for t in stored] == list(range(len(stored)))
        for row, trajectory in enumerate(stored):
            assert_same(store.read(row), trajectory)
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert store.codec == codec
        assert store.recovery == []
        assert store.verify() == []
        for row, trajectory in enumerate(stored):
            assert_same(store.read(row), trajectory)


@pytest.mark.parametrize("codec", CODECS)
def test_a_slice_is_its_observations_and_the_steps_between_them(tmp_path: Path, codec: str) -> None:
    spec, steps = counting_spec(), 150
    trajectory = rich(3, steps, spec)
    with TrajectoryStore.create(tmp_path / "s", codec) as store:
        row = store.append(trajectory, spec)
        for start, stop in [(0, 1), (0, 64), (63, 65), (60, 124), (64, 128), (87, 151), (150, 151), (0, 151)]:
            part = store.slice(row, start, stop)
            np.testing.assert_array_equal(part["pixels"], trajectory.observation["pixels"][start:stop])
            for key in ("action", "discount", *OPTIONAL):
                np.testing.assert_array_equal(part[key], getattr(trajectory, key)[start : stop - 1])
        for start, stop in [(-1, 3), (3, 3), (5, 3), (100, 152), (151, 152)]:
            with pytest.raises(UsageError, match="150 steps"):
                store.slice(row, start, stop)


def test_a_slice_without_a_codec_is_a_view_that_nobody_can_write_to(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(counting(0, 10, spec), spec)
        first, second = store.slice(0, 2, 6)["pixels"], store.slice(0, 0, 11)["pixels"]
        assert np.shares_memory(first, second)
        with pytest.raises(ValueError, match="read-only"):
            first[:] = 0
    np.testing.assert_array_equal(first, second[2:6])  # alive although the store is closed


def test_slices_of_a_store_larger_than_what_is_touched_stay_on_disk(tmp_path: Path) -> None:
    spec = Spec("toy/large", {"pixels": ArraySpec((64, 64, 3), "uint8")}, 1)
    pixels = np.zeros((2001, 64, 64, 3), np.uint8)
    big = Trajectory("toy/large", {"pixels": pixels}, np.zeros((2000, 1), np.float32), np.ones(2000, np.float32))
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(big, spec)
    code = (
        "import sys; from retrieval.store import TrajectoryStore\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "store = TrajectoryStore.open(sys.argv[1]); before = rss()\n"
        "store.slice(0, 900, 964)['pixels'].sum(); print(rss() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 8e6 < pixels.nbytes / 3


def test_embodiments_with_unlike_arrays_live_in_one_store(tmp_path: Path) -> None:
    arm = counting_spec("toy/arm", action_dim=4, action_repeat=1)
    walker = Spec(
        "toy/walker", {"pixels": ArraySpec((8, 8, 3), "uint8"), "state": ArraySpec((5,), "float32")}, 6, 2, 20.0, "fast"
    )
    rng = np.random.default_rng(0)
    walk = Trajectory(
        "toy/walker",
        {"pixels": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), "state": rng.normal(size=(6, 5)).astype("f4")},
        rng.uniform(-1, 1, (5, 6)).astype("f4"), np.ones(5, np.float32), source="walks",
    )  # fmt: skip
    with TrajectoryStore.create(tmp_path / "s", "zstd") as store:
        reach = counting(1, 7, arm)
        store.append(reach, arm)
        store.append(walk, walker)
        store.append(counting(2, 3, arm))
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert store.specs == {"toy/arm": arm, "toy/walker": walker}
        assert store.rows("toy/arm").tolist() == [0, 2]
        assert store.rows("toy/walker").tolist() == [1]
        assert store.rows().tolist() == [0, 1, 2]
        assert store.spec(1) == walker
        assert (store.steps, store.frames) == (15, 7 + 3 + 5 * 2)
        assert store.find(walk.id) == 1
        assert store.find("nobody") is None
        assert_same(store.read(1), walk)
        assert_same(store.read(0), reach)
        info = store.info()
        assert info["toy/walker"] | {"bytes": 0} == {
            "trajectories": 1, "steps": 5, "frames": 10, "bytes": 0, "sources": {"walks": 1},
        }  # fmt: skip
        assert sum(entry["bytes"] for entry in info.values()) > 0
        with pytest.raises(UsageError, match=r"toy/wlker.*Did you mean toy/walker"):
            store.rows("toy/wlker")


def test_catalog_columns_say_what_is_in_the_rows_without_reading_them(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(rich(0, 5, spec), spec)
        store.append(counting(1, 9, spec, with_reward=False), spec)
        catalog = store.catalog
        assert catalog.length.tolist() == [5, 9]
        assert catalog.has_reward.tolist() == [True, False]
        assert [catalog.source(row) for row in range(2)] == ["toy/source-0", ""]
        assert catalog.stats(0) == {"return": 0.1, "score": 1e-7}
        assert catalog.has(0, "controller")
        assert not catalog.has(1, "controller")


def test_a_shard_is_an_arrow_file_that_any_reader_opens(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(rich(0, 3, spec), spec)
        store.append(counting(1, 4, spec, with_reward=False), spec)
    (path,) = (tmp_path / "s" / "shards").iterdir()
    with pa.ipc.open_file(str(path)) as reader:
        table = reader.read_all()
    assert table.num_rows == 4 + 5  # an observation more than actions each
    assert table["reward"].to_pylist() == [1.0, 2.0, 3.0, None] + [None] * 5
    assert table["action"].to_pylist()[3] is None
    assert table["pixels"].type == pa.fixed_shape_tensor(pa.uint8(), (4, 5, 3))
    assert json.loads(table.schema.metadata[b"gsa:spec"]) == spec.to_json()


def test_appending_the_same_trajectory_again_gives_its_row_and_another_under_its_id_is_refused(tmp_path: Path) -> None:
    spec = counting_spec()
    one, two = counting(0, 5, spec), counting(1, 5, spec)
    with TrajectoryStore.create(tmp_path / "s") as store:
        assert store.append(one, spec) == 0
        with store.batch():
            assert store.append(two, spec) == 1
            assert store.append(two, spec) == 1
            assert store.append(one, spec) == 0
        assert len(store) == 2
        with pytest.raises(UsageError, match="row 0"):
            store.append(dataclasses.replace(two, id=one.id))


def test_names_and_numbers_of_any_kind_survive(tmp_path: Path) -> None:
    spec = counting_spec()
    odd = dataclasses.replace(
        counting(0, 3, spec), id='a"\n\\é\ud800', source="\t✓ /x",
        stats={"return": np.float32(0.1), "steps": np.int64(3), "bad": float("inf")},
    )  # fmt: skip
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(odd, spec)
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert_same(store.read(0), odd)
        assert store.find(odd.id) == 0


def test_a_trajectory_that_is_not_of_its_embodiment_is_refused(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        with pytest.raises(UsageError, match="does not know toy/a"):
            store.append(counting(0, 5, spec))
        store.add_spec(spec)
        store.append(counting(0, 5, spec))
        with pytest.raises(SpecMismatch, match="3 actions"):
            store.append(counting(0, 5, counting_spec(action_dim=3)))
        with pytest.raises(SpecMismatch, match="action_repeat: 2 / 4"):
            store.add_spec(counting_spec(action_repeat=4))
        with pytest.raises(SpecMismatch, match="toy/b"):
            store.append(counting(0, 5, spec), counting_spec("toy/b"))
        with pytest.warns(UserWarning, match="rendered"):
            store.add_spec(dataclasses.replace(spec, renderer="faithful"))
        assert len(store) == 1


def test_one_writer_at_a_time_and_any_number_of_readers(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        with pytest.raises(UsageError, match=f"Process {os.getpid()} .* one writer"):
            TrajectoryStore.open(tmp_path / "s", write=True)
        store.append(counting(0, 5, spec), spec)
        with TrajectoryStore.open(tmp_path / "s") as reader:
            assert len(reader) == 1
            with pytest.raises(UsageError, match="write=True"):
                reader.append(counting(1, 5, spec))
    with TrajectoryStore.open(tmp_path / "s", write=True) as store:
        assert store.append(counting(1, 5, spec)) == 1


def test_a_reader_sees_what_another_process_appends_once_it_refreshes(tmp_path: Path) -> None:
    a, b = counting_spec("toy/a"), counting_spec("toy/b", action_dim=5)
    with TrajectoryStore.create(tmp_path / "s") as store, TrajectoryStore.open(tmp_path / "s") as reader:
        assert reader.refresh() == 0
        for i in range(5):
            store.append(counting(2 * i, 20, a), a)
            last = counting(2 * i + 1, 20, b)
            store.append(last, b)  # an embodiment that the reader did not know
            assert len(reader) == 2 * i
            assert reader.refresh() == 2
            assert_same(reader.read(2 * i + 1), last)
            np.testing.assert_array_equal(reader.slice(0, 3, 9)["pixels"], store.slice(0, 3, 9)["pixels"])
        assert reader.recovery == []


READER = """
import sys
from retrieval.store import TrajectoryStore
with TrajectoryStore.open(sys.argv[1]) as store:
    print(len(store), flush=True)
    while len(store) < int(sys.argv[2]):
        for row in range(len(store), len(store) + store.refresh()):
            pixels = store.slice(row, 0, 5)["pixels"]
            assert pixels[0, 0, 0, 1] == row and (pixels[3, 1] == 3).all(), row
    assert store.verify() == []
    assert store.recovery == []
print("ok", flush=True)
"""


def test_processes_read_while_one_writes_finishes_shards_and_makes_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(writer, "SNAPSHOT_ROWS", 5)
    spec, rows = counting_spec(), 200
    with TrajectoryStore.create(tmp_path / "s") as store:
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, tmp_path / "s", str(rows)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        for reader in readers:
            assert reader.stdout is not None
            reader.stdout.readline()  # all are reading
        for i in range(rows):
            store.append(counting(i, 20, spec), spec)
        assert [reader.communicate()[0] for reader in readers] == ["ok\n"] * 3


def test_a_batch_is_seen_at_its_end_and_not_before(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store, TrajectoryStore.open(tmp_path / "s") as reader:
        with store.batch():
            for i in range(10):
                assert store.append(counting(i, 5, spec), spec) == i
            reader.refresh()
            assert (len(store), len(reader)) == (0, 0)
        assert reader.refresh() == len(store) == 10


def test_a_failing_batch_keeps_the_whole_trajectories_that_it_has(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        with pytest.raises(KeyboardInterrupt), store.batch():
            store.append(counting(0, 5, spec), spec)
            raise KeyboardInterrupt
        assert len(store) == 1


def test_full_shards_are_finished_and_readers_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 4000)
    monkeypatch.setattr(writer, "GROUP_BYTES", 3000)
    spec = counting_spec()
    stored = [counting(i, 20, spec) for i in range(12)]
    with TrajectoryStore.create(tmp_path / "s") as store, TrajectoryStore.open(tmp_path / "s") as reader:
        with store.batch():
            for trajectory in stored:
                store.append(trajectory, spec)
            assert len(store) > 0  # committed in between
        reader.refresh()
        for row, trajectory in enumerate(stored):
            assert_same(reader.read(row), trajectory)
        assert len(list((tmp_path / "s" / "shards").iterdir())) > 3
        assert store.verify() == []


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_of_a_shard_begin_at_multiples_of_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """What huge pages need; and nothing is lost where blocks, trajectories and commits end in different places."""
    monkeypatch.setattr("retrieval.files.BLOCK_BYTES", 4096)
    written: list[tuple[int, int]] = []  # of each shard's writes: the first byte, and how many

    def put(file: WholeFile, view: memoryview) -> None:
        written.append((os.lseek(file.fileno(), 0, os.SEEK_CUR), len(view)))
        plain_put(file, view)

    plain_put = WholeFile._put
    monkeypatch.setattr(WholeFile, "_put", put)
    spec = counting_spec()
    stored = [rich(i, n, spec) for i, n in enumerate([1, 90, 300, 2, 40, 7])]
    with TrajectoryStore.create(tmp_path / "s", codec) as store:
        written.clear()
        for part in (stored[:3], stored[3:]):
            with store.batch():
                for trajectory in part:
                    store.append(trajectory, spec)
            for trajectory in part:
                assert_same(store.read(store.find(trajectory.id)), trajectory)
        assert store.verify() == []
        shard_writes = list(written)
    assert any(size == 4096 for _, size in shard_writes)
    assert all(start // 4096 == (start + size - 1) // 4096 for start, size in shard_writes if size)
    with pa.OSFile(str(next((tmp_path / "s" / "shards").iterdir()))) as file:
        assert pa.ipc.open_file(file).read_all().num_rows == sum(len(t) + 1 for t in stored)


def test_few_maps_serve_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    monkeypatch.setattr("retrieval.store.MAX_MAPS", 3)
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        with store.batch():
            stored = [counting(i, 5, spec) for i in range(10)]
            for trajectory in stored:
                store.append(trajectory, spec)
                store._writer.commit()
        for row in np.random.default_rng(0).integers(10, size=50).tolist():
            assert_same(store.read(row), stored[row])
        assert len(store._maps) <= 3


def test_appending_and_reading_in_turn_does_not_use_up_file_descriptors(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(counting(0, 5, spec), spec)
        store.slice(0, 0, 3)
        before = len(os.listdir("/proc/self/fd"))
        for i in range(1, 40):
            store.slice(store.append(counting(i, 5, spec)), 0, 3)
            store.slice(0, 0, 3)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_threads_read_while_one_appends(tmp_path: Path) -> None:
    spec, errors, done = counting_spec(), [], threading.Event()
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(counting(0, 30, spec), spec)

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                while not done.is_set():
                    row = int(rng.choice(store.rows()))
                    part = store.slice(row, 4, 20)
                    assert int(part["pixels"][0, 0, 0, 1]) == row
                    assert part["reward"][0] == 1000 * row + 5
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for i in range(1, 100):
            store.append(counting(i, 30, spec))
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_what_another_thread_appends_during_a_batch_is_durable_when_it_returns(tmp_path: Path) -> None:
    spec = counting_spec()
    with TrajectoryStore.create(tmp_path / "s") as store, store.batch():
        store.append(counting(0, 5, spec), spec)
        other = threading.Thread(target=lambda: store.append(counting(1, 5, spec)))
        other.start()
        other.join()
        with TrajectoryStore.open(tmp_path / "s") as reader:
            assert len(reader) == 2


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    TrajectoryStore.create(tmp_path / "s").close()
    path = tmp_path / "s" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 7}))
    with pytest.raises(FormatError, match="format version 7"):
        TrajectoryStore.open(tmp_path / "s")
    for content in ("[]", "{}", "{", '{"format": "gsa-store", "version": 1}'):
        path.write_text(content)
        with pytest.raises(FormatError, match=r"store\.json"):
            TrajectoryStore.open(tmp_path / "s", write=True)


def test_opening_what_is_not_there_and_creating_what_is_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trajectory store"):
        TrajectoryStore.open(tmp_path)
    TrajectoryStore.create(tmp_path / "s").close()
    with pytest.raises(UsageError, match="already"):
        TrajectoryStore.create(tmp_path / "s")
    with pytest.raises(UsageError, match=r"brotli.*Known: lz4, none, zstd"):
        TrajectoryStore.create(tmp_path / "t", "brotli")
    assert not (tmp_path / "t").exists()


def test_a_store_does_not_travel_and_says_what_to_do(tmp_path: Path) -> None:
    with TrajectoryStore.create(tmp_path / "s") as store, pytest.raises(UsageError, match="send its path"):
        pickle.dumps(store)


def fill_catalog(store: TrajectoryStore, rows: int) -> None:
    """Enters `rows` rows that all lie where row 0 lies, as appending them would have, but for their content."""
    first = store.catalog.record(0, list(store.specs))
    records = [dataclasses.replace(first, row=row, id=f"{row:032x}", source=f"s{row % 55}") for row in range(1, rows)]
    store._log.append(b"".join(record.line() for record in records))


def test_a_catalog_of_a_hundred_thousand_rows_opens_fast_from_log_and_faster_from_snapshot(tmp_path: Path) -> None:
    spec, rows = counting_spec(), 100_000
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(rich(0, 5, spec), spec)
        fill_catalog(store, rows)
    seconds = {}
    for kind in ("log", "snapshot"):
        start = time.process_time()
        with TrajectoryStore.open(tmp_path / "s") as store:
            assert len(store.rows()) == rows
            assert store.steps == 5 * rows
        seconds[kind] = time.process_time() - start
        with TrajectoryStore.open(tmp_path / "s", write=True) as store:
            if kind == "log":
                assert store.append(rich(7, 5, spec)) == rows  # leaves a snapshot
                rows += 1
            assert store.find(f"{77_777:032x}") == 77_777
            assert store.catalog.source(77_777) == f"s{77_777 % 55}"
            assert_same(store.read(rows - 1), dataclasses.replace(rich(7, 5, spec), id=store.catalog.id(rows - 1)))
            assert store.slice(54_321, 1, 3)["reward"].tolist() == [2.0]
    assert (tmp_path / "s" / "catalog.snapshot").exists()
    assert seconds["log"] < 10
    assert seconds["snapshot"] < min(2, seconds["log"] / 2)


def test_the_snapshot_is_only_a_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SNAPSHOT_ROWS", 2)
    spec = counting_spec()
    stored = [rich(i, 5, spec) for i in range(20)]
    snapshot = tmp_path / "s" / "catalog.snapshot"
    with TrajectoryStore.create(tmp_path / "s") as store:
        for trajectory in stored:
            store.append(trajectory, spec)
            for row in range(len(store)):  # half of them from the snapshot
                assert_same(store.read(row), stored[row])
    content = snapshot.read_bytes()
    for spoilt in (b"", content[:100], content[:-50], content[:200] + b"\x7f" + content[201:], content[::-1]):
        snapshot.write_bytes(spoilt)
        with TrajectoryStore.open(tmp_path / "s") as store:
            assert store.recovery == []
            for row, trajectory in enumerate(stored):
                assert_same(store.read(row), trajectory)
