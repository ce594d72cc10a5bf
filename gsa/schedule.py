"""Numbers that follow a run's progress, as settings write them.

0.3  or  constant(0.3)              always the same
linear(1,0,50000)                   from 1 to 0 over 50,000 agent steps, then 0
piecewise(0:1,20000:0.5,60000:0)    linear between these agent steps, constant outside them
linear(1,0,100000) frames           the same over simulator frames: agent steps times the action repeat
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

import numpy as np

from gsa.errors import UsageError

FORMS = "constant(P), linear(FROM,TO,STEPS) or piecewise(STEP:P,STEP:P,…); with ' frames' behind it in frames"


def schedule_value(schedule: str | float, step: int, action_repeat: int = 1) -> float:
    """The schedule's value at agent step `step`, in [0, 1]; linear between its points, constant outside them. A number
    stands for itself. `action_repeat`: frames an agent step. UsageError where it is no schedule."""
    points, in_frames = _points(str(schedule))
    at = step * action_repeat if in_frames else step
    return float(np.interp(at, [s for s, _ in points], [p for _, p in points]))


@lru_cache(maxsize=64)
def _points(schedule: str) -> tuple[list[tuple[float, float]], bool]:
    """Points (step, value), and whether steps are frames."""
    match = re.fullmatch(r"\s*(constant|linear|piecewise)\s*\(([^()]*)\)\s*(steps|frames)?\s*", schedule)
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
    return points, match is not None and match[3] == "frames"
