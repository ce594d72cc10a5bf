"""How near a world model read from a released file comes to the reference that wrote it.

The reference's own modules (a checkout of ncrl, named by GSA_PEER_NCRL) are made at a small size, at the size of its
default and at the paper's, with weights by a formula, and saved the way it saves. The file is read as
`--world-model file.pt` reads it. Both then see the same two sequences of six random images and actions, with the same
draws of the latents: features, recurrent states, posterior and prior logits and decoded images are compared, as
|ours - theirs| / max(1, |theirs|), in float32. The goal is 1e-5. Without a checkout only the kept numbers of the
small size are compared.

    python -m benchmarks.parity [--quick] [--save]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from gsa.agent import released
from gsa.agent.sizes import PRESETS
from tests import reference

GOAL = 1e-5


def main() -> int:
    options = harness.arguments(__doc__)
    found = {"kept numbers": _kept()}
    if reference.VARIABLE in os.environ:
        for name in ("small",) if options.quick else ("small", "reference-small", "paper"):
            found[name] = _live(reference.SMALL if name == "small" else _size(name))
    else:
        print(f"{reference.VARIABLE} names no checkout of the reference: its kept numbers alone are compared")
    for name, row in found.items():
        print(f"{name:16} " + "  ".join(f"{k} {v:.1e}" for k, v in row["difference"].items()), flush=True)
    goals = {name: _goal(row) for name, row in found.items()}
    return harness.finish("parity", found, goals, options)


def _size(preset: str) -> dict[str, int]:
    sizes = PRESETS[preset].world_model
    return {key: getattr(sizes, key) for key in reference.SMALL}


def _kept() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, np.load(reference.GOLDEN) as golden:
        path = Path(folder) / "kept.pt"
        torch.save(reference.checkpoint(reference.golden_shapes()), path)
        ours = reference.ours(released.read(path))
        ours["image"] = ours["image"][:, ::3, :, ::4, ::4]
        return _compare(ours, dict(golden))


def _live(sizes: dict[str, int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "live.pt"
        parts = reference.modules(**sizes)
        torch.save({"wm": {name: part.state_dict() for name, part in parts.items()}}, path)
        expected = reference.outputs(parts)
        del parts
        started = time.perf_counter()
        model = released.read(path)
        seconds = time.perf_counter() - started
        about = {"parameters": sum(p.numel() for p in model.parameters()), "file_bytes": path.stat().st_size}
        return {**about, "read_s": round(seconds, 2), **_compare(reference.ours(model), expected)}


def _compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    difference = {
        name: float((np.abs(ours[name] - theirs[name]) / np.maximum(1, np.abs(theirs[name]))).max())
        for name in reference.COMPARED
    }
    return {"difference": difference, "latents_that_differ": int((ours["index"] != theirs["index"]).sum())}


def _goal(row: dict[str, Any]) -> dict[str, Any]:
    worst = max(row["difference"].values())
    return {"value": worst, "goal": f"<= {GOAL}", "holds": worst <= GOAL and not row["latents_that_differ"]}


if __name__ == "__main__":
    sys.exit(main())
