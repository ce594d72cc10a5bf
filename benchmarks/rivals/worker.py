"""One rival in a process of its own, so that its memory is its own: a line in runs an update, a line out says how it
went. `python -m benchmarks.rivals.worker MODULE CASE-AS-JSON THREADS`."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.rivals import Case


class Rival:
    """Owns the process of one rival."""

    def __init__(self, module: str, case: Case, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.rivals.worker", module, json.dumps(asdict(case)), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.built = self._answer()

    def update(self) -> dict[str, Any]:
        """Runs one update: seconds, seconds of CPU over all threads, and the peak memory in MB so far: of
        the process, or of the GPU."""
        assert self._process.stdin is not None
        self._process.stdin.write("update\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate("", timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._process.args[2:4])} ended with code {self._process.wait()}.")  # type: ignore[index]
        return json.loads(line)


def main() -> None:
    module, case, threads = sys.argv[1], Case(**json.loads(sys.argv[2])), int(sys.argv[3])
    import torch

    torch.set_num_threads(threads)
    answers, on_gpu = sys.stdout, case.device == "cuda"
    with contextlib.redirect_stdout(sys.stderr):
        update, weights = importlib.import_module(module).build(case)
        _say(answers, parameters=weights, built_mb=_peak_mb())
        for _ in sys.stdin:
            started, computed = time.perf_counter(), time.process_time()
            update()
            if on_gpu:
                torch.cuda.synchronize()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computed
            _say(answers, seconds=seconds, cpu_seconds=cpu_seconds, peak_mb=_peak_mb(on_gpu))


def _say(answers: Any, **values: float) -> None:
    print(json.dumps(values), file=answers, flush=True)


def _peak_mb(on_gpu: bool = False) -> float:
    """Of the process, or of what torch took of the GPU. Not by getrusage: that begins with what the parent had."""
    if on_gpu:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024


if __name__ == "__main__":
    main()
