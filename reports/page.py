"""The report's HTML: one file, no scripts, no requests; every text from the run is escaped, passwords are masked."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from reports.record import PolicyResult, Retrieved, RunRecord

HEADLINE_SETTINGS = ("method", "seed", "workers", "envs", "budget_frames", "store", "world_model")
MOST_SOURCES = 12  # rows of the table of sources
Themed = tuple[bytes, bytes | None]  # a PNG for the light page, one for the dark

STYLE = """
:root { color-scheme: light dark; --bg: #f6f8fa; --card: #fff; --text: #1f2328; --faint: #59636e; --line: #d8dee4;
  --random: #818b98; --prior: #bc4c00; --finetuned: #0969da; --note: #fff8c5; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --card: #151a21; --text: #e6edf3; --faint: #9198a1;
  --line: #2b323b; --random: #9198a1; --prior: #f0883e; --finetuned: #58a6ff; --note: #2d2a16; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1000px; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 25px; margin: 0; } h2 { font-size: 17px; margin: 0 0 10px; }
.sub, figcaption, th, .faint { color: var(--faint); } .sub { margin: 2px 0 16px; }
.verdict { font-size: 17px; margin: 0 0 18px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 18px; overflow-x: auto; }
section.notes { background: var(--note); } .notes ul { margin: 0; padding-left: 20px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; font-size: 13px; } th, td { padding: 6px 12px 6px 0; vertical-align: middle;
  border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; } .n { text-align: right; }
td, th { white-space: nowrap; } td.bar { width: 100%; padding: 0 20px 0 4px; } td.text { white-space: normal; }
td.meter { width: 45%; } svg { display: block; width: 100%; height: 20px; min-width: 90px; }
.random { color: var(--random); } .prior { color: var(--prior); } .finetuned { color: var(--finetuned); }
img, video { max-width: 100%; display: block; border-radius: 6px; } figure { margin: 0 0 14px; }
figcaption { font-size: 13px; margin-top: 6px; } video { image-rendering: pixelated; background: #000; }
.meter div { height: 10px; border-radius: 3px; background: var(--faint); opacity: .55; min-width: 2px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 18px; font-size: 14px; }
.facts b { font-weight: 600; overflow-wrap: anywhere; } details summary { cursor: pointer; font-weight: 600; }
pre { font-size: 12.5px; overflow-x: auto; margin: 12px 0 0; white-space: pre-wrap; }
"""


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
        f"<h1>{_text(record.task or 'unknown task')}</h1>",
        f'<p class="sub">{_text(record.folder.resolve().name)}</p>',
        f'<p class="verdict">{_text(verdict)}</p>',
        _facts(record),
        _results(record),
        _curves(pictures),
        _film(pictures),
        _retrieval(record.retrieved, pictures.contact_sheet),
        _world_model(pictures.open_loop),
        _stages(record.stages),
        _notes(record.notes),
        _details("Settings", f"<pre>{_text(record.config_text)}</pre>" if record.config_text else ""),
        _details("Last value of every metric", _metrics(record)),
    ]
    policy = "default-src 'none'; img-src data:; media-src data: 'self'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def mask_passwords(text: str) -> str:
    """`text` with the password of every URL in it hidden: a report is passed around."""
    return re.sub(r"(://[^\s/:@]*):[^\s/@]+@", r"\1:•••@", text)


def _text(value: Any) -> str:
    return escape(mask_passwords(str(value)))


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{_text(title)}</h2>{body}</section>' if body else ""


def _details(title: str, body: str) -> str:
    return f"<section><details><summary>{_text(title)}</summary>{body}</details></section>" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], columns: Mapping[int, str]) -> str:
    """A table of ready HTML cells; `columns` gives the class of a column: n for numbers, bar, meter."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (f' class="{columns[i]}"' if i in columns else "" for i in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{kind}>{c}</{tag}>' for kind, c in zip(kinds, cells, strict=True))}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _facts(record: RunRecord) -> str:
    facts = [(name.replace("_", " "), record.config.get(name)) for name in HEADLINE_SETTINGS]
    facts = [(name, f"{v:,}" if type(v) is int and name != "seed" else v) for name, v in facts if v not in (None, "")]
    if record.log:
        facts.append(("collected", f"{record.frames:,} frames in {_duration(record.seconds)}"))
    return '<div class="facts">' + "".join(f"<span>{_text(k)} <b>{_text(v)}</b></span>" for k, v in facts) + "</div>"


def _results(record: RunRecord) -> str:
    if not record.policies:
        return _section("Result", '<p class="faint">Not evaluated yet.</p>')
    rows = [
        (
            f'<b class="{_text(p.name)}">{_text(p.label)}</b>', f"<b>{p.score:,.1f}</b>", _interval(p),
            _bar(p) if record.score_ends_at_100 else "", f"{p.returns:,.1f}", f"{p.episodes}",
            "" if p.frames is None else f"{p.frames:,}",
        )
        for p in record.policies
    ]  # fmt: skip
    scale = "0 … 100" if record.score_ends_at_100 else ""
    head = ("policy", "score", "95 % interval", scale, "return", "episodes", "online frames")
    table = _table(head, rows, {1: "n", 2: "n", 3: "bar", 4: "n", 5: "n", 6: "n"})
    caption = (
        "Mean over evaluation episodes. The interval is a percentile bootstrap over these episodes; it says nothing "
        "about other seeds."
    )
    return _section("Result", table + f"<figcaption>{caption}</figcaption>")


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
        f'<svg class="{_text(p.name)}" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" '
        f'aria-label="{p.score:.1f} of 100"><rect x="0" y="4" width="100" height="12" fill="var(--line)" opacity=".5"/>'
        f'<rect x="0" y="4" width="{at[0]:.2f}" height="12" fill="currentColor" opacity=".8"/>{whisker}</svg>'
    )


def _curves(pictures: Pictures) -> str:
    body = ""
    if pictures.curve:
        body += _picture(
            pictures.curve, "Score over environment frames. Bands and whiskers are 95 % intervals over episodes."
        )
    if pictures.guided:
        body += _picture(pictures.guided, "Execution guidance: how much of each collected episode the prior acted.")
    return _section("Learning", body or '<p class="faint">No finished episode yet.</p>')


def _picture(images: Themed, caption: str) -> str:
    light, dark = images
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark, "image/png")}">' if dark else ""
    alt = _text(caption)
    image = f'<picture>{source}<img src="{_data(light, "image/png")}" alt="{alt}"></picture>'
    return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"


