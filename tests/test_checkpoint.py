"""Checkpoints: what goes in comes out bit for bit, a torn or hostile one is never taken for whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch

from deploy.checkpointing import RunCheckpoints, copied
from deploy.config import FinetuneConfig
from gsa.errors import FormatError, Unavailable, UsageError
from learner.checkpoint import FORMAT, MANIFEST, TENSORS, TREE, Checkpoints, read


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    return {
        "weights": {"layer.weight": torch.randn(4, 3, generator=generator), "step": torch.tensor(3.0)},
        "half": torch.randn(5, generator=generator).bfloat16(),
        "torch_generator": generator.get_state(),
        "numpy_generator": rng.bit_generator.state,  # holds integers of 128 bits
        "rows": rng.integers(0, 9, (2, 3)),
        "nothing": None,
        "list": [1, 0.1, "text", True, [torch.arange(3)]],
        "empty": {},
        "zero": torch.zeros(0, 7),
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    else:
        assert a == b


def test_round_trip_is_exact(tmp_path):
    Checkpoints(tmp_path).save(12, state())
    restored = Checkpoints(tmp_path).load()
    assert restored.step == 12
    assert restored.damaged == ()
    assert_same(restored.state, state())


def test_restored_generators_draw_what_the_originals_draw(tmp_path):
    generator, rng = torch.Generator().manual_seed(3), np.random.default_rng(3)
    torch.rand(7, generator=generator), rng.random(7)
    Checkpoints(tmp_path).save(0, {"torch": generator.get_state(), "numpy": rng.bit_generator.state})
    found = Checkpoints(tmp_path).load().state
    generator_again, rng_again = torch.Generator(), np.random.default_rng()
    generator_again.set_state(found["torch"])
    rng_again.bit_generator.state = found["numpy"]
    assert torch.equal(torch.rand(9, generator=generator), torch.rand(9, generator=generator_again))
    assert np.array_equal(rng.random(9), rng_again.random(9))


def test_tensors_that_share_memory_come_back_equal(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    Checkpoints(tmp_path).save(0, {"base": base, "again": base, "row": base[1], "transposed": base.t()})
    found = Checkpoints(tmp_path).load().state
    assert torch.equal(found["again"], base)
    assert torch.equal(found["row"], base[1])
    assert torch.equal(found["transposed"], base.t())


def test_the_newest_are_kept_and_numbers_rise_when_a_step_is_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 9, 9):
        checkpoints.save(step, {"step": step})
    assert [p.name for p in checkpoints.paths()] == ["checkpoint-00000001", "checkpoint-00000002"]
    assert checkpoints.load().step == 9


def test_the_copy_to_be_saved_takes_no_new_memory_for_what_was_copied_before():
    state = {"agent": {"weight": torch.ones(3, 2), "bias": torch.zeros(2)}, "updates": 1, "draws": np.arange(3)}
    first = copied(state)
    weight = first["agent"]["weight"]
    state["agent"]["weight"].fill_(5)
    state["agent"]["bias"] = torch.ones(4)  # of another shape than before
    assert torch.equal(weight, torch.ones(3, 2)) and first["draws"] is not state["draws"]

    second = copied({**state, "updates": 2}, first)
    assert second["agent"]["weight"] is weight and torch.equal(weight, torch.full((3, 2), 5.0))
    assert torch.equal(second["agent"]["bias"], torch.ones(4)) and second["updates"] == 2


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "missing").load() is None


@pytest.mark.parametrize("name", [MANIFEST, TREE, TENSORS])
def test_any_torn_or_flipped_byte_is_found_and_the_previous_one_used(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"weight": torch.arange(3.0), "n": 1})
    newest = checkpoints.save(2, {"weight": torch.arange(3.0), "n": 2})
    whole = (newest / name).read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for content in [whole[:n] for n in range(len(whole))] + flipped:
        (newest / name).write_bytes(content)
        restored = Checkpoints(tmp_path).load()
        assert restored.step == 1
        assert len(restored.damaged) == 1
        assert newest.name in restored.damaged[0]


def test_a_missing_file_is_damage(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for name in (MANIFEST, TREE, TENSORS):
        path = checkpoints.save(1, state())
        (path / name).unlink()
        with pytest.raises(FormatError, match="damaged"):
            read(path)


def test_all_damaged_says_so_and_names_each(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    paths = [checkpoints.save(n, {"n": n}) for n in (1, 2)]
    for path in paths:
        (path / TENSORS).write_bytes(b"")
    with pytest.raises(FormatError, match=r"(?s)checkpoint-00000001.*checkpoint-00000000"):
        checkpoints.load()


def test_a_damaged_one_does_not_push_the_good_one_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    good = checkpoints.save(1, {"n": 1})
    damaged = checkpoints.save(2, {"n": 2})
    (damaged / TREE).write_text("{}")
    assert checkpoints.load().step == 1
    newest = checkpoints.save(3, {"n": 3})
    assert checkpoints.paths() == [good, newest]


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "null",
        "{",
        '{"format": "gsa-checkpoint/2", "files": {}}',
        json.dumps({"format": FORMAT, "files": []}),
        json.dumps({"format": FORMAT, "files": {"../../etc/passwd": {"bytes": 1, "crc32": 1}}}),
        json.dumps({"format": FORMAT, "files": {TREE: 7, TENSORS: []}}),
        json.dumps({"format": FORMAT, "files": {TREE: {"bytes": 1e400}, TENSORS: {}}}),
        "[" * 100_000,
        "9" * 5_000,
        " " * (1 << 17),
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
    ids=range(12),
)
def test_a_hostile_manifest_is_a_format_error(tmp_path, manifest):
    path = Checkpoints(tmp_path).save(1, {"n": 1})
    (path / MANIFEST).write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(FormatError):
        read(path)


@pytest.mark.parametrize(
    "tree",
    [
        "[1]",
        "{}",
        '{"step": "1", "state": {}}',
        '{"step": 1, "state": []}',
        '{"step": 1, "state": {"a": {"$torch": 9}}}',
        '{"step": 1, "state": {"a": {"$numpy": "x"}}}',
        "[" * 100_000,
        '{"a": NaN',
    ],
    ids=range(8),
)
def test_a_hostile_tree_with_a_right_checksum_is_a_format_error(tmp_path, tree):
    import zlib

    path = Checkpoints(tmp_path).save(1, {"n": 1})
    (path / TREE).write_text(tree)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][TREE] = {"bytes": len(tree), "crc32": zlib.crc32(tree.encode())}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FormatError):
        read(path)


@pytest.mark.parametrize("bad", [{1: 2}, {"$torch": 1}, {"a": object()}, {"a": np.array([None])}, {"a": b"bytes"}])
def test_what_cannot_be_kept_exactly_is_refused_and_leaves_nothing(tmp_path, bad):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UsageError):
        checkpoints.save(1, bad)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_previous_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"n": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="No space left"):
        checkpoints.save(2, {"n": 2})
    monkeypatch.undo()
    assert checkpoints.load().step == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_writes_its_checkpoints_in_one_thread_that_ends_with_it(tmp_path, monkeypatch):
    threads = []

    monkeypatch.setattr(Checkpoints, "save", lambda *_: threads.append(threading.current_thread()))
    run = RunCheckpoints(tmp_path, FinetuneConfig("dmc/walker-walk", method="scratch"))
    for frames in (1, 2, 3):
        run.save(frames, {"weight": torch.ones(3)})
    run.flush()
    assert run.stats()["checkpoint/written"] == 3
    assert len(set(threads)) == 1
    del run
    threads[0].join(10)
    assert not threads[0].is_alive()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"n": 1})
    shutil.copytree(path, tmp_path / ".tmp-abc")
    assert checkpoints.load().step == 1
    checkpoints.save(2, {"n": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000000", "checkpoint-00000001"]


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Real SIGKILLs at varied moments; what is found is whole and no older than what was acknowledged."""
    script = textwrap.dedent("""
        import sys, torch
        from learner.checkpoint import Checkpoints
        torch.set_num_threads(1)
        checkpoints = Checkpoints(sys.argv[1])
        step = int(sys.argv[2])
        while True:
            checkpoints.save(step, {"weight": torch.full((20_000,), float(step)), "n": step})
            print(step, flush=True)
            step += 1
    """)
    acknowledged = 0
    for delay_s in (0.011, 0.037):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(acknowledged + 1)], stdout=subprocess.PIPE, text=True
        )
        acknowledged = int(writer.stdout.readline())
        time.sleep(delay_s)  # when the kill falls is what is varied, nothing is waited for
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        writer.wait()
        restored = Checkpoints(tmp_path).load()
        assert restored.damaged == ()
        assert acknowledged <= restored.step <= acknowledged + 1
        assert torch.equal(restored.state["weight"], torch.full((20_000,), float(restored.step)))
