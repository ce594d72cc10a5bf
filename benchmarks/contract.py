"""The environments' contract on every task: which checks pass, and how long whole episodes take.

Each of the 73 tasks is examined as `gsa check-env TASK` does it: two environments, five whole episodes, every check.
Images are of the profile `fast`. With `--quick` one task an embodiment, eight agent steps.

    python -m benchmarks.contract [--quick] [--save]
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter

from actors.contract import examine
from actors.environment import make
from actors.tasks import ALL
from benchmarks import harness


def main() -> int:
    options = harness.arguments(__doc__)
    tasks = list({task.embodiment: task for task in ALL}.values()) if options.quick else ALL
    passed: Counter[str] = Counter()
    failures: list[str] = []
    seconds: dict[str, float] = {}
    for task in tasks:
        started = time.perf_counter()
        for finding in examine(functools.partial(make, task.name), steps=8 if options.quick else None):
            passed[finding.name] += finding.ok
            failures += [] if finding.ok else [f"{task.name}: {finding.name}: {finding.text}"]
        seconds[task.name] = round(time.perf_counter() - started, 2)
        print(f"{task.name:40} {seconds[task.name]:6.2f} s", flush=True)
    result = {"tasks": len(tasks), "checks_passed": dict(passed), "failures": failures, "seconds": seconds}
    whole = min(passed.values()) / len(tasks)
    return harness.finish("contract", result, {"tasks_that_pass_all": harness.at_least(whole, 1.0)}, options)


if __name__ == "__main__":
    sys.exit(main())
