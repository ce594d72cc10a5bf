"""The numbers of docs/results.md, and its pictures, from benchmarks/results: sample_efficiency.json, pool.json and
pilots.json. What stands outside the page's two marks is prose, and stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
CURVES, SHIFT, LARGER = "results_curves.png", "results_shift.png", "results_larger.png"
COLOURS = {
    "scratch": "#57606a", "naive": "#1f883d", "rehearsal": "#bc4c00", "random-rehearsal": "#bf8700", "gsa": "#0969da",
    "jsrl": "#8250df", "retrieved": "#bc4c00", "random": "#bf8700", "pool": "#57606a",
}  # fmt: skip
SETS = ("retrieved", "random", "pool")
PLACES = ("met last", "pool", "expert")
EACH = "Means, and each seed's in brackets."
MEASURES = {"score": "success on Meta-World, return on DMControl", "return": "return on both"}


def write() -> None:
    """Writes the page anew from what is kept."""
    text, pictures = page(*kept())
    for name, draw in pictures.items():
        draw(DOCS / name)
    path = DOCS / "results.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def kept() -> list[dict[str, Any]]:
    """The report of the benchmark, the pool's, the pilots'; {} for one that is not there."""
    paths = [harness.RESULTS / f"{name}.json" for name in ("sample_efficiency", "pool", "pilots")]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


def page(report: Mapping[str, Any], pool: Mapping[str, Any], pilots: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The page's text, and what draws its pictures, by file name. Parts whose numbers are not there are left out."""
    found = report.get("result", {})
    pictures: dict[str, Any] = {}
    parts = [_state(report)]
    if found.get("measures"):
        parts += [_goals(report), _aggregates(found), _tasks(found), _whole_run(found), _sooner(found)]
    if found.get("curves"):
        pictures[CURVES] = lambda path: _draw_curves(path, found["curves"])
        parts.append(f"![Learning curves of each method, a panel for each task.]({CURVES})")
    parts += [_guided(found), _retrieval(found)]
    if shifts := {task: rows for task, rows in found.get("shift", {}).items() if rows}:
        pictures[SHIFT] = lambda path: _draw_shift(path, shifts)
        parts += [_shift(shifts), f"![Wasserstein distances over the run.]({SHIFT})"]
    parts += [_model_error(found), _others(found), _sensitivity(found)]
    if found.get("larger_budget"):
        pictures[LARGER] = lambda path: _draw_curves(
            path, {found["larger_budget"]["task"]: found["larger_budget"]["curves"]}
        )
        parts += [_larger(found["larger_budget"]), f"![Learning curves at the larger budget.]({LARGER})"]
    parts.append(_again(found))
    return "\n\n".join(part for part in [*parts, _pool(pool), _pilots(pilots)] if part), pictures


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column is left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _state(report: Mapping[str, Any]) -> str:
    found = report.get("result", {})
    done, planned = found.get("trials", 0), found.get("planned", 0)
    if not done:
        return "**No trial of the grid is done yet.** What follows is what was measured before it."
    text = f"{done} of {planned} trials are done, {found['hours']:.1f} hours of one core"
    left = "" if done == planned else f". **The other {planned - done} are not there yet**, so the numbers may change"
    where = f"Analysed at commit `{report['commit'][:8]}`; each trial's file names its own, and its machine"
    return f"{text}{left}. {where}: {', '.join(found['processors'])}."


def _goals(report: Mapping[str, Any]) -> str:
    rows = [
        (name, _value(g["value"]), g["goal"], "yes" if g["holds"] else "**no**") for name, g in report["goals"].items()
    ]
    return "### What is claimed\n\n" + table(("claim", "measured", "goal", "holds"), rows)


def _aggregates(found: Mapping[str, Any]) -> str:
    parts = ["### All tasks together"]
    parts += [f"Normalised {what}:\n\n{_aggregate(found['measures'][m])}" for m, what in MEASURES.items()]
    seeds = ", ".join(f"{task} {len(seeds)}" for task, seeds in found["seeds"].items())
    return "\n\n".join([*parts, f"Seeds that every method has: {seeds}."])


