"""What a crash, a full disk or a bad one does to a store: nothing acknowledged is lost without being named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gsa.errors import FormatError, Unavailable
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval import writer
from retrieval.store import TrajectoryStore
from tests.test_store import assert_same
from tests.trajectories import counting, counting_spec

TINY = Spec("toy/tiny", {"pixels": ArraySpec((2, 2, 3), "uint8")}, 1)


def tiny(index: int, steps: int = 2) -> Trajectory:
    pixels = np.full((steps + 1, 2, 2, 3), index, np.uint8)
    action = np.full((steps, 1), index / 100, np.float32)
    return Trajectory("toy/tiny", {"pixels": pixels}, action, np.ones(steps, np.float32), id=f"tiny-{index}")


def crashed(path: Path, codec: str = "none", rows: int = 4) -> list[Trajectory]:
    """A store as a writer leaves it that dies after `rows` appends."""
    stored = [tiny(i, 2 if codec == "none" else 70) for i in range(rows)]
    store = TrajectoryStore.create(path, codec)
    for trajectory in stored:
        store.append(trajectory, TINY)
    assert store._lock is not None
    store._lock.release()  # what the system does for a process that dies
    return stored


@pytest.fixture
def ram() -> Iterator[Path]:
    """A folder in memory where there is one: tearing a file at every byte would sync a disk thousands of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def require_sound(path: Path, stored: list[Trajectory], maybe: Sequence[Trajectory] = ()) -> None:
    """Each of `stored` is there or named; nothing else is, but for `maybe`; and the store takes more."""
    with TrajectoryStore.open(path, write=True) as store:
        notes = " ".join(store.recovery)
        for trajectory in stored:
            row = store.find(trajectory.id)
            if row is not None:
                assert_same(store.read(row), trajectory)
            else:
                assert f"trajectory {trajectory.id} " in notes
        assert {store.catalog.id(row) for row in store.rows().tolist()} <= {t.id for t in (*stored, *maybe)}
        damaged = [row for row, _ in store.verify() if row is not None]
        assert damaged == sorted(set(range(len(store))) - set(store.rows().tolist()))
        more = tiny(99)
        row = store.append(more)
        assert_same(store.read(row), more)
    with TrajectoryStore.open(path) as store:
        assert_same(store.read(row), more)
        for trajectory in stored:
            if (known := store.find(trajectory.id)) is not None:
                assert_same(store.read(known), trajectory)


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_log_cut_at_any_byte_loses_nothing(ram: Path, codec: str) -> None:
    stored = crashed(ram / "whole", codec, rows=3)
    log = (ram / "whole" / "catalog.log").read_bytes()
    ends = [i + 1 for i, byte in enumerate(log) if byte == ord("\n")]
    for size in range(len(log)):
        shutil.copytree(ram / "whole", ram / "s")
        os.truncate(ram / "s" / "catalog.log", size)
        with TrajectoryStore.open(ram / "s") as reader:  # a reader repairs nothing, and says what it sees
            assert len(reader) == sum(end <= size for end in ends)
            assert bool(reader.recovery) == (size > 0 and size not in ends)
        with TrajectoryStore.open(ram / "s", write=True) as store:
            assert store.rows().tolist() == [0, 1, 2]
            for row, trajectory in enumerate(stored):
                assert_same(store.read(row), trajectory)
                assert row < len(reader) or any(f"trajectory {trajectory.id} " in note for note in store.recovery)
            assert store.append(tiny(99)) == 3
        with TrajectoryStore.open(ram / "s") as store:
            assert store.recovery == []
            assert len(store.rows()) == 4
        shutil.rmtree(ram / "s")


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_shard_cut_at_any_byte_names_what_is_lost(ram: Path, codec: str) -> None:
    stored = crashed(ram / "whole", codec, rows=3)
    (shard,) = (ram / "whole" / "shards").iterdir()
    with TrajectoryStore.open(ram / "whole") as store:
        ends = store.catalog.column("end").tolist()
    size = shard.stat().st_size
    last = range(ends[-2], size, 1 if codec == "none" else 11)
    for cut in (*range(0, ends[-2], 37), *last):
        shutil.copytree(ram / "whole", ram / "s")
        os.truncate(ram / "s" / "shards" / shard.name, cut)
        for write in (False, True):
            with TrajectoryStore.open(ram / "s", write=write) as store:
                alive = [row for row in range(3) if ends[row] <= cut]
                assert store.rows().tolist() == alive
                assert len(store) == 3
                for row in range(3):
                    if row in alive:
                        assert_same(store.read(row), stored[row])
                    else:
                        assert any(f"trajectory {stored[row].id} " in note for note in store.recovery)
                        with pytest.raises(FormatError, match="lost"):
                            store.slice(row, 0, 1)
        with TrajectoryStore.open(ram / "s", write=True) as store:
            assert store.append(stored[2]) == (2 if 2 in alive else 3)  # what is lost can be put in again
            assert_same(store.read(store.find(stored[2].id)), stored[2])
        shutil.rmtree(ram / "s")


