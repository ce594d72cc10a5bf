"""Numbers that follow a run's agent steps, as settings write them: constant(P), linear(FROM,TO,STEPS) or piecewise."""

from __future__ import annotations

import itertools
import re

import numpy as np

from gsa.errors import UsageError

FORMS = "constant(P), linear(FROM,TO,STEPS) or piecewise(STEP:P,STEP:P,…)"


def schedule_value(schedule: str | float, step: int) -> float:
    """The schedule's value at `step`, in [0, 1]; linear between its points, constant outside them. A number stands
    for itself. UsageError where it is no schedule."""
    points = _points(str(schedule))
    return float(np.interp(step, [s for s, _ in points], [p for _, p in points]))


def _points(schedule: str) -> list[tuple[float, float]]:
    match = re.fullmatch(r"\s*(constant|linear|piecewise)\s*\(([^()]*)\)\s*", schedule)
    kind, arguments = (match[1], match[2].split(",")) if match else ("constant", [schedule])
    try:
        if kind == "constant":
            (value,) = map(float, arguments)
            points = [(0.0, value)]
        elif kind == "linear":
            first, last, steps = map(float, arguments)
            points = [(0.0, first), (steps, last)]
        else:
            points = [(float(s), float(p)) for s, p in (a.split(":") for a in arguments)]
    except ValueError:
        raise UsageError(f"Not a schedule: '{schedule}'. Write {FORMS}.") from None
    steps_rise = all(a[0] < b[0] for a, b in itertools.pairwise(points))
    if not steps_rise or not all(0 <= p <= 1 for _, p in points):
        raise UsageError(f"In the schedule '{schedule}' steps must rise and values lie in [0, 1].")
    return points
