"""The card beside weights: what a stranger must know to use them, and code that runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml

from deploy import run as runs
from reports.card import write_agent_card
from tests.test_runs import config, pool  # noqa: F401


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def run_code(card: str, folder: Path, **names) -> dict:
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    exec(code, names | {"FOLDER": folder}, names)
    return names


def test_an_agents_card_says_what_it_is_how_good_and_how_to_load_it(pool, tmp_path):  # noqa: F811
    run = runs.finetune(config(tmp_path / "run", pool, method="naive", local=True))
    card = (run / "agent" / "README.md").read_text()
    assert front(card)["library_name"] == "gsa-rl"
    for said in (
        "gym/Counting-v0",
        "`naive`, seed 0",
        "200 simulator frames",
        "Updates: 20",
        "model",
        "Apache",
        "torch ",
    ):
        assert said in card, said
    assert re.search(r"\| fine-tuned policy \| [\d.]+ \| \[[\d.]+, [\d.]+\] \| [\d.]+ \| 2 \|", card)
    assert "`pixels`: image, uint8 [64, 64, 3]" in card
    assert "action: float32 [2]" in card
    assert "2 actions, action repeat 1, 10 decisions a second" in card
    action = run_code(card, run / "agent", observation=np.zeros((64, 64, 3), np.uint8))["action"]
    assert action.shape == (2,)


def test_before_the_evaluation_a_card_says_that_there_are_no_scores(pool, tmp_path):  # noqa: F811
    run = runs.finetune(config(tmp_path / "run", method="scratch", local=True))
    (run / "evaluation.json").unlink()
    card = write_agent_card(run).read_text()
    assert "Not evaluated yet." in card
    assert "Trained from: nothing" in card


def test_a_pre_trained_world_model_has_its_card(pool):  # noqa: F811
    _, folder = pool
    card = (folder / "README.md").read_text()
    assert front(card)["pipeline_tag"] == "reinforcement-learning"
    for said in ("9 trajectories", "Updates: 3", "test/other", "action: float32 [21]", "without rewards"):
        assert said in card, said
    model = run_code(card, folder)["model"]
    assert model.config.max_action_dim == 21
