"""A run's log: what it returned from is on disk, and nothing that befalls TensorBoard's twin stops the run."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.faults import FILE, FaultLog, Warnings
from gsa.errors import Unavailable
from gsa.metrics import RunLog, read_log
from reports.record import read_run
from tests.test_resume import small_disk  # noqa: F401


def board(folder: Path, tag: str = "a/x") -> list[tuple[int, float]]:
    """What TensorBoard shows of a folder."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_a_resumed_log_has_each_row_once_in_both(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.write(step, {"a/x": step, "a/bad": float("nan")})
    assert len(read_log(tmp_path)) == 5  # before it is closed
    log = RunLog(tmp_path, resume_rows=3)
    log.write(3, {"a/x": 30})
    log.close()
    assert [(row["frames"], row["a/x"], row.get("a/bad")) for row in read_log(tmp_path)] == [
        (0, 0, None), (1, 1, None), (2, 2, None), (3, 30, None)
    ]  # fmt: skip
    assert board(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 30)]


@pytest.mark.parametrize("days", [1, 30, 10_000])
def test_a_clock_that_is_set_back_by_weeks_stalls_no_log(days, tmp_path, monkeypatch):
    """tensorboardX's own writer waits in a thread until its last flush by the clock is so long ago; beyond 24 days that
    thread ends, and the eleventh value after it blocks whoever writes."""
    right, shift_s = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: right() + shift_s)
    log = RunLog(tmp_path)

    def write() -> None:
        nonlocal shift_s
        for step in range(200):
            log.write(step, {"a/x": step, "a/y": 1.0})
            shift_s = -86_400.0 * days if step > 20 else 0.0
        log.close()

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(30)
    assert not writing.is_alive()
    assert len(read_log(tmp_path)) == 200
    assert [value for _, value in board(tmp_path)] == list(range(200))


def test_a_full_disk_under_the_log_is_a_sentence_and_costs_no_row_that_was_acknowledged(small_disk):  # noqa: F811
    log, written = RunLog(small_disk), 0
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - (1 << 16)))
    with pytest.raises(Unavailable, match=r"Cannot write the log .*metrics.jsonl: No space left on device\. Free some"):
        while True:
            log.write(written, {"a/x": written})
            written += 1
    ballast.unlink()
    assert [row["a/x"] for row in read_log(small_disk)] == list(range(written))
    log = RunLog(small_disk, resume_rows=written)
    log.write(written, {"a/x": written})
    log.close()
    assert [row["a/x"] for row in read_log(small_disk)] == list(range(written + 1))
    assert board(small_disk)[-1] == (written, written)


def test_a_full_disk_under_tensorboard_alone_leaves_the_run_its_log(small_disk, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(small_disk)
    log, ballast = RunLog(tmp_path / "run"), small_disk / "ballast"
    log.write(0, {"a/x": 0})
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    for step in range(1, 300):
        log.write(step, {f"a/{name}": step for name in "xyz"})
    ballast.unlink()
    log.write(300, {"a/x": 300})
    log.close()
    assert len(read_log(tmp_path / "run")) == 301
    shown = board(tmp_path / "run")
    assert shown[0] == (0, 0)
    assert shown[-1] == (300, 300)


def test_every_part_that_is_lost_and_back_is_told_once_on_the_console_and_in_the_log(tmp_path, capfd):
    log = FaultLog(tmp_path)
    for _ in range(3):
        log.lost(40, "the learner", "Its process ended.", "Ray starts it again.")
    log.back(60, "the learner")
    log.back(60, "the replay service")  # was never away
    log.lost(80, "the learner", "Its process ended.", "Ray starts it again.")
    said = capfd.readouterr().err
    assert said.count("the learner: Its process ended. Ray starts it again.") == 2
    assert said.count("the learner: back after 0 s.") == 1
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(r["frames"], r["who"], r.get("did")) for r in rows] == [
        (40, "the learner", "Ray starts it again."), (60, "the learner", None),
        (80, "the learner", "Ray starts it again."),
    ]  # fmt: skip
    assert log.count == 2
    (tmp_path / "config.yaml").write_text("{}")
    assert read_run(tmp_path).faults == {"Its process ended.": 2}


def test_what_a_part_warns_of_is_kept_for_whoever_asks(tmp_path):
    from learner.checkpoint import TENSORS, Checkpoints

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"n": 1})
    (checkpoints.save(2, {"n": 2}) / TENSORS).write_bytes(b"")
    warnings = Warnings()
    checkpoints.load()
    (told,) = warnings.take()
    assert "checkpoint-00000001" in told
    assert "Using checkpoint-00000000 instead" in told
    assert warnings.take() == []
    warnings.close()
