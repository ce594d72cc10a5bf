"""Runs as processes of their own: watched by their logs, their parts found and killed below them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gsa.metrics import read_log


def start(file: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    """`gsa finetune`, as a user starts it, with these environment variables; what it prints is added to `file`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **variables}
    command = [sys.executable, "-m", "deploy.cli", "finetune", *arguments]
    with file.open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def kill_at(process: subprocess.Popen, run: Path, steps: int, name: str) -> int:
    """Kills every process of that name once so many agent steps are collected; returns how many those were."""
    if not wait_for(process, lambda: collected(run) >= steps):
        return 0
    found = children(process.pid, name)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return len(found)


def wait_for(process: subprocess.Popen | None, condition: Callable[[], bool], deadline_s: float = 300.0) -> bool:
    """Whether the condition came true before the deadline, and before `process` ended."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end and (process is None or process.poll() is None):
        if condition():
            return True
        time.sleep(0.05)
    return False


def collected(run: Path) -> float:
    """Agent steps collected, as the run's log has it."""
    rows = read_log(run) if (run / "metrics.jsonl").exists() else []
    return max((row.get("replay/collected", 0) for row in rows), default=0)


def children(pid: int, name: str = "") -> list[int]:
    """Processes below `pid` whose title has `name`."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(folder.name)] = folder.joinpath("cmdline").read_text()
            except (OSError, IndexError):
                continue
    below, grew = {pid}, True
    while grew:
        more = {child for child, parent in parents.items() if parent in below} - below
        below, grew = below | more, bool(more)
    return [p for p in sorted(below) if name in titles.get(p, "")]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
