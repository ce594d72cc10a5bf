"""Stores that mean harm: whatever their files claim, reading them ends in an error of ours and takes little memory."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gsa.errors import FormatError, GsaError
from retrieval import message
from retrieval.layout import Layout
from retrieval.log import Record
from retrieval.manifest import _crc
from retrieval.shard import MAGIC_BYTES, NOTE_KEY, footer_problem, spec_of
from retrieval.store import TrajectoryStore
from tests.test_store_recovery import TINY, tiny

ABSURD = (-1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, -(2**63), 1.5, None, "x", [], {}, True, "9" * 5000)
MEMORY_MB = 300


def made(path: Path, codec: str = "none") -> Path:
    with TrajectoryStore.create(path, codec) as store:
        for i in range(3):
            store.append(tiny(i, 70), TINY)
    return path


def look(path: Path) -> None:
    """What a user may do with a store from elsewhere. Errors of ours are fine, others are not."""
    try:
        with TrajectoryStore.open(path) as store:
            store.info()
            store.find("tiny-1")
            store.verify()
            for row in store.rows().tolist()[:8]:
                try:
                    store.read(row)
                    store.slice(row, 1, 3)
                except GsaError:
                    continue
    except GsaError:
        pass
    try:
        with TrajectoryStore.open(path, write=True) as store:
            store.append(tiny(99), TINY)
    except GsaError:
        pass


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Nothing here may take much: what is asked for beyond that fails, and fails the test."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEMORY_MB << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from _places(data[key], (*path, key))


def _with(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = _with(data[path[0]], path[1:], value)
    return copy


def test_any_absurd_value_anywhere_in_store_json(tmp_path: Path) -> None:
    path = made(tmp_path / "s") / "store.json"
    whole = json.loads(path.read_text())
    for place in _places(whole):
        for value in ABSURD:
            data = _with(whole, place, value)
            if isinstance(data, dict):
                data["crc"] = _crc(data)
            path.write_text(json.dumps(data))
            look(tmp_path / "s")
    for text in ("[" * 100_000, '{"format":', "\x00" * 100, '{"format": "gsa-store", "version": 1, "crc": 1e999}'):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"store\.json"):
            TrajectoryStore.open(tmp_path / "s")


def test_any_absurd_value_anywhere_in_a_line_of_the_log(tmp_path: Path) -> None:
    log = made(tmp_path / "s") / "catalog.log"
    lines = log.read_bytes().splitlines(keepends=True)
    whole = json.loads(lines[1][9:])
    for place in _places(whole):
        for value in ABSURD:
            text = json.dumps(_with(whole, place, value)).encode()
            log.write_bytes(lines[0] + b"%08x %s\n" % (zlib.crc32(text), text) + lines[2])
            look(tmp_path / "s")
    with log.open("wb") as file:
        file.truncate(200 << 20)  # no line ever ends
    look(tmp_path / "s")


@pytest.mark.parametrize(
    "name", ["length", "shard", "start", "embodiment", "source_code", "has", "id_ends", "offsets_ends", "offsets", "id"]
)
def test_a_snapshot_that_lies_under_a_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("retrieval.writer.SNAPSHOT_ROWS", 1)
    path = made(tmp_path / "s") / "catalog.snapshot"
    content = path.read_bytes()[:-4]
    about = json.loads(content[: content.index(b"\n")])
    end = content.index(b"\n") + 1
    for column, dtype, count in about["columns"]:
        end += -end % 64
        if column == name:
            break
        end += count * np.dtype(dtype).itemsize
    size, rng = count * np.dtype(dtype).itemsize, np.random.default_rng(0)
    lies = [b"\xff" * size, b"\x7f" * size, bytes(size), *(rng.bytes(size) for _ in range(20))]
    spoilt = [content[:end] + lie + content[end + size :] for lie in lies]
    head = content.index(b"\n")
    for value in (-1, 2**40, 2**63, "x", None):
        columns = [[c, d, value if c == name else n] for c, d, n in about["columns"]]
        spoilt.append(json.dumps(about | {"columns": columns}).encode() + content[head:])
    for damaged in spoilt:
        path.write_bytes(damaged + zlib.crc32(damaged).to_bytes(4, "little"))
        look(tmp_path / "s")


@pytest.mark.parametrize(("codec", "inputs"), [
    ("none", 60), ("zstd", 60),
    *(pytest.param(codec, 1000, marks=pytest.mark.slow) for codec in ("none", "lz4", "zstd")),
])  # fmt: skip
def test_shards_with_random_bytes_in_their_headers(tmp_path: Path, codec: str, inputs: int) -> None:
    """With and without a catalog that knows better, so that what is in the shard is believed or not."""
    made(tmp_path / "whole", codec)
    (shard,) = (tmp_path / "whole" / "shards").iterdir()
    content, rng = shard.read_bytes(), np.random.default_rng(0)
    headers = [at for at in range(0, len(content), 8) if content[at : at + 4] == message.CONTINUATION]
    for turn in range(inputs):
        shutil.copytree(tmp_path / "whole", tmp_path / "s")
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.choice(headers)) + int(rng.integers(0, 600)) if turn % 3 else int(rng.integers(len(content)))
            value = int(rng.choice([0, 0xFF, 0x7F, 0x80, int(rng.integers(256))]))
            damaged[at : at + int(rng.integers(1, 9))] = bytes([value]) * len(
                damaged[at : at + int(rng.integers(1, 9))]
            )
        (tmp_path / "s" / "shards" / shard.name).write_bytes(damaged)
        if turn % 2:
            (tmp_path / "s" / "catalog.log").write_bytes(b"")
        look(tmp_path / "s")
        shutil.rmtree(tmp_path / "s")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_record_batch_that_unpacks_to_gigabytes(tmp_path: Path, codec: str) -> None:
    """A megabyte or less on the disk; neither reading it nor rebuilding the catalog from it unpacks it."""
    made(tmp_path / "s", codec)
    layout, rows = Layout.of(TINY), 4 << 20
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    bomb = f"""if True:
        import json, pyarrow as pa
        from retrieval.layout import Layout
        from tests.test_store_recovery import TINY
        layout = Layout.of(TINY)
        columns = [pa.nulls({rows}, c.arrow_type) for c in layout.columns]
        note = {{"row": 3, "id": "bomb", "embodiment": "toy/tiny", "source": "", "length": {rows - 1}, "has": 7,
                 "crc": 0, "stats": {{}}}}
        options = pa.ipc.IpcWriteOptions(compression="{codec}")
        with pa.ipc.new_file("{tmp_path / "bomb"}", layout.schema, options=options) as writer:
            writer.write_batch(pa.record_batch(columns, schema=layout.schema),
                               custom_metadata={{"{NOTE_KEY.decode()}": json.dumps(note)}})
    """
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    subprocess.run([sys.executable, "-c", bomb], check=True)
    shutil.copy(tmp_path / "bomb", tmp_path / "s" / "shards" / "000001.arrow")
    assert layout.chunk_rows < rows
    look(tmp_path / "s")
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert store.find("bomb") is None
        assert store.find("tiny-1") == 1
        record = dataclasses.replace(store.catalog.record(1, list(store.specs)), row=len(store), id="bomb2")
    head = shard.stat().st_size
    lie = dataclasses.replace(record, length=rows - 1, end=head)
    with (tmp_path / "s" / "catalog.log").open("ab") as log:
        log.write(lie.line())
    with TrajectoryStore.open(tmp_path / "s") as store, pytest.raises(FormatError):
        store.read(store.find("bomb2"))


def test_a_row_number_beyond_any_log_is_a_damaged_line(tmp_path: Path) -> None:
    made(tmp_path / "s")
    with (tmp_path / "s" / "catalog.log").open("ab") as log:
        log.write(Record(10**12, id="far", embodiment="toy/tiny").line())
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert len(store) == 4
        assert store.rows().tolist() == [0, 1, 2]
        assert "Damaged" in store.recovery[0]


def test_arrow_itself_agrees_with_what_is_read_of_its_headers(tmp_path: Path) -> None:
    for codec in ("none", "lz4", "zstd"):
        made(tmp_path / codec, codec)
        (shard,) = (tmp_path / codec / "shards").iterdir()
        raw = memoryview(shard.read_bytes())
        with pa.ipc.open_file(str(shard)) as reader:
            blocks = message.blocks(raw)
            assert len(blocks) == reader.num_record_batches
            for i, (start, end) in enumerate(blocks):
                found = message.record_batch(raw, start)
                batch, metadata = reader.get_batch_with_custom_metadata(i)
                assert (found.end, found.rows) == (end, batch.num_rows)
                assert found.metadata == dict(metadata or {})


@pytest.mark.parametrize("size", [0x7FFFFFFF, 1 << 20, 0])
def test_a_shard_head_that_lies_about_its_size_is_named_by_verify_and_takes_no_memory(
    tmp_path: Path, size: int
) -> None:
    made(tmp_path / "s", "none")
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    with shard.open("r+b") as file:
        file.seek(MAGIC_BYTES + 4)
        file.write(size.to_bytes(4, "little"))
    assert footer_problem(shard)
    assert spec_of(shard) is None
    with TrajectoryStore.open(tmp_path / "s") as store:
        assert store.verify()
