"""Importers under fire: 2000 damaged or lying datasets for each format, and what became of them.

    python -m benchmarks.fuzz [--quick] [--save]

Method: tests/fuzz.py. Each input is a sound dataset of which one file was mutated by the input's seed: bytes, lengths,
truncation, repetition, JSON values, arrays within containers, HDF5 links and shapes, parquet columns. It ends in
episodes (the damage was harmless, or makes other numbers) or in an error of ours. A crash or a hang of a C library is
counted; formats that can have one are read in a process of their own, so that it costs the episode only. Memory is
the peak of the process that reads, libraries included. No rivals: the goals are absolute.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import harness
from retrieval.formats.registry import formats
from tests.fuzz import FORMATS

PEAK_MB = 500


def main() -> int:
    options = harness.arguments(__doc__)
    inputs = 40 if options.quick else 2000
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(FORMATS, pool.map(lambda format: _run(format, inputs), FORMATS), strict=True))
    unguarded = sum(
        r["crashed"] + r["hung"] for name, r in found.items() if not formats()[name.partition("-")[0]].isolated
    )
    goals = {
        "errors_not_ours": harness.at_most(sum(r["unexpected"] for r in found.values()), 0),
        "crashes_without_a_process_of_their_own": harness.at_most(unguarded, 0),
        "peak_mb": harness.at_most(max(r["peak_mb"] for r in found.values()), PEAK_MB),
    }
    return harness.finish("fuzz", found, goals, options)


def _run(format: str, inputs: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz", format, str(inputs)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{format:20} {found}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
