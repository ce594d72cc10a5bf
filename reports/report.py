"""The report of one run: report.html for a person, report.json for a program."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import figures
from reports.page import Pictures, page
from reports.record import PolicyResult, RunRecord, read_run

LARGEST_EMBEDDED = 40 << 20  # bytes; a larger film is linked, not embedded


@dataclass(frozen=True)
class ReportSummary:
    """What the report says, and where it is."""

    html: Path
    json: Path
    task: str
    policies: tuple[PolicyResult, ...]
    verdict: str  # one or two sentences
    notes: tuple[str, ...]  # what is missing


def write_report(run: str | Path) -> ReportSummary:
    """Writes report.html, report.json and learning_curve.png into the run folder, finished or not.

    The page is one file: pictures and film are inside it and it asks nothing from anywhere. Raises UsageError when
    the folder is no run.
    """
    record = read_run(run)
    said = verdict(record)
    curve = figures.learning_curve(record)
    if curve:
        _write(record.folder / "learning_curve.png", curve)
    html, summary = record.folder / "report.html", record.folder / "report.json"
    _write(html, page(record, said, _pictures(record, curve)).encode())
    _write(summary, (json.dumps(_plain(record, said), indent=2) + "\n").encode())
    return ReportSummary(html, summary, record.task, tuple(record.policies), said, tuple(record.notes))


def verdict(record: RunRecord) -> str:
    """What the numbers say, and what they do not."""
    result = record.policy("finetuned")
    if result is None:
        return "The fine-tuned policy has not been evaluated yet."
    said = f"After {record.frames:,} frames the fine-tuned policy scores {_scored(result)}"
    others = [p for name in ("prior", "random") if (p := record.policy(name))]
    if not others:
        return said + "."
    said += ", against " + " and ".join(f"{_scored(p)} for the {p.label}" for p in others) + "."
    unsettled = [p.label for p in others if not _apart(result, p)]
    if unsettled:
        return said + f" This many episodes do not tell it from the {' and the '.join(unsettled)}."
    return said


def _scored(result: PolicyResult) -> str:
    low, high = result.interval
    interval = f" (95 % interval {low:.1f} to {high:.1f})" if math.isfinite(low) else " (one episode)"
    return f"{result.score:.1f}{interval}"


def _apart(a: PolicyResult, b: PolicyResult) -> bool:
    """Whether the two intervals are disjoint: stricter than a test of the difference. False where one is unknown."""
    return a.interval[0] > b.interval[1] or a.interval[1] < b.interval[0]


def _pictures(record: RunRecord, curve: bytes | None) -> Pictures:
    sheet, film = record.folder / "contact_sheet.png", record.folder / "video.mp4"
    small = film.exists() and film.stat().st_size <= LARGEST_EMBEDDED
    return Pictures(
        curve=(curve, figures.learning_curve(record, figures.DARK)) if curve else None,
        guided=(share, figures.guided_share(record, figures.DARK)) if (share := figures.guided_share(record)) else None,
        contact_sheet=sheet.read_bytes() if sheet.exists() else None,
        film=film.read_bytes() if small else None,
        film_link=film.name if film.exists() and not small else None,
        open_loop=strip.read_bytes() if (strip := _open_loop(record)) else None,
    )  # fmt: skip


def _open_loop(record: RunRecord) -> Path | None:
    """The strip that pre-training drew of what the run's world model foresees, while that is still where it was."""
    folder = record.config.get("world_model")
    strip = Path(folder) / "open_loop.png" if isinstance(folder, str) else None
    return strip if strip is not None and strip.is_file() else None


def _plain(record: RunRecord, said: str) -> dict[str, Any]:
    policies = {
        p.name: {
            "score": p.score, "score_low": _finite(p.interval[0]), "score_high": _finite(p.interval[1]),
            "return": p.returns, "episodes": p.episodes, "frames": p.frames,
        } for p in record.policies
    }  # fmt: skip
    return {
        "task": record.task, "method": record.config.get("method"), "seed": record.config.get("seed"),
        "frames": record.frames, "seconds": round(record.seconds, 1), "policies": policies, "verdict": said,
        "stages": [{"stage": stage, "seconds": seconds} for stage, seconds in record.stages],
        "notes": list(record.notes),
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
