"""The HTML that pages are made of: one file, no scripts, no requests; every text is escaped, passwords are masked."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST_SOURCES = 12  # rows of a table of sources
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
h3 { font-size: 14px; margin: 22px 0 6px; overflow-wrap: anywhere; }
h3 span { font-size: 12px; font-weight: 400; display: block; }
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


def document(title: str, parts: Iterable[str]) -> str:
    """A page of ready HTML; empty parts are left out."""
    policy = "default-src 'none'; img-src data:; media-src data: 'self'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def mask_passwords(text: str) -> str:
    """`text` with the password of every URL in it hidden: a report is passed around."""
    return re.sub(r"(://[^\s/:@]*):[^\s/@]+@", r"\1:•••@", text)


def text(value: Any) -> str:
    return escape(mask_passwords(str(value)))


def section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{text(title)}</h2>{body}</section>' if body else ""


def details(title: str, body: str) -> str:
    return f"<section><details><summary>{text(title)}</summary>{body}</details></section>" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], columns: Mapping[int, str]) -> str:
    """A table of ready HTML cells; `columns` gives the class of a column: n for numbers, bar, meter."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (f' class="{columns[i]}"' if i in columns else "" for i in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{kind}>{c}</{tag}>' for kind, c in zip(kinds, cells, strict=True))}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def picture(images: Themed, caption: str) -> str:
    light, dark = images
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{data(dark, "image/png")}">' if dark else ""
    alt = text(caption)
    image = f'<picture>{source}<img src="{data(light, "image/png")}" alt="{alt}"></picture>'
    return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"


def data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def fact_line(facts: Iterable[tuple[str, Any]]) -> str:
    """Names and values in a row."""
    return '<div class="facts">' + "".join(f"<span>{text(k)} <b>{text(v)}</b></span>" for k, v in facts) + "</div>"


def source_table(sources: Mapping[str, int]) -> str:
    """Source → trajectories as a table; the first of many, the rest summed up."""
    shown, rest = list(sources.items())[:MOST_SOURCES], list(sources.values())[MOST_SOURCES:]
    widest = max((n for _, n in shown), default=1)
    rows = [(text(name), f"{n:,}", f'<div style="width:{100 * n / widest:.0f}%"></div>') for name, n in shown]
    if rest:
        rows.append((f"{len(rest)} other sources", f"{sum(rest):,}", ""))
    return table(("source", "trajectories", ""), rows, {1: "n", 2: "meter"}) if rows else ""