def test_shard_cut_within_a_trajectory_that_was_not_acknowledged(ram: Path) -> None:
    """The log says 2 rows, the shard holds 2 and any part of the bytes of a third."""
    stored = crashed(ram / "whole", rows=3)
    (shard,) = (ram / "whole" / "shards").iterdir()
    log = (ram / "whole" / "catalog.log").read_bytes()
    acknowledged = log[: log.rindex(b"\n", 0, -1) + 1]
    with TrajectoryStore.open(ram / "whole") as store:
        start, end = (int(store.catalog.column(name)[2]) for name in ("start", "end"))
    for cut in range(start, end + 1):
        shutil.copytree(ram / "whole", ram / "s")
        os.truncate(ram / "s" / "shards" / shard.name, cut)
        (ram / "s" / "catalog.log").write_bytes(acknowledged)
        with TrajectoryStore.open(ram / "s", write=True) as store:
            assert len(store) == (3 if cut == end else 2)
            assert len(store.recovery) == (0 if cut == start else 1)
        require_sound(ram / "s", stored[:2], maybe=stored[2:])
        with pa.OSFile(str(ram / "s" / "shards" / shard.name)) as file:  # an Arrow stream that ends cleanly
            file.seek(8)
            assert pa.ipc.open_stream(file).read_all().num_rows == 3 * (3 if cut == end else 2)
        shutil.rmtree(ram / "s")


def test_a_shard_that_came_to_nothing_is_out_of_the_way(tmp_path: Path) -> None:
    crashed(tmp_path / "s", rows=1)
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    for size, left in ((0, False), (5, False), (300, False), (shard.stat().st_size - 1, True)):
        (tmp_path / "s" / "shards" / "000001.arrow").write_bytes(shard.read_bytes()[:size])
        with TrajectoryStore.open(tmp_path / "s") as reader:
            assert [row for row, _ in reader.verify()] == ([None] if size else [])
        with TrajectoryStore.open(tmp_path / "s", write=True) as store:
            assert "000001.arrow" in store.recovery[0]
            assert len(store) == 1
        assert (tmp_path / "s" / "shards" / "000001.dropped").exists() == left
        assert not (tmp_path / "s" / "shards" / "000001.arrow").exists()


