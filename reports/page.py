"""The report of a run as HTML: one file, no scripts, no requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.html import (
    Themed,
    data,
    details,
    document,
    fact_line,
    picture,
    section,
    source_table,
    table,
    text,
)
from reports.record import PolicyResult, Retrieved, RunRecord

HEADLINE_SETTINGS = ("method", "seed", "workers", "envs", "budget_frames", "store", "world_model")


@dataclass(frozen=True)
class Pictures:
    """Everything shown that is not text."""

    curve: Themed | None
    guided: Themed | None
    contact_sheet: bytes | None
    film: bytes | None  # mp4
    film_link: str | None  # a film too large for the page, by its name beside the page
    open_loop: bytes | None  # the pre-trained world model's predictions beside what came


def page(record: RunRecord, verdict: str, pictures: Pictures) -> str:
    """The whole document."""
    title = f"{record.task or 'unknown task'} · {record.config.get('method', 'run')}"
    parts = [
        f"<h1>{text(record.task or 'unknown task')}</h1>",
        f'<p class="sub">{text(record.folder.resolve().name)}</p>',
        f'<p class="verdict">{text(verdict)}</p>',
        _facts(record),
        _results(record),
        _curves(pictures),
        _film(pictures),
        _retrieval(record.retrieved, pictures.contact_sheet),
        _world_model(pictures.open_loop),
        _stages(record.stages),
        _faults(record.faults),
        _notes(record.notes),
        details("Settings", f"<pre>{text(record.config_text)}</pre>" if record.config_text else ""),
        details("Last value of every metric", _metrics(record)),
    ]
    return document(title, parts)


def _facts(record: RunRecord) -> str:
    facts = [(name.replace("_", " "), record.config.get(name)) for name in HEADLINE_SETTINGS]
    facts = [(name, f"{v:,}" if type(v) is int and name != "seed" else v) for name, v in facts if v not in (None, "")]
    if record.log:
        facts.append(("collected", f"{record.frames:,} frames in {_duration(record.seconds)}"))
    return fact_line(facts)


def _results(record: RunRecord) -> str:
    if not record.policies:
        return section("Result", '<p class="faint">Not evaluated yet.</p>')
    rows = [
        (
            f'<b class="{text(p.name)}">{text(p.label)}</b>', f"<b>{p.score:,.1f}</b>", _interval(p),
            _bar(p) if record.score_ends_at_100 else "", f"{p.returns:,.1f}", f"{p.episodes}",
            "" if p.frames is None else f"{p.frames:,}",
        )
        for p in record.policies
    ]  # fmt: skip
    scale = "0 … 100" if record.score_ends_at_100 else ""
    head = ("policy", "score", "95 % interval", scale, "return", "episodes", "online frames")
    numbers = table(head, rows, {1: "n", 2: "n", 3: "bar", 4: "n", 5: "n", 6: "n"})
    caption = (
        "Mean over evaluation episodes. The interval is a percentile bootstrap over these episodes; it says nothing "
        "about other seeds."
    )
    return section("Result", numbers + f"<figcaption>{caption}</figcaption>")


def _interval(p: PolicyResult) -> str:
    low, high = p.interval
    return f"{low:.1f} … {high:.1f}" if math.isfinite(low) else '<span class="faint">needs 2 episodes</span>'


def _bar(p: PolicyResult) -> str:
    """The score as a bar on 0…100 with its interval as a whisker."""
    at = [min(max(x, 0.0), 100.0) for x in (p.score, *p.interval) if math.isfinite(x)]
    whisker = ""
    if len(at) == 3:
        ends = "".join(f'<rect x="{x - 0.2:.2f}" y="5" width="0.4" height="10"/>' for x in at[1:])
        line = f'<rect x="{at[1]:.2f}" y="9.2" width="{at[2] - at[1]:.2f}" height="1.6"/>'
        whisker = f'<g fill="var(--text)">{line}{ends}</g>'
    return (
        f'<svg class="{text(p.name)}" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" '
        f'aria-label="{p.score:.1f} of 100"><rect x="0" y="4" width="100" height="12" fill="var(--line)" opacity=".5"/>'
        f'<rect x="0" y="4" width="{at[0]:.2f}" height="12" fill="currentColor" opacity=".8"/>{whisker}</svg>'
    )


def _curves(pictures: Pictures) -> str:
    body = ""
    if pictures.curve:
        body += picture(
            pictures.curve, "Score over environment frames. Bands and whiskers are 95 % intervals over episodes."
        )
    if pictures.guided:
        body += picture(pictures.guided, "Execution guidance: how much of each collected episode the prior acted.")
    return section("Learning", body or '<p class="faint">No finished episode yet.</p>')


def _film(pictures: Pictures) -> str:
    if pictures.film:
        return section(
            "Film",
            f'<video controls autoplay loop muted playsinline src="{data(pictures.film, "video/mp4")}"></video>',
        )
    if pictures.film_link:
        link = text(pictures.film_link)
        return section("Film", f'<p>Too large to embed: <a href="{link}">{link}</a>, beside this page.</p>')
    return ""


def _retrieval(retrieved: Retrieved | None, sheet: bytes | None) -> str:
    body = ""
    if retrieved:
        how = "drawn at random" if retrieved.kind == "random" else "nearest first frames"
        finite = [d for d in retrieved.distances if math.isfinite(d)]
        span = f", distances {min(finite):.3g} to {max(finite):.3g}" if finite else ""
        count = f"{retrieved.taken} of {retrieved.asked} asked for"
        right = retrieved.of_task
        precision = "" if right is None else f"; {right:.0%} of the task itself, chance {retrieved.chance or 0:.0%}"
        body += f"<p>{text(retrieved.embodiment)}: {count}, {how}{span}{precision}.</p>"
    if sheet:
        caption = (
            "Query above; below it the nearest and the farthest of the trajectories taken, with distance and source."
        )
        body += picture((sheet, None), caption)
    if retrieved:
        body += _sources(retrieved)
    return section("Retrieved for rehearsal", body)


def _world_model(strip: bytes | None) -> str:
    if strip is None:
        return ""
    caption = "What the pre-trained world model foresees from the first frames and the actions alone, beside what came."
    return section("World model", picture((strip, None), caption))


def _sources(retrieved: Retrieved) -> str:
    return source_table(retrieved.sources)


def _stages(stages: Sequence[tuple[str, float]]) -> str:
    if not stages:
        return ""
    widest = max(max(s for _, s in stages), 1e-9)
    rows = [(text(name), _duration(s), f'<div style="width:{100 * s / widest:.0f}%"></div>') for name, s in stages]
    rows.append(("<b>all</b>", f"<b>{_duration(sum(s for _, s in stages))}</b>", ""))
    return section("Time", table(("stage", "took", ""), rows, {1: "n", 2: "meter"}))


def _faults(faults: Mapping[str, int]) -> str:
    """What failed on the way and was replaced; each lost its episode at most."""
    rows = [(text(sentence), f"{n:,}") for sentence, n in faults.items()]
    return section("Replaced on the way", table(("fault", "times"), rows, {1: "n"}) if rows else "")


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return section("Not in this report", f"<ul>{items}</ul>" if notes else "", "notes")


def _metrics(record: RunRecord) -> str:
    rows = [(text(name), f"{value:,.5g}") for name, value in record.last_values().items()]
    return table(("metric", "value"), rows, {1: "n"}) if rows else ""


def _duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
