"""`gsa model`, and the paper's released weights used as a world model by the commands."""

import re

import pytest
import torch

from actors.environment import make
from deploy import run as runs
from deploy.cli import main
from deploy.config import FinetuneConfig
from gsa import config as configs
from gsa.agent import released
from gsa.agent.world_model import WorldModel
from gsa.errors import Unavailable
from learner.config import ComputeConfig, LearnerConfig
from retrieval.store import TrajectoryStore
from tests import reference
from tests.agents import MODEL


def test_the_papers_size_has_the_papers_parameters_and_takes_no_memory(capsys):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["model", "--model", "paper"]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; the weights alone are 1.1 GB
    text = capsys.readouterr().out
    assert "world model: 281,384,259 parameters; sees pixels" in text
    layers = [line for line in text.splitlines() if "[" in line and "model" not in line]
    assert sum(int(line.split()[-1].replace(",", "")) for line in layers) == 281_384_259
    assert re.search(r"encoder\.first +Conv2d +\[96, 3, 4, 4\] \[96\] +4,704\n", text)


def test_all_sizes_are_listed_from_small_to_large(capsys):
    assert main(["model"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["tiny", "small", "reference-small", "paper"]
    counts = [int(row.split()[1].replace(",", "")) for row in rows]
    assert counts == sorted(counts)
    assert counts[2:] == [13_593_027, 281_384_259]


def test_a_saved_model_is_described_and_an_unknown_size_is_one_sentence(tmp_path, capsys):
    WorldModel.create(MODEL, 0).save(tmp_path)
    assert main(["model", "--world-model", str(tmp_path)]) == 0
    assert "sees pixels" in capsys.readouterr().out
    assert main(["model", "--model", "huge"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["model", "--world-model", str(tmp_path / "nowhere")]) == 2


@pytest.fixture
def weights(tmp_path):
    """A released file of our own making: small, but of the released layout and action size."""
    torch.save(reference.checkpoint(reference.golden_shapes()), tmp_path / "dmcontrol.pt")
    return tmp_path / "dmcontrol.pt"


def test_a_released_file_is_converted_beside_itself_and_described(weights, tmp_path, capsys):
    assert main(["model", "--world-model", str(weights)]) == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'dmcontrol'}" in captured.err.replace("\n", "")
    assert WorldModel.load(tmp_path / "dmcontrol").config.gates == "flat"
    assert main(["model", "--world-model", str(weights), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "world_model.safetensors").exists()
    assert main(["model", "--world-model", str(weights), "--stoch", "16", "--out", str(tmp_path / "other")]) == 0
    assert WorldModel.load(tmp_path / "other").config.classes == 8


def test_index_takes_a_released_file_as_the_world_model(weights, tmp_path, capsys):
    from tests import dots

    dots.make_store(tmp_path / "store", count=2).close()
    arguments = ["index", "--store", str(tmp_path / "store"), "--world-model", str(weights)]
    assert main(arguments) == 0
    assert list((tmp_path / "dmcontrol" / "index").iterdir())
    assert main(arguments) == 0  # the copy is there already
    weights.write_bytes(b"torn")
    assert main(arguments) == 2
    assert "another world model" in capsys.readouterr().err


def test_an_unwritable_place_says_what_to_do(weights, tmp_path):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(Unavailable, match="Not a directory; give an --out"):
        released.convert(weights, tmp_path / "blocked" / "model")


def test_a_run_starts_from_a_released_file_and_keeps_the_folder_it_became(weights, tmp_path):
    imports = ("tests.gym_counting",)
    task = "gym/Counting-v0"
    with TrajectoryStore.create(tmp_path / "pool") as store, make(task, imports=imports) as env:
        store.add_spec(env.spec)
    config = FinetuneConfig(
        task=task, imports=imports, store=tmp_path / "pool", world_model=weights, out=tmp_path / "run",
        method="naive", local=True, budget_frames=80, warmup_frames=40, warmup_episodes=1, batch=4, length=8,
        train_ratio=2.0, eval_every_frames=1000, final_episodes=1, imagination_starts=8,
        learner=LearnerConfig(compute=ComputeConfig("cpu", threads=1)),
    )  # fmt: skip
    run = runs.finetune(config)
    assert configs.load(FinetuneConfig, run / "config.yaml").world_model == tmp_path / "dmcontrol"
    before, after = WorldModel.load(tmp_path / "dmcontrol"), WorldModel.load(run / "agent")
    assert after.architecture_hash() == before.architecture_hash()
    assert not torch.equal(after.encoder.first.weight, before.encoder.first.weight)
