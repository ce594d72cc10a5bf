"""What was collected, for a person to look at: per source how many episodes, and how good they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reports.html import document, fact_line, section, table, text
from retrieval.files import replace_file

WIDTH, HEIGHT = 200, 20  # of a histogram, in its own units


def write_pool_page(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Writes the page of a report by `actors.collect`; returns `path`."""
    path = Path(path)
    with replace_file(path) as file:
        file.write(pool_page(report).encode())
    return path


def pool_page(report: Mapping[str, Any]) -> str:
    """One page: the pool, then each task with its sources."""
    sources: Mapping[str, Any] = report["sources"]
    tasks: dict[str, dict[str, Any]] = {}
    for name, row in sources.items():
        task, behaviour = name.rsplit("/", 1)
        tasks.setdefault(task, {})[behaviour] = row
    facts = (
        ("episodes", _sum(sources, "episodes")), ("agent steps", f"{_sum(sources, 'steps'):,}"),
        ("frames", f"{_sum(sources, 'frames'):,}"), ("sources", len(sources)), ("tasks", len(tasks)),
        ("seed", report["seed"]),
    )  # fmt: skip
    note = (
        '<p class="sub">How good the episodes were, which the pool itself does not tell. A histogram spans the scores '
        "0 to 100 (of gym tasks the range that was reached); bars are shares of a source's episodes.</p>"
    )
    failed = "".join(f"<li>{text(one)}</li>" for one in report["failed"])
    return document(
        "Collected pool",
        (
            "<h1>Collected pool</h1>", note, fact_line(facts),
            section("Episodes that failed", f"<ul>{failed}</ul>" if failed else "", "notes"),
            section("All episodes by score, 0 … 100", _over_all(sources)),
            *(section(task, _task_table(rows)) for task, rows in tasks.items()),
        ),
    )  # fmt: skip


def _over_all(sources: Mapping[str, Any]) -> str:
    """The histogram over all episodes whose score is 0 to 100."""
    rows = [row["score_histogram"] for row in sources.values() if row["score_histogram"]["edges"][-1] == 100]
    return _histogram(np.sum([row["counts"] for row in rows], 0).tolist()) if rows else ""


def _task_table(rows: Mapping[str, Any]) -> str:
    head = ("source", "episodes", "agent steps", "return, least", "mean", "most", "success", "score 0 … 100")
    cells = [
        (
            text(behaviour), f"{row['episodes']:,}", f"{row['steps']:,}",
            *(f"{row['return'][which]:,.1f}" for which in ("min", "mean", "max")),
            "" if row["success"] is None else f"{row['success']:.0%}", _histogram(row["score_histogram"]["counts"]),
        )
        for behaviour, row in rows.items()
    ]  # fmt: skip
    return table(head, cells, dict.fromkeys(range(1, 7), "n") | {7: "bar"})


def _histogram(counts: Sequence[int]) -> str:
    """Bars as SVG; the tallest is the most frequent. A bin that is not empty is at least a line."""
    most, wide = max(max(counts), 1), WIDTH / len(counts)
    bars = "".join(
        f'<rect x="{i * wide:.1f}" y="{HEIGHT - high:.1f}" width="{wide - 1:.1f}" height="{high:.1f}">'
        f"<title>{count}</title></rect>"
        for i, count in enumerate(counts)
        if (high := max(HEIGHT * count / most, 1.0 if count else 0.0))
    )
    floor = f'<rect y="{HEIGHT - 0.4}" width="{WIDTH}" height="0.4"/>'
    return (
        f'<svg class="finetuned" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" fill="currentColor">'
        f"{floor}{bars}</svg>"
    )


def _sum(sources: Mapping[str, Any], what: str) -> int:
    return sum(row[what] for row in sources.values())
