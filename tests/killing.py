"""A process that runs a prepared run in one process and is killed on the way, again and again, until it is done.

    python -m tests.killing RUN KILLS SEED

Prints how many kills struck. The run is a child by fork, so that each start costs no imports; the parent, which has no
threads, kills it by SIGKILL after a time drawn up to what a whole run took.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from deploy.config import config_of
from deploy.local import run_local


def main(run: Path, kills: int, seed: int, longest_s: float = 3.0) -> int:
    rng, struck = random.Random(seed), 0
    config = config_of(run)
    while True:
        child = os.fork()
        if child == 0:
            run_local(config, run, lambda *_: None)
            os._exit(0)
        if struck < kills:
            time.sleep(rng.uniform(0.05, longest_s))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(struck)
            return os.WEXITSTATUS(status)
        struck += 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
