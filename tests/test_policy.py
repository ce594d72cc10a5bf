"""Acting: the guided policy against the model it filters with, one environment at a time and several at once."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import gsa
from gsa.agent import rssm
from gsa.agent.agent import Agent
from gsa.agent.policy import GuidedPolicy
from gsa.agent.prior_actor import PriorActor, frame_stack, random_shift
from gsa.agent.rssm import State
from gsa.agent.sizes import PriorConfig
from gsa.agent.world_model import WorldModel
from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.schema import BFLOAT16, Controller
from tests.agents import BEHAVIOUR, MODEL

ACTIONS = 2
PRIOR = PriorConfig(depth=2, units=8)


@pytest.fixture(scope="module")
def agent():
    return Agent.create(WorldModel.create(MODEL, 0), BEHAVIOUR, ACTIONS, 1)


@pytest.fixture(scope="module")
def prior():
    return PriorActor.create(PRIOR, ACTIONS, 2)


def guided(agent, envs=1, prior=None):
    policy = GuidedPolicy(MODEL, BEHAVIOUR, ACTIONS, envs, prior)
    policy.load_tensors(agent.acting_tensors())
    return policy


def frames(n, envs=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, envs, 64, 64, 3), dtype=np.uint8)


def rngs(*seeds):
    return [np.random.default_rng(s) for s in seeds]


def who(*controllers):
    return np.array(controllers, np.uint8)


def test_actions_equal_the_models_own_filter_on_the_actions_executed(agent, prior):
    policy, generators, pixels = guided(agent, 1, prior), rngs(5), frames(6)
    schedule = [Controller.POLICY, Controller.PRIOR, Controller.POLICY, Controller.RANDOM, Controller.POLICY] * 2
    actions = [policy.act({"pixels": p}, who(c), generators)[0] for p, c in zip(pixels, schedule, strict=False)]

    rng, uniform, noise = rngs(5)[0], [], []
    for controller in schedule[:6]:  # the draws of one environment, in its order
        uniform.append(rng.random(MODEL.stoch, np.float32))
        noise.append(rng.standard_normal(ACTIONS, np.float32) if controller == Controller.POLICY else None)
        if controller == Controller.RANDOM:
            np.testing.assert_allclose(actions[3], rng.uniform(-1, 1, ACTIONS), rtol=1e-6)
    previous = np.zeros((1, 6, MODEL.max_action_dim), np.float32)
    previous[0, 1:, :ACTIONS] = actions[:-1]
    model = agent.world_model
    with torch.no_grad():
        states = rssm.scan(
            model.cell, model.posterior, model.encode({"pixels": torch.from_numpy(pixels[None, :, 0])}),
            torch.from_numpy(previous),
            torch.zeros(1, 6, dtype=torch.bool), torch.from_numpy(np.stack(uniform)[None]), MODEL.unimix,
        )  # fmt: skip
        mean, std = (x[0].numpy() for x in agent.actor(states.state))
        stacks = frame_stack(pixels[:, 0], np.arange(6), PRIOR.frames)
        cloned = prior(torch.from_numpy(stacks)).numpy()
    for t, controller in enumerate(schedule[:6]):
        if controller == Controller.POLICY:
            np.testing.assert_allclose(actions[t], np.clip(mean[t] + std[t] * noise[t], -1, 1), atol=1e-5)
        if controller == Controller.PRIOR:
            np.testing.assert_allclose(actions[t], np.clip(cloned[t], -1, 1), atol=1e-5)
    np.testing.assert_allclose(policy.state.deter[0], states.deter[0, -1], atol=1e-5)
    assert torch.equal(policy.state.stoch[0], states.stoch[0, -1])


def test_an_environment_acts_the_same_alone_and_among_others_that_begin_at_other_times(agent, prior):
    pixels, together = frames(8, 3), guided(agent, 3, prior)
    schedule = np.random.default_rng(1).choice([0, 1, 2], (8, 3)).astype(np.uint8)
    begins = {(3, 0), (5, 1), (5, 2)}
    generators, crowd = rngs(7, 8, 9), []
    for t in range(8):
        for e in range(3):
            if (t, e) in begins:
                together.begin(e)
        crowd.append(together.act({"pixels": pixels[t]}, schedule[t], generators))
    for e, seed in enumerate((7, 8, 9)):
        alone, generator = guided(agent, 1, prior), rngs(seed)
        for t in range(8):
            if (t, e) in begins:
                alone.begin(0)
            action = alone.act({"pixels": pixels[t, e : e + 1]}, schedule[t, e : e + 1], generator)
            np.testing.assert_allclose(action[0], crowd[t][e], atol=1e-5)


def test_a_new_episode_forgets_everything(agent, prior):
    policy, pixels = guided(agent, 2, prior), frames(3, 2)
    first = [policy.act({"pixels": p}, who(2, 1), rngs(1, 2), sample=False) for p in pixels]
    for e in range(2):
        policy.begin(e)
    again = [policy.act({"pixels": p}, who(2, 1), rngs(1, 2), sample=False) for p in pixels]
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.subtract(first[0], first[1])).max() > 0


def test_without_sampling_the_policy_acts_by_its_mean(agent):
    policy = guided(agent)
    image = {"pixels": frames(1)[0]}
    action = policy.act(image, who(Controller.POLICY), rngs(3), sample=False)
    with torch.no_grad():
        mean, _ = agent.actor(policy.state)
    np.testing.assert_allclose(action, mean.numpy(), atol=1e-6)
    assert action.dtype == np.float32


def test_what_a_person_did_instead_is_what_the_filter_goes_on_with(agent):
    policy, pixels = guided(agent), frames(2)
    controller = who(Controller.POLICY)
    deters = []
    for instead in (None, np.full((1, ACTIONS), 0.7, np.float32)):
        policy.begin(0)
        policy.act({"pixels": pixels[0]}, controller, rngs(1))
        if instead is not None:
            policy.executed(instead)
        policy.act({"pixels": pixels[1]}, controller, rngs(1))
        deters.append(policy.state.deter.clone())
    assert not torch.allclose(*deters)


def test_the_world_models_padding_never_sees_an_action(agent):
    policy, pixels = guided(agent), frames(2)
    expected = [policy.act({"pixels": p}, who(2), rngs(1)) for p in pixels]
    tensors = agent.acting_tensors()
    tensors["cell.action.0.weight"][:, ACTIONS:] += 100
    policy.load_tensors(tensors)
    policy.begin(0)
    np.testing.assert_array_equal([policy.act({"pixels": p}, who(2), rngs(1)) for p in pixels], expected)


def test_every_action_is_within_bounds_and_random_ones_fill_them(agent):
    policy = guided(agent)
    generator, image = rngs(0), {"pixels": frames(1)[0]}
    random = np.concatenate([policy.act(image, who(Controller.RANDOM), generator) for _ in range(300)])
    assert np.abs(random).max() <= 1
    assert abs(random.mean()) < 0.1
    assert random.std() == pytest.approx(1 / np.sqrt(3), abs=0.05)
    sampled = np.concatenate([policy.act(image, who(Controller.POLICY), generator) for _ in range(100)])
    assert np.abs(sampled).max() == 1


def test_published_weights_take_effect_and_keep_the_latent(agent):
    other = Agent.create(WorldModel.create(MODEL, 5), BEHAVIOUR, ACTIONS, 6)
    policy, pixels = guided(agent), frames(2)
    policy.act({"pixels": pixels[0]}, who(2), rngs(1))
    latent = policy.state
    tensors = other.acting_tensors()
    for value in tensors.values():
        value.flags.writeable = False  # as they come out of shared memory
    policy.load_tensors(tensors)
    assert policy.state is latent
    action = policy.act({"pixels": pixels[1]}, who(2), rngs(1), sample=False)
    with torch.no_grad():
        mean, _ = other.actor(policy.state)
    np.testing.assert_allclose(action, mean.numpy(), atol=1e-6)


def test_weights_made_ready_in_another_thread_are_taken_over_as_they_are(agent):
    """The policy acts on with its own meanwhile; read-only ones are not even copied."""
    other = Agent.create(WorldModel.create(MODEL, 5), BEHAVIOUR, ACTIONS, 6)
    policy, image = guided(agent), {"pixels": frames(1)[0]}
    before, expected = (guided(a).act(image, who(2), rngs(1)) for a in (agent, other))
    tensors = other.acting_tensors()
    for value in tensors.values():
        value.flags.writeable = False
    staged = []
    thread = threading.Thread(target=lambda: staged.append(policy.stage(tensors)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(policy.act(image, who(2), rngs(1)), before)
    policy.begin(0)
    policy.load_tensors(staged[0])
    np.testing.assert_array_equal(policy.act(image, who(2), rngs(1)), expected)
    name = "actor.net.last.bias"
    assert policy._nets.state_dict()[name].data_ptr() == tensors[name].ctypes.data


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_that_come_again_and_again_lie_where_those_did_that_are_of_no_use(agent, bf16):
    """What it acts by is not written to while the next are made ready."""
    others = [Agent.create(WorldModel.create(MODEL, seed), BEHAVIOUR, ACTIONS, 6) for seed in range(4)]
    policy, image, places = guided(agent), {"pixels": frames(1)[0]}, []
    expected = policy.act(image, who(2), rngs(1))
    for other in others:
        tensors = other.acting_tensors(bf16)
        for value in tensors.values():
            value.flags.writeable = False
        staged = policy.stage(tensors)
        policy.begin(0)
        np.testing.assert_array_equal(policy.act(image, who(2), rngs(1)), expected)
        policy.load_tensors(staged)
        policy.begin(0)
        fresh = GuidedPolicy(MODEL, BEHAVIOUR, ACTIONS)
        fresh.load_tensors(tensors)
        expected = fresh.act(image, who(2), rngs(1))
        policy.load_tensors(staged)  # once more changes nothing
        np.testing.assert_array_equal(policy.act(image, who(2), rngs(1)), expected)
        places.append({k: v.data_ptr() for k, v in staged.copies.items()})
    assert places[0] and places[2] == places[0] != places[1] == places[3]


def test_weights_in_bfloat16_are_rounded_to_the_nearest_and_biases_are_not(agent):
    exact, narrow = agent.acting_tensors(), agent.acting_tensors(bf16=True)
    assert sum(v.nbytes for v in narrow.values()) < 0.6 * sum(v.nbytes for v in exact.values())
    rounded = {k: v if v.ndim < 2 else torch.from_numpy(v).to(torch.bfloat16).float().numpy() for k, v in exact.items()}
    assert {k for k, v in narrow.items() if v.dtype == BFLOAT16} == {k for k, v in exact.items() if v.ndim > 1}
    actions = []
    for tensors in (rounded, narrow):
        policy = GuidedPolicy(MODEL, BEHAVIOUR, ACTIONS)
        policy.load_tensors(tensors)
        actions.append(policy.act({"pixels": frames(1)[0]}, who(2), rngs(1)))
    np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_arrays_of_an_earlier_snapshot_can_be_used_again(agent, bf16):
    other = Agent.create(WorldModel.create(MODEL, 5), BEHAVIOUR, ACTIONS, 6)
    out = other.acting_tensors(bf16)
    again, expected = agent.acting_tensors(bf16, out), agent.acting_tensors(bf16)
    for name, value in expected.items():
        assert again[name].tobytes() == value.tobytes() == out[name].tobytes()


def test_foreign_weights_are_refused_and_the_old_ones_stay(agent):
    policy, image = guided(agent), {"pixels": frames(1)[0]}
    expected = policy.act(image, who(2), rngs(1))
    good = agent.acting_tensors()
    bad = {
        "lacks 'actor.net.last.bias'": {k: v for k, v in good.items() if k != "actor.net.last.bias"},
        "foreign 'decoder.last.bias'": good | {"decoder.last.bias": np.zeros(3, np.float32)},
        "another size": {k: v + 1 for k, v in good.items()} | {"actor.net.last.bias": np.zeros(6, np.float32)},
        "float64": good | {"actor.net.last.bias": np.zeros(4)},
    }
    for message, tensors in bad.items():
        with pytest.raises(SpecMismatch, match=message):
            policy.load_tensors(tensors)
    policy.begin(0)
    np.testing.assert_array_equal(policy.act(image, who(2), rngs(1)), expected)


def test_what_cannot_be_done_is_said(agent, prior):
    with pytest.raises(UsageError, match="without one"):
        guided(agent).act({"pixels": frames(1)[0]}, who(Controller.PRIOR), rngs(0))
    with pytest.raises(SpecMismatch, match="2 action dimensions, the task 3"):
        GuidedPolicy(MODEL, BEHAVIOUR, 3, 1, prior)
    for image in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32), frames(1, 2)[0]):
        with pytest.raises(SpecMismatch, match="The policy sees pixels"):
            guided(agent).act({"pixels": image}, who(2), rngs(0))


def test_a_saved_agent_acts_alone(agent, tmp_path):
    agent.save(tmp_path)
    policy, pixels = gsa.load_policy(tmp_path, seed=4), frames(3)[:, 0]
    mirrored = pixels[:, :, ::-1]  # negative strides, as camera code makes them
    actions = [policy.act({"pixels": p}) for p in mirrored]
    assert actions[0].shape == (ACTIONS,)
    reference, generator = guided(agent), rngs(4)
    expected = [reference.act({"pixels": p[None].copy()}, who(2), generator, sample=False)[0] for p in mirrored]
    np.testing.assert_array_equal(actions, expected)
    policy.reset()
    assert policy.act(mirrored[1], sample=True).tolist() != actions[1].tolist()


def test_importing_gsa_does_not_import_torch():
    code = "import sys, gsa, gsa.schema, gsa.agent.sizes; assert gsa.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'polcy'"):
        _ = gsa.polcy


def test_the_frame_stack_is_oldest_first_and_repeats_the_first_frame():
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    pixels[..., 1] += 100
    stacks = frame_stack(pixels, np.array([0, 1, 4]), 3)
    assert stacks[:, 9, 9].tolist() == [
        [0, 100, 0, 0, 100, 0, 0, 100, 0], [0, 100, 0, 0, 100, 0, 1, 101, 1], [2, 102, 2, 3, 103, 3, 4, 104, 4],
    ]  # fmt: skip


def test_random_shift_moves_whole_images_by_at_most_so_much_and_repeats_the_edge():
    images = torch.randint(0, 256, (40, 8, 8, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifted = random_shift(images, 2, torch.Generator().manual_seed(1))
    seen = set()
    for before, after in zip(images.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), "edge")
        found = [(i, j) for i in range(5) for j in range(5) if np.array_equal(padded[i : i + 8, j : j + 8], after)]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) > 15
    assert torch.equal(random_shift(images, 2, torch.Generator().manual_seed(1)), shifted)
    assert torch.equal(random_shift(images, 0, torch.Generator()), images)


def test_a_saved_prior_comes_back_and_foreign_files_are_refused(prior, tmp_path):
    prior.save(tmp_path, {"loss": 0.5})
    again, images = PriorActor.load(tmp_path), torch.from_numpy(frame_stack(frames(4)[:, 0], np.arange(4), 3))
    assert torch.equal(again(images), prior(images))
    assert (again.config, again.action_dim) == (PRIOR, ACTIONS)
    (tmp_path / "prior_actor.safetensors").write_bytes(b"no weights")
    with pytest.raises(FormatError, match="damaged"):
        PriorActor.load(tmp_path)
    with pytest.raises(UsageError, match="no prior actor in"):
        PriorActor.load(tmp_path / "nowhere")


def test_acting_needs_no_more_than_it_publishes(agent):
    names = {k.split(".")[0] for k in agent.acting_tensors()}
    assert names == {"encoder", "cell", "posterior", "actor"}
    tensors = agent.acting_tensors()
    tensors["actor.net.last.bias"] += 1  # copies: the learner goes on meanwhile
    assert not np.array_equal(tensors["actor.net.last.bias"], agent.actor.net.last.bias.detach())


def test_the_filters_latent_is_always_one_hot(agent):
    policy = guided(agent, 2)
    for pixels in frames(3, 2):
        policy.act({"pixels": pixels}, who(2, 0), rngs(0, 1))
    assert isinstance(policy.state, State)
    assert torch.equal(policy.state.stoch.view(2, MODEL.stoch, -1).sum(-1), torch.ones(2, MODEL.stoch))