def _film(pictures: Pictures) -> str:
    if pictures.film:
        return _section(
            "Film",
            f'<video controls autoplay loop muted playsinline src="{_data(pictures.film, "video/mp4")}"></video>',
        )
    if pictures.film_link:
        link = _text(pictures.film_link)
        return _section("Film", f'<p>Too large to embed: <a href="{link}">{link}</a>, beside this page.</p>')
    return ""


def _retrieval(retrieved: Retrieved | None, sheet: bytes | None) -> str:
    body = ""
    if retrieved:
        how = "drawn at random" if retrieved.kind == "random" else "nearest first frames"
        finite = [d for d in retrieved.distances if math.isfinite(d)]
        span = f", distances {min(finite):.3g} to {max(finite):.3g}" if finite else ""
        count = f"{retrieved.taken} of {retrieved.asked} asked for"
        body += f"<p>{_text(retrieved.embodiment)}: {count}, {how}{span}.</p>"
    if sheet:
        caption = (
            "Query above; below it the nearest and the farthest of the trajectories taken, with distance and source."
        )
        body += _picture((sheet, None), caption)
    if retrieved:
        body += _sources(retrieved)
    return _section("Retrieved for rehearsal", body)


def _world_model(strip: bytes | None) -> str:
    if strip is None:
        return ""
    caption = "What the pre-trained world model foresees from the first frames and the actions alone, beside what came."
    return _section("World model", _picture((strip, None), caption))


def _sources(retrieved: Retrieved) -> str:
    shown = list(retrieved.sources.items())[:MOST_SOURCES]
    widest = max((n for _, n in shown), default=1)
    rows = [(_text(name), f"{n}", f'<div style="width:{100 * n / widest:.0f}%"></div>') for name, n in shown]
    if rest := list(retrieved.sources.items())[MOST_SOURCES:]:
        rows.append((f"{len(rest)} other sources", f"{sum(n for _, n in rest)}", ""))
    return _table(("source", "trajectories", ""), rows, {1: "n", 2: "meter"}) if rows else ""


def _stages(stages: Sequence[tuple[str, float]]) -> str:
    if not stages:
        return ""
    widest = max(max(s for _, s in stages), 1e-9)
    rows = [(_text(name), _duration(s), f'<div style="width:{100 * s / widest:.0f}%"></div>') for name, s in stages]
    rows.append(("<b>all</b>", f"<b>{_duration(sum(s for _, s in stages))}</b>", ""))
    return _section("Time", _table(("stage", "took", ""), rows, {1: "n", 2: "meter"}))


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return _section("Not in this report", f"<ul>{items}</ul>" if notes else "", "notes")


def _metrics(record: RunRecord) -> str:
    rows = [(_text(name), f"{value:,.5g}") for name, value in record.last_values().items()]
    return _table(("metric", "value"), rows, {1: "n"}) if rows else ""


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
