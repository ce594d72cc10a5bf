"""The card beside exported weights: a README.md that says what they are, how good, and how to load them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gsa
from gsa.errors import GsaError
from gsa.schema import Spec
from reports.record import PolicyResult, RunRecord, read_run
from retrieval.files import replace_file
from retrieval.store import TrajectoryStore

FILE = "README.md"
PACKAGES = ("torch", "numpy", "safetensors")
HEAD = """---
library_name: gsa-rl
pipeline_tag: reinforcement-learning
tags: [world-model, robot-learning, reinforcement-learning]
---
"""
IMPORT = "from gsa.agent.world_model import WorldModel"
LICENCE = """The code of GSA is under the Apache License 2.0. The weights are yours: say here, and as `license:` above,
under which licence you share them. The data they were trained on may have terms of its own."""


def write_agent_card(run: Path) -> Path:
    """Beside the agent of a run: task, method, budget, scores so far, what it sees and does. Returns the card."""
    record = read_run(run)
    about = _described(run / "agent" / "behaviour.json")
    model = _described(run / "agent" / "world_model.json")
    config = record.config
    facts = {
        "Task": f"`{record.task}`", "Method": f"`{config.get('method', 'unknown')}`, seed {config.get('seed', '?')}",
        "Budget": f"{config.get('budget_frames', 0):,} simulator frames online, {record.frames:,} of them collected",
        "Updates": f"{about['meta'].get('updates', 0):,}", "Trained from": _origin(config),
    }  # fmt: skip
    sections = [
        ("What it is", f"A policy for one task, with the world model it acts by.\n\n{_facts(facts)}"),
        ("Scores", _scores(record)),
        ("What it sees and does", _interface(_online_specs(run), model["config"], about["config"]["action_dim"])),
        ("How to load it", _code("import gsa", "", "policy = gsa.load_policy(FOLDER)", "policy.reset()",
                                 "action = policy.act(observation)  # float32, each in [-1, 1]")),
        ("Files", _files("world_model", "behaviour")),
    ]  # fmt: skip
    return _write(run / "agent", f"{record.task} by {config.get('method', 'GSA')}", sections)


def write_world_model_card(folder: Path) -> Path:
    """Beside a pre-trained world model: the pools it was trained on, and what it sees and does. Returns the card."""
    model = _described(folder / "world_model.json")
    stores = model["meta"].get("stores", [])
    specs = {name: Spec.from_json(spec) for store in stores for name, spec in store.get("specs", {}).items()}
    facts = {
        "Trained on": "; ".join(f"{s['trajectories']:,} trajectories of store {s['id']}" for s in stores) or "unknown",
        "Updates": f"{model['meta'].get('updates', 0):,}", "Embodiments": ", ".join(sorted(specs)) or "unknown",
    }  # fmt: skip
    sections = [
        ("What it is", f"A world model trained on images and actions without rewards; no policy.\n\n{_facts(facts)}"),
        ("Scores", "A world model has none. What it foresees is drawn in `open_loop.png` where that is beside it."),
        ("What it sees and does", _interface(specs.values(), model["config"], model["config"]["max_action_dim"])),
        ("How to load it", "A policy is made of it by `gsa finetune --world-model FOLDER`.\n\n"
                           + _code(IMPORT, "", "model = WorldModel.load(FOLDER)")),
        ("Files", _files("world_model")),
    ]  # fmt: skip
    return _write(folder, "A world model", sections)


def _described(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _online_specs(run: Path) -> list[Spec]:
    try:
        with TrajectoryStore.open(run / "online") as store:
            return list(store.specs.values())
    except GsaError:
        return []


def _origin(config: Mapping[str, Any]) -> str:
    if config.get("method") == "scratch":
        return "nothing: no pool and no pre-trained world model"
    return (
        f"the world model `{Path(str(config.get('world_model'))).name}`, pool `{Path(str(config.get('store'))).name}`"
    )


def _scores(record: RunRecord) -> str:
    if not record.policies:
        return "Not evaluated yet."
    of = "out of 100" if record.score_ends_at_100 else "the return"
    head = f"| policy | score ({of}) | 95 % interval | return | episodes |\n|---|---|---|---|---|\n"
    return head + "\n".join(map(_score, record.policies)) + (
        "\n\nBy the mean action, on the same initial states for each; percentile bootstrap over the episodes of "
        "this one run: another seed may do otherwise."
    )  # fmt: skip


def _score(p: PolicyResult) -> str:
    low, high = p.interval
    interval = "one episode" if math.isnan(low) else f"[{low:.1f}, {high:.1f}]"
    return f"| {p.label} | {p.score:.1f} | {interval} | {p.returns:.1f} | {p.episodes} |"


def _interface(specs: Iterable[Spec], model: Mapping[str, Any], action_dim: int) -> str:
    seen = model.get("observation", {})
    images = [f"- `{name}`: image, uint8 [64, 64, 3]" for name in seen.get("images", ())]
    vectors = [f"- `{name}`: vector, float32 [{length}]" for name, length in seen.get("vectors", ())]
    actions = [f"- action: float32 [{action_dim}], each in [-1, 1]"]
    return "\n".join([*images, *vectors, *actions, *map(_embodiment, specs)])


def _embodiment(spec: Spec) -> str:
    rate = f"{spec.control_hz:g} decisions a second" if spec.control_hz else "control rate unknown"
    rendered = f", rendered by {spec.renderer}" if spec.renderer else ""
    actions = f"{spec.action_dim} actions, action repeat {spec.action_repeat}"
    return f"- `{spec.embodiment}`: {actions}, {rate}{rendered}"


def _files(*kinds: str) -> str:
    ours = [f"- `{kind}.safetensors`, `{kind}.json`" for kind in kinds]
    return "\n".join([*ours, "", "Weights as safetensors; what they are, and their SHA-256, as JSON. No pickle."])


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([f"gsa-rl {gsa.__version__}", f"Python {platform.python_version()}", *found])


def _write(folder: Path, title: str, sections: Iterable[tuple[str, str]]) -> Path:
    parts = [f"# {title}", *(f"## {name}\n\n{text}" for name, text in sections)]
    parts += [f"## Licence\n\n{LICENCE}", f"## Versions\n\n{_versions()}"]
    with replace_file(folder / FILE) as file:
        file.write((HEAD + "\n" + "\n\n".join(parts) + "\n").encode())
    return folder / FILE