def test_a_log_that_is_gone_is_made_again_from_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    specs = [counting_spec("toy/a"), counting_spec("toy/b", action_dim=3)]
    stored = [counting(i, 5 + i, specs[i % 2]) for i in range(12)]
    with TrajectoryStore.create(tmp_path / "s") as store:
        for i, trajectory in enumerate(stored):
            store.append(trajectory, specs[i % 2])
    (tmp_path / "s" / "catalog.log").write_bytes(b"")
    with TrajectoryStore.open(tmp_path / "s", write=True) as store:
        assert len(store.recovery) == 12
        for row, trajectory in enumerate(stored):  # rows do not move
            assert_same(store.read(row), trajectory)


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_a_damaged_line_costs_nothing_and_moves_nothing(
    ram: Path, monkeypatch: pytest.MonkeyPatch, with_snapshot: bool
) -> None:
    monkeypatch.setattr(writer, "SNAPSHOT_ROWS", 2 if with_snapshot else 1000)
    stored = crashed(ram / "whole", rows=8)
    log = (ram / "whole" / "catalog.log").read_bytes()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(len(log), size=40).tolist(), len(log) - 1, log.index(b"\n")]:
        shutil.copytree(ram / "whole", ram / "s")
        damaged = bytearray(log)
        damaged[at] ^= 1 << int(rng.integers(8))
        (ram / "s" / "catalog.log").write_bytes(damaged)
        with TrajectoryStore.open(ram / "s") as reader:
            for row in reader.rows().tolist():
                assert_same(reader.read(row), stored[row])
        with TrajectoryStore.open(ram / "s", write=True) as store:
            for row, trajectory in enumerate(stored):
                assert_same(store.read(row), trajectory)
        require_sound(ram / "s", stored)
        shutil.rmtree(ram / "s")


def test_a_log_shorter_than_its_snapshot_is_made_again_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SNAPSHOT_ROWS", 1)
    stored = crashed(tmp_path / "s", rows=8)
    os.truncate(tmp_path / "s" / "catalog.log", 100)
    with TrajectoryStore.open(tmp_path / "s", write=True) as store:
        assert "shorter" in store.recovery[0]
        for row, trajectory in enumerate(stored):
            assert_same(store.read(row), trajectory)
    require_sound(tmp_path / "s", stored)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_verify_finds_any_flipped_bit_of_a_shard_and_names_the_trajectory(tmp_path: Path, codec: str) -> None:
    stored = crashed(tmp_path / "s", codec)
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    content = shard.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(len(content), size=150).tolist():
        with shard.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << int(rng.integers(8))]))
        with TrajectoryStore.open(tmp_path / "s") as store:
            ((row, reason),) = store.verify()
            assert row == np.searchsorted(store.catalog.column("end"), at, side="right")
            assert stored[row].id in reason
            for other in set(range(len(stored))) - {row}:
                assert_same(store.read(other), stored[other])
        shard.write_bytes(content)


def test_verify_reports_a_flipped_pixel_and_its_progress(tmp_path: Path) -> None:
    stored = crashed(tmp_path / "s")
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[content.index(stored[2].observation["pixels"].tobytes()) + 5] ^= 4
    shard.write_bytes(content)
    seen: list[tuple[int, int]] = []
    with TrajectoryStore.open(tmp_path / "s") as store:
        ((row, reason),) = store.verify(lambda done, total, _: seen.append((done, total)))
    assert row == 2
    assert "tiny-2" in reason
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


WRITER = """
import sys
from retrieval import writer
from retrieval.store import TrajectoryStore
from tests.test_store_recovery import TINY, tiny
writer.SHARD_BYTES, writer.SNAPSHOT_ROWS, writer.MAX_SNAPSHOT_ROWS = 40_000, 3, 3
with TrajectoryStore.open(sys.argv[1], write=True) as store:
    print("open", flush=True)
    for i in range(int(sys.argv[2]), 10**6, 3):
        with store.batch():
            rows = [store.append(tiny(j, steps=300), TINY) for j in range(i, i + 2)]
        print(*rows, flush=True)
        print(store.append(tiny(i + 2, steps=300), TINY), flush=True)
"""


@pytest.mark.parametrize(("codec", "kills"), [("none", 5), pytest.param("none", 50, marks=pytest.mark.slow),
                                              pytest.param("lz4", 50, marks=pytest.mark.slow)])  # fmt: skip
