"""Runs every benchmark in turn, each in a process of its own: python -m benchmarks [--quick] [--save]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NOT_BENCHMARKS = {"__init__", "__main__", "harness", "slow"}


def main() -> int:
    """Returns 1 if a goal does not hold or a benchmark fails."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_BENCHMARKS)
    codes = []
    for name in names:
        print(f"== {name}", flush=True)
        codes.append(
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode
        )
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
