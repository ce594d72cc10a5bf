"""Saved networks that are damaged, of another version or hostile: a sentence each, in no more memory than the file."""

import json
import resource

import numpy as np
import pytest

from gsa.agent.agent import Agent
from gsa.agent.prior_actor import PriorActor
from gsa.agent.sizes import PriorConfig
from gsa.agent.world_model import WorldModel
from gsa.errors import FormatError, SpecMismatch, UsageError
from tests.agents import BEHAVIOUR, MODEL

SENTENCES = (FormatError, SpecMismatch, UsageError)


@pytest.fixture
def folder(tmp_path):
    """An agent's folder with a prior actor in it."""
    Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, 2).save(tmp_path)
    PriorActor.create(PriorConfig(depth=2, units=8), 2, 0).save(tmp_path)
    return tmp_path


LOADERS = {"world_model": WorldModel.load, "behaviour": Agent.load, "prior_actor": PriorActor.load}


def edit(path, change):
    """The JSON file with `change`, a dict of dicts, merged in."""

    def merge(old, new):
        return {**old, **{k: merge(old.get(k, {}), v) if isinstance(v, dict) else v for k, v in new.items()}}

    path.write_text(json.dumps(merge(json.loads(path.read_text()), change)))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("world_model", {"format": 2}, "has format 2; this version of GSA reads format 1"),
        ("world_model", {"config": []}, "lacks the config"),
        ("world_model", {"config": {"deter": "wide"}}, "must be of type int"),
        ("world_model", {"config": {"blocks": 0}}, "blocks must be 1 to"),
        ("world_model", {"config": {"deter": 8 * 10**11}}, "deter must be 1 to"),
        ("world_model", {"config": {"observation": {"images": "pixels"}}}, "must be a list"),
        ("world_model", {"config": {"observation": {"vectors": [["joints", 10**12]]}}}, "1 to 1048576 numbers"),
        ("world_model", {"config": {"deter": 8 * 10**5, "hidden": 10**6}}, "another size"),
        ("world_model", {"config": {"observation": {"vectors": [["joints", 10**6]]}}}, "another architecture"),
        ("behaviour", {"config": {"behaviour": {"units": 10**6}}}, "another size"),
        ("behaviour", {"config": {"behaviour": {"units": 10**12}}}, "units must be 1 to"),
        ("behaviour", {"config": {"behaviour": {"actor_layers": 10**9}}}, "actor_layers must be 1 to 64"),
        ("behaviour", {"config": {"action_dim": "two"}}, "must be of type int"),
        ("prior_actor", {"config": {"prior": {"frames": 10**9}}}, "frames must be 1 to 64"),
        ("prior_actor", {"config": {"action_dim": 3}}, "another size"),
        ("prior_actor", {"config": {"action_dim": 10**18}}, "cannot be made"),
        ("prior_actor", {"meta": 1}, "lacks the config or the meta data"),
    ],
)
def test_a_description_that_cannot_be_is_one_sentence_and_takes_no_memory(folder, kind, change, says):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit(folder / f"{kind}.json", change)
    with pytest.raises(SENTENCES, match=says):
        LOADERS[kind](folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_description_without_a_part_names_it(folder):
    path = folder / "behaviour.json"
    about = json.loads(path.read_text())
    del about["config"]["action_dim"]
    path.write_text(json.dumps(about))
    with pytest.raises(SENTENCES, match="action_dim"):
        Agent.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{" * 100_000, "[" * 100_000, "\xff", "null", '{"kind": "world_model"}'])
def test_a_description_that_is_no_description_is_one_sentence(folder, text):
    (folder / "world_model.json").write_text(text)
    with pytest.raises(SENTENCES):
        WorldModel.load(folder)


@pytest.mark.parametrize("kind", LOADERS)
def test_weights_torn_or_flipped_anywhere_are_never_taken(folder, kind):
    path, rng = folder / f"{kind}.safetensors", np.random.default_rng(0)
    data = path.read_bytes()
    for end in [0, 7, *rng.integers(0, len(data), 10).tolist()]:
        path.write_bytes(data[:end])
        with pytest.raises(FormatError, match="damaged"):
            LOADERS[kind](folder)
    for place in rng.integers(0, len(data), 10).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(FormatError, match="damaged"):
            LOADERS[kind](folder)
