"""No call in the system waits without a deadline: read off the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from deploy.provenance import PACKAGES

ROOT = Path(__file__).parent.parent
# method → how many positional arguments it may have before it waits no longer than it is told
UNBOUNDED = {"wait": 0, "join": 0, "result": 0, "acquire": 0, "communicate": 0, "exception": 0}
BOUNDING = {"timeout", "timeout_s", "timeout_seconds", "blocking", "deadline_s"}
# Waits that something else bounds: where, and what.
BOUNDED_ELSEWHERE = {
    "actors/collect.py:future.result": "it is done; the kernel ends a collecting process that hangs",
    "gsa/redis_link.py:c.result": "a checksum that a thread of this process computes",
    "learner/clone.py:pending.result": "a batch that a thread of this process cuts from mapped files",
    "replay_service/batches.py:self._next.result": "a batch that a thread of this process cuts from mapped files",
    "retrieval/ingest.py:future.result": "an episode decoded here, or by a reader that is ended when it falls silent",
}


def waits(path: Path):
    """Calls in a file that could wait for ever, as "file:call"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, given = ast.unparse(node.func), {k.arg for k in node.keywords}
        if given & BOUNDING or None in given:
            continue
        of_ray = called in ("ray.get", "ray.wait")
        if of_ray or (node.func.attr in UNBOUNDED and len(node.args) <= UNBOUNDED[node.func.attr]):
            yield f"{path.relative_to(ROOT)}:{called}"


def test_every_wait_in_the_sources_has_a_deadline():
    found = {call for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) for call in waits(path)}
    assert found - BOUNDED_ELSEWHERE.keys() == set()


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("ray.get(x)", True), ("ray.get(x, timeout=3)", False), ("ray.wait([x])", True), ("t.join()", True),
        ("t.join(3)", False), ("','.join(x)", False), ("future.result()", True), ("event.wait(1.0)", False),
        ("lock.acquire()", True), ("lock.acquire(blocking=False)", False),
    ],
)  # fmt: skip
def test_the_check_knows_a_wait_without_deadline(line, bad, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_deadlines.ROOT", tmp_path)
    (tmp_path / "x.py").write_text(line)
    assert bool(list(waits(tmp_path / "x.py"))) == bad