def _whole_run(found: Mapping[str, Any]) -> str:
    note = (
        "The same of the mean over all evaluations of a run, its learning curve's area, instead of its end, at which a "
        "policy may just have been lost or found. This was added when the results were known."
    )
    parts = ["### Over the whole run", note]
    for measure, what in MEASURES.items():
        of = found["whole_run"][measure]
        parts.append(f"Normalised {what}:\n\n{_aggregate(of)}\n\n{_by_task(of)}")
    return "\n\n".join(parts)


def _aggregate(of: Mapping[str, Any]) -> str:
    rows = []
    for method, row in of["aggregate"].items():
        against = of.get(f"{method} over scratch") or {}
        versus = of.get(f"gsa over {method}") or {}
        gain = _percent(against.get("gain"))
        rows.append((method, _estimate(row["mean"]), _estimate(row["iqm"]), gain, _estimate(versus.get("better"))))
    return table(("method", "mean [95 %]", "IQM [95 %]", "gain over scratch", "probability that gsa is better"), rows)


def _tasks(found: Mapping[str, Any]) -> str:
    parts = [f"Normalised {what}, mean over seeds:\n\n{_by_task(found['measures'][m])}" for m, what in MEASURES.items()]
    return "\n\n".join(["### Task by task", *parts])


def _by_task(of: Mapping[str, Any]) -> str:
    runs = of["runs"]
    tasks = dict.fromkeys(task for by_task in runs.values() for task in by_task)
    rows = [(task, *(_mean(by_task.get(task)) for by_task in runs.values())) for task in tasks]
    return table(("task", *runs), rows)


def _sooner(found: Mapping[str, Any]) -> str:
    rows, reached_by = [], [row.get("frames", {}) for row in found["frames_to_scratch"].values()]
    methods = [m for m in COLOURS if any(m in frames for frames in reached_by)]
    for task, row in found["frames_to_scratch"].items():
        if row:
            reached = (row["frames"].get(m) for m in methods)
            rows.append((task, f"{row['return']:.0f}", *("—" if f is None else f"{f:,.0f}" for f in reached)))
    note = "Frames until the mean curve is first at the mean return that scratch ended with; —: not within the budget."
    return f"### How much sooner\n\n{note}\n\n{table(('task', 'return', *methods), rows)}" if rows else ""


def _guided(found: Mapping[str, Any]) -> str:
    rows = [(name, *(f"{share:.0%}" for share in shares)) for name, shares in found.get("guided_share", {}).items()]
    head = ("task and method", *(f"fifth {i + 1}" for i in range(len(rows[0]) - 1))) if rows else ()
    return f"### Steps that the prior took\n\n{table(head, rows)}" if rows else ""