def test_a_writer_killed_at_any_moment_keeps_what_it_acknowledged(tmp_path: Path, codec: str, kills: int) -> None:
    """Shards are finished and snapshots written all the time; the moment is not one that the writer chooses."""
    TrajectoryStore.create(tmp_path / "s", codec).close()
    rng, before = np.random.default_rng(0), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "s", str(before)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        whole = said[: said.rfind("\n") + 1].split()
        with TrajectoryStore.open(tmp_path / "s", write=True) as store:  # the lock died with its owner
            assert not any("Lost" in note or "Damaged" in note for note in store.recovery)
            assert len(store.rows()) == len(store) >= max(map(int, whole), default=before - 1) + 1
            for row in range(before, len(store)):
                assert_same(store.read(row), tiny(row, steps=300))
            before = len(store)
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert store.verify() == []
        for row in range(len(store)):
            assert_same(store.read(row), tiny(row, steps=300))


def test_power_lost_at_any_moment_loses_nothing_acknowledged(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was not synced is gone: before each sync, a copy of the store with its files as last synced must do."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    monkeypatch.setattr(writer, "SNAPSHOT_ROWS", 2)
    synced: dict[int, int] = {}  # inode → bytes
    acknowledged, crashes = 0, 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal crashes
        _power_off(ram, crashes, synced)
        real(descriptor)
        about = os.fstat(descriptor)
        synced[about.st_ino] = about.st_size
        with monkeypatch.context() as repair:
            repair.setattr(os, "fsync", real)
            _require_kept(ram, crashes, acknowledged)
        crashes += 1

    with TrajectoryStore.create(ram / "s") as store:
        monkeypatch.setattr(os, "fsync", fsync)
        for i in range(12):
            store.append(tiny(i), TINY)
            acknowledged += 1
        monkeypatch.setattr(os, "fsync", real)
    assert crashes > 24


def _power_off(ram: Path, crash: int, synced: dict[int, int]) -> None:
    """Copies the store as it is on the disk just before a sync."""
    copy = ram / f"crash-{crash}"
    shutil.copytree(ram / "s", copy)
    for path in copy.rglob("*"):
        original = ram / "s" / path.relative_to(copy)
        if path.is_file() and path.name != "store.json":
            os.truncate(path, min(path.stat().st_size, synced.get(original.stat().st_ino, 0)))


def _require_kept(ram: Path, crash: int, acknowledged: int) -> None:
    with TrajectoryStore.open(ram / f"crash-{crash}", write=True) as store:
        assert not any("Lost" in note for note in store.recovery)
        assert len(store) >= acknowledged
        for row in range(acknowledged):
            assert_same(store.read(row), tiny(row))
    shutil.rmtree(ram / f"crash-{crash}")


def test_snapshot_cut_or_flipped_anywhere_is_found_and_costs_nothing(
    ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SNAPSHOT_ROWS", 2)
    stored = crashed(ram / "s", rows=4)
    path = ram / "s" / "catalog.snapshot"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    spoilt = [content[:size] for size in range(len(content))]
    for at in rng.integers(len(content), size=300).tolist():
        spoilt.append(content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :])
    for damaged in spoilt:
        path.write_bytes(damaged)
        with TrajectoryStore.open(ram / "s") as store:
            assert store.rows().tolist() == [0, 1, 2, 3]
            ((row, reason),) = store.verify()
            assert row is None
            assert "catalog.snapshot" in reason
    for row, trajectory in enumerate(stored):
        assert_same(store.read(row), trajectory)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_verify_finds_a_flipped_bit_in_any_file_of_a_finished_store(ram: Path, codec: str) -> None:
    stored = crashed(ram / "s", codec)
    TrajectoryStore.open(ram / "s", write=True).close()
    with TrajectoryStore.open(ram / "s", write=True) as store:
        store.append(tiny(9, 70), TINY)  # finished: it has a footer
    rng, unseen = np.random.default_rng(0), []
    files = [p for p in (ram / "s").rglob("*") if p.is_file() and p.name != "writer.lock"]
    for path in files:
        content = path.read_bytes()
        for at in rng.integers(len(content), size=200).tolist():
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :])
            try:
                with TrajectoryStore.open(ram / "s") as store:
                    if not (store.verify() or store.recovery):
                        unseen.append((path.name, at, content))
            except FormatError:
                continue
            finally:
                path.write_bytes(content)
    for name, at, content in unseen:  # padding and spare fields of Arrow's footer, which no reader looks at
        assert at >= content.rindex(b"\xff\xff\xff\xff\x00\x00\x00\x00") + 8, (name, at)
    assert len(unseen) < 40
    with TrajectoryStore.open(ram / "s") as store:
        assert store.verify() == []
        for row, trajectory in enumerate(stored):
            assert_same(store.read(row), trajectory)


