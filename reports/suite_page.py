"""The report of a suite: report.html for a person, report.json for a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reports import suite_figures as figures
from reports.figures import DARK
from reports.html import document, fact_line, picture, section, table, text
from reports.suite_record import BASELINE, SuiteRecord, comparison, read_suite
from retrieval.files import replace_file

MEASURES = {"score": "Scores", "return": "Returns"}


def write_suite_report(folder: Path) -> tuple[Path, str]:
    """Writes report.html and report.json into a suite's folder, finished or not. The page, and its first sentence."""
    record = read_suite(folder)
    found = comparison(record)
    said = verdict(found)
    with replace_file(folder / "report.json") as file:
        file.write((json.dumps({**found, "verdict": said}, indent=1) + "\n").encode())
    with replace_file(folder / "report.html") as file:
        file.write(_page(record, found, said).encode())
    return folder / "report.html", said


def verdict(found: Mapping[str, Any]) -> str:
    """What the numbers say of the best method, and whether they settle it."""
    rows = {name: row for name, row in found["aggregate"]["score"].items() if "gain_over_scratch" in row}
    if not rows:
        return f"{found['trials']} trials are done; there is nothing to compare with {BASELINE} yet."
    best = max(rows, key=lambda name: rows[name]["mean"]["value"])
    gain, said = rows[best]["gain_over_scratch"], f"Beside {BASELINE} {best} has the highest mean"
    if gain["value"] is None:
        return f"{said}; {BASELINE} scored nothing, so there is no gain over it to state."
    said += f": {_percent(gain)} against {BASELINE} on {rows[best]['tasks_with_scratch']} tasks."
    if gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        said += " So few runs do not settle which is better."
    return said


def _page(record: SuiteRecord, found: Mapping[str, Any], said: str) -> str:
    labels = record.labels
    facts = (("trials", found["trials"]), ("failed", len(found["failed"])), ("hours of trials", found["hours"]))
    return document(
        f"Suite {record.name}",
        [
            f"<h1>{text(record.name)}</h1>", f'<p class="verdict">{text(said)}</p>', fact_line(facts),
            *(_aggregate(found["aggregate"][measure], title, measure) for measure, title in MEASURES.items()),
            _per_task(found["per_task"], labels, "score"), _curves(record), _frames(found["per_task"], labels),
            _per_task(found["per_task"], labels, "return"), _variants(record, found), _notes(record),
        ],
    )  # fmt: skip


def _aggregate(rows: Mapping[str, Mapping[str, Any]], title: str, measure: str) -> str:
    if not rows:
        return ""
    head = ("method", "tasks", "runs", "mean", "IQM", f"gain over {BASELINE}", f"P(better than {BASELINE})")
    lines = [
        (
            text(name), str(row["tasks"]), str(row["runs"]), _interval(row["mean"]), _interval(row["iqm"]),
            _percent(row.get("gain_over_scratch")), _interval(row.get("probability_of_improvement")),
        ) for name, row in rows.items()
    ]  # fmt: skip
    shown = [figures.intervals({name: row[key] for name, row in rows.items()}, "", *palette)
             for key in ("iqm",) for palette in ((), (DARK,))]  # fmt: skip
    assert shown[0] is not None
    caption = f"Interquartile mean of normalised {measure}s with 95 % stratified bootstrap intervals."
    unequal = len({row["tasks"] for row in rows.values()}) > 1
    note = "<p>Methods with unlike numbers of tasks are compared in the last two columns alone.</p>" if unequal else ""
    body = table(head, lines, dict.fromkeys(range(1, len(head)), "n")) + note + picture((shown[0], shown[1]), caption)
    return section(f"{title} over all tasks, normalised", body)


def _per_task(tasks: Mapping[str, Mapping[str, Any]], labels: Sequence[str], measure: str) -> str:
    rows = [
        [text(task), *(_interval(methods[name][measure], 1) if name in methods else "" for name in labels)]
        for task, methods in tasks.items()
    ]
    columns = dict.fromkeys(range(1, len(labels) + 1), "n")
    return section(
        f"{MEASURES[measure]} of each task", table(["task", *map(text, labels)], rows, columns) if rows else ""
    )


def _frames(tasks: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> str:
    def cell(methods: Mapping[str, Any], name: str) -> str:
        if name not in methods or name.startswith("prior"):
            return ""
        frames = methods[name]["frames_to_scratch"]
        return "never" if frames is None else f"{frames:,.0f}"

    with_base = {task: methods for task, methods in tasks.items() if BASELINE in methods}
    learned = [name for name in labels if not name.startswith("prior")]
    rows = [[text(task), *(cell(methods, name) for name in learned)] for task, methods in with_base.items()]
    columns = dict.fromkeys(range(1, len(learned) + 1), "n")
    title = f"Frames until the mean curve is where {BASELINE} ends"
    return section(title, table(["task", *map(text, learned)], rows, columns) if rows else "")


def _curves(record: SuiteRecord) -> str:
    light, dark = (figures.curves(record, record.methods, *palette) for palette in ((), (DARK,)))
    if light is None:
        return ""
    caption = "Score over environment frames: mean over seeds, shaded from the lowest to the highest seed."
    return section("Learning curves", picture((light, dark), caption))


def _variants(record: SuiteRecord, found: Mapping[str, Any]) -> str:
    """Where a task was run under other settings: each beside its method."""
    parts = []
    for task in record.tasks:
        rows = found["per_task"][task]
        if varied := [name for name in rows if any(r.variant for r in record.of(name, task))]:
            methods = dict.fromkeys([name.split()[0] for name in varied])
            chosen = {name: rows[name]["score"] for name in (*methods, *varied) if name in rows}
            light, dark = (figures.intervals(chosen, "score", *palette) for palette in ((), (DARK,)))
            assert light is not None
            parts.append(picture((light, dark), f"{task}: mean score with 95 % bootstrap intervals over seeds"))
    return section("Other settings", "".join(parts))


def _notes(record: SuiteRecord) -> str:
    notes = [*record.notes, *(f"{name} failed: {why}" for name, why in record.failed.items())]
    return section("Notes", _list(notes), "notes") if notes else ""


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>"


def _interval(row: Mapping[str, Any] | None, digits: int = 3) -> str:
    if row is None or row["value"] is None:
        return ""
    span = "" if row["low"] is None else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return f"{row['value']:.{digits}f}{span}"


def _percent(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return ""
    span = "" if row["low"] is None else f" [{row['low']:+.1%}, {row['high']:+.1%}]"
    return f"{row['value']:+.1%}{span}"