def _retrieval(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found.get("retrieval", {}).items():
        for at in row["precision"]:
            rows.append((name, at["k"], _share(at["task"]), _share(row["task_share"]), _share(at["embodiment"])))
    note = (
        "Of the k trajectories rehearsed, the share that was collected in the task; beside what chance would give, and "
        "the share of the task's body among the k nearest without the filter by body."
    )
    head = ("task and method", "k", "of the task", "chance", "body, no filter")
    return f"### What was retrieved\n\n{note}\n\n{table(head, rows)}" if rows else ""


def _shift(found: Mapping[str, Any]) -> str:
    rows = []
    for task, distances in found.items():
        for place in dict.fromkeys(d["from"] for d in distances):
            at = {d["to"]: d for d in distances if d["from"] == place}
            rows.append((task, place, at["pool"]["runs"], *(f"{at[to]['distance'][0]:.2f}" for to in SETS)))
    note = (
        "Wasserstein distance (W1) between posterior states of the pre-trained world model, from what gsa met in each "
        "quarter of the run and from an expert; means over runs."
    )
    return f"### How far the rehearsed data is\n\n{note}\n\n" + table(("task", "from", "runs", *SETS), rows)


def _model_error(found: Mapping[str, Any]) -> str:
    rows = []
    for task, methods in found.get("model_error", {}).items():
        for method in [m for m in ("pre-trained", *COLOURS) if m in methods]:
            of = methods[method]
            cells = (f"{of[place][0]:.1f} + {of[place][1]:.1f}" for place in PLACES)
            rows.append((f"{task} {method}", of["runs"], *cells))
    note = (
        "Squared error of the images + KL of posterior from prior (nats), a step, of the pre-trained world model and "
        "of each method's at its end: on what the run met in its last quarter, on its body's part of the pool, and "
        "on an expert that is in neither; means over runs."
    )
    head = ("task and method", "runs", *PLACES)
    return f"### How well the world models fit\n\n{note}\n\n{table(head, rows)}" if rows else ""


def _others(found: Mapping[str, Any]) -> str:
    rows = []
    for measures in found.get("others", {}).values():
        for method, of in measures["score"].items():
            for task, values in of.items():
                rows.append((task, method, _each(values), _each(measures["return"][method][task])))
    head = ("task", "method", "score", "return")
    note = f"The prior acts first, then the policy. {EACH}"
    return f"### JSRL beside GSA\n\n{note}\n\n{table(head, sorted(rows, reverse=True))}" if rows else ""


def _sensitivity(found: Mapping[str, Any]) -> str:
    measures = ("score", "default_score", "return", "default_return")
    of = found.get("sensitivity", {})
    rows = [(variant, *(_each(row[m]) for m in measures)) for variant, row in of.items()]
    head = ("variant", "score", "default's", "return", "default's")
    tasks = ", ".join(dict.fromkeys(row["task"] for row in of.values()))
    note = f"gsa on {tasks} with one setting changed, beside the suite's own settings with the same seeds. {EACH}"
    return f"### Sensitivity\n\n{note}\n\n{table(head, rows)}" if rows else ""


def _larger(found: Mapping[str, Any]) -> str:
    task, columns = found["task"], [found[when][m] for when in ("final", "whole_run") for m in MEASURES]
    rows = [(method, *(_each(of[method][task]) for of in columns)) for method in columns[0]]
    head, note = ("method", "score", "return", "score over the run", "return over the run"), EACH
    if row := found.get("catches_up"):
        when = "not by then" if row["frames"] is None else f"at {row['frames']:,.0f} frames"
        note += (
            f" Scratch reaches the return that gsa ended with at the suite's own budget, {row['return']:.2f}, {when}."
        )
    return f"### {task} at {found['frames']:,} frames\n\n{note}\n\n{table(head, rows)}"


def _again(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found.get("again", ()):
        low, high = row["interval"]
        what = f"{row['measure']}{' over the run' if row['whole_run'] else ''}"
        interval = "—" if low is None else f"[{low:.2f}, {high:.2f}]"
        cells = (what, _each(row["again"]), _each(row["first"]), interval, "yes" if row["inside"] else "**no**")
        rows.append((f"{row['task']} {row['method']}", *cells))
    head = ("task and method", "", "again", "first", "interval of the first's mean", "inside")
    notes = [
        f"Trials that were run a second time, in an empty folder, beside the first ones with the same seeds. {EACH}"
    ]
    for name, row in {f"{row['task']} {row['method']}": row for row in found.get("again", ())}.items():
        same, equal = (", ".join(map(str, row[key])) or "none" for key in ("same_processor", "equal"))
        notes.append(f"{name}: on the same kind of processor both times: {same}; equal in every episode: {equal}.")
    return f"### Run again\n\n{' '.join(notes)}\n\n{table(head, rows)}" if rows else ""


def _pool(pool: Mapping[str, Any]) -> str:
    if not pool:
        return ""
    head = ("source", "episodes", "mean return", "best", "success")
    note = "What the pool does not tell and the method never sees: how good its sources are."
    beside = "Beside it, and not in it: the experts that scores are held against."
    rows, experts = _sources(pool["sources"]), _sources(pool.get("experts", {}))
    return f"### The pool\n\n{note}\n\n{table(head, rows)}\n\n{beside}\n\n{table(head, experts)}"


def _sources(sources: Mapping[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, row in sources.items():
        success, returns = "" if row["success"] is None else f"{row['success']:.0%}", row["return"]
        rows.append((f"`{name}`", row["episodes"], f"{returns['mean']:.0f}", f"{returns['max']:.0f}", success))
    return rows


def _pilots(pilots: Mapping[str, Any]) -> str:
    rows = []
    for row in pilots.get("pilots", []):
        curve = ", ".join(f"{p['frames']:,}: {p['score']:.0f} ({p['return']:.0f})" for p in row["curve"])
        rows.append((row["task"], row["updates"], row["frames"], curve or "—", row["ended"]))
    note = "Scratch alone, to choose the tasks by, before any other method ran. Evaluations: frames: score (return)."
    head = ("task", "updates", "frames", "evaluations", "ended")
    return f"### Pilots\n\n{note}\n\n{table(head, rows)}" if rows else ""


def _draw_curves(path: Path, curves: Mapping[str, Mapping[str, Any]]) -> None:
    figure, grid = _figure(2, len(curves))
    for row, (measure, axes_row) in enumerate(zip(MEASURES, grid, strict=True)):
        for axes, (task, methods) in zip(axes_row, curves.items(), strict=True):
            for method, curve in methods.items():
                axes.plot(curve["frames"], curve[measure], "o-", ms=3, lw=1.6, color=COLOURS.get(method), label=method)
            axes.set_title(task if row == 0 else "", fontsize=9)
            axes.set_ylabel(f"normalised {measure}" if axes is axes_row[0] else "", fontsize=8)
    _save(path, figure, grid[0][0])


def _draw_shift(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A line over the quarters of the run, and apart from it the distance from the expert."""
    figure, grid = _figure(1, len(found))
    for axes, (task, distances) in zip(grid[0], found.items(), strict=True):
        places = list(dict.fromkeys(d["from"] for d in distances))
        for to in SETS:
            own = [d["distance"] for d in distances if d["to"] == to]
            whiskers = [[mean - low for mean, low, _ in own], [high - mean for mean, _, high in own]]
            means = [d[0] for d in own]
            axes.errorbar(range(len(places)), means, whiskers, fmt="o", ms=4, capsize=3, color=COLOURS[to], label=to)
            axes.plot(range(len(places) - 1), means[:-1], color=COLOURS[to])
        axes.set_xticks(range(len(places)), [place.replace("online ", "") for place in places])
        axes.set_title(task, fontsize=9)
    grid[0][0].set_ylabel("W1 from what was met", fontsize=8)
    _save(path, figure, grid[0][0])


def _save(path: Path, figure: Any, axes: Axes) -> None:
    """With the legend of these axes above all of them."""
    names = axes.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(names[1]), fontsize=7.5, frameon=False)
    figure.savefig(path)


def _figure(rows: int, columns: int) -> tuple[Any, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(color="#e3e7ec", lw=0.7)
        axes.tick_params(labelsize=7.5, length=0)
        axes.set_axisbelow(True)
    return figure, grid.tolist()


def _estimate(row: Mapping[str, Any] | None) -> str:
    if not row or row["value"] is None:
        return ""
    return f"{row['value']:.2f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")


def _percent(row: Mapping[str, Any] | None) -> str:
    if not row or row["value"] is None:
        return ""
    return f"{row['value']:+.0%}" + ("" if row["low"] is None else f" [{row['low']:+.0%}, {row['high']:+.0%}]")


def _mean(values: Sequence[float] | None) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "—"


def _each(values: Sequence[float]) -> str:
    """The mean, and what it is the mean of: seeds are too few for an interval."""
    return f"{_mean(values)} ({', '.join(f'{v:.2f}' for v in values)})" if len(values) > 1 else _mean(values)


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.0%}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "not there yet" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