FULL_DISK = """
import resource, sys
from gsa.errors import Unavailable
from retrieval.store import TrajectoryStore
from tests.test_store_recovery import TINY, tiny
with TrajectoryStore.create(sys.argv[1]) as store:
    done = [store.append(tiny(i, steps=300), TINY) for i in range(3)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limit[1]))
    try:
        for i in range(3, 100):
            done.append(store.append(tiny(i, steps=300), TINY))
    except Unavailable as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [store.append(tiny(i, steps=300)) for i in range(len(done), 12)] == list(range(len(done), 12))
    for row in range(12):
        assert (store.read(row).observation["pixels"] == row).all()
    assert store.verify() == []
print("rows", len(done))
"""


@pytest.mark.parametrize("limit", [20_000, 36_500, 47_000])
def test_a_disk_that_fills_up_is_said_and_survived(tmp_path: Path, limit: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "s", str(limit)], capture_output=True, text=True, check=True
    )
    assert "cannot be written to" in run.stdout
    with TrajectoryStore.open(tmp_path / "s", write=True) as store:
        assert store.recovery == []
        assert [store.read(row).id for row in range(12)] == [f"tiny-{i}" for i in range(12)]


def test_a_log_that_cannot_grow_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrajectoryStore.create(tmp_path / "s") as store:
        store.append(tiny(0), TINY)
        with monkeypatch.context() as broken:
            broken.setattr("retrieval.log.os.fsync", _no_space)
            with pytest.raises(Unavailable, match="No space left"), store.batch():
                store.append(tiny(1))
                store.append(tiny(2))
        assert len(store) == 1
        assert store.append(tiny(2)) == 1
        assert_same(store.read(1), tiny(2))
    with TrajectoryStore.open(tmp_path / "s", write=True) as store:
        assert store.recovery == []
        assert [store.catalog.id(row) for row in store.rows().tolist()] == ["tiny-0", "tiny-2"]


def _no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_every_line_of_the_log_carries_its_checksum(tmp_path: Path) -> None:
    crashed(tmp_path / "s", rows=2)
    for row, line in enumerate((tmp_path / "s" / "catalog.log").read_bytes().splitlines()):
        crc, _, text = line.partition(b" ")
        assert int(crc, 16) == zlib.crc32(text)
        assert json.loads(text)["row"] == row


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.slow
def test_a_small_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no mounting here")
    try:
        with TrajectoryStore.create(disk / "s") as store:
            with pytest.raises(Unavailable, match=r"No space left.*make room"):
                for i in range(90):
                    store.append(tiny(i, 300), TINY)
            stored = len(store)
            assert stored > 3
            with pytest.raises(Unavailable, match="No space left"):
                store.append(tiny(99, 10_000))
        with TrajectoryStore.open(disk / "s") as reader:
            for row in range(stored):
                assert_same(reader.read(row), tiny(row, 300))
            assert reader.verify() == []
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        with TrajectoryStore.open(disk / "s", write=True) as store:
            assert store.append(tiny(stored, 300)) == stored
    finally:
        subprocess.run(["umount", disk], check=True)
