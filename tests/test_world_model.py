"""The world model against the method written out slowly in float64, and what its files promise."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from gsa.agent import latents, rssm
from gsa.agent.layers import BlockLinear, frozen
from gsa.agent.rssm import State
from gsa.agent.sizes import PRESETS, WorldModelConfig, preset
from gsa.agent.unroll import unroll
from gsa.agent.vision import OFFSET, Encoder, from_patches, to_patches
from gsa.agent.world_model import Dream, TensorBatch, WorldModel, divergences, masked_mean
from gsa.errors import FormatError, SpecMismatch, UsageError
from tests.agents import MODEL, Slow, assert_gradients_equal, doubled, leaves, noise_batch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model64(seed=0, **changes):
    return WorldModel.create(dataclasses.replace(MODEL, **changes), seed).double()


def batch64(seed=0, **changes):
    batch = TensorBatch.from_batch(noise_batch(np.random.default_rng(seed)))
    return dataclasses.replace(doubled(batch), **changes)


def slow_loss(slow, batch, uniform):
    """Equations of the method, one step and one image at a time."""
    c = slow.model
    b, t = batch.is_first.shape
    recon, dyn, rep = (torch.zeros(b, t, dtype=torch.float64) for _ in range(3))
    states = []
    for i in range(t):
        keep = 1 - batch.is_first[:, i : i + 1].double()
        deter, stoch = states[-1] if i else (torch.zeros(b, c.deter).double(), torch.zeros(b, c.latent).double())
        deter = slow.part("cell").cell(deter * keep, stoch * keep, batch.previous_action[:, i] * keep)
        seen = slow.part("encoder").encode(batch.observation["pixels"][:, i])
        posterior = slow.part("posterior").head(torch.cat([deter, seen], -1))
        prior = slow.part("prior").head(deter, 2)
        stoch = slow.sample(posterior, uniform[:, i])
        states.append((deter, stoch))
        error = slow.part("decoder").decode(deter, stoch) - (
            batch.observation["pixels"][:, i].movedim(-1, 1).double() / 255 - 0.5
        )
        recon[:, i] = error.square().sum((1, 2, 3))
        q, p = slow.probs(posterior), slow.probs(prior)
        dyn[:, i] = (q.detach() * (q.detach() / p).log()).sum((1, 2))
        rep[:, i] = (q * (q / p.detach()).log()).sum((1, 2))
    step = recon + dyn.clamp(min=c.free_nats) + 0.1 * rep.clamp(min=c.free_nats)
    return step[batch.valid].mean(), states


@pytest.mark.parametrize("gates", ["per-block", "flat"])
@pytest.mark.parametrize("free_nats", [0.0, 0.35])  # the second lies between the steps' divergences
def test_loss_states_and_all_gradients_equal_the_oracle(gates, free_nats):
    model, batch = model64(gates=gates, free_nats=free_nats), batch64()
    loss, states, metrics = model.loss(batch, generator(3))
    loss.backward()
    weights = leaves(model)
    uniform = torch.rand(*batch.is_first.shape, MODEL.stoch, generator=generator(3), dtype=torch.float64)
    expected, slow_states = slow_loss(Slow(weights, model.config), batch, uniform)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for i, (deter, stoch) in enumerate(slow_states):
        torch.testing.assert_close(states.deter[:, i], deter)
        torch.testing.assert_close(states.stoch[:, i], stoch)
    assert_gradients_equal(model, weights, rtol=1e-7, atol=1e-9)
    assert {"loss", "recon", "dyn", "rep", "prior_entropy", "posterior_entropy"} <= metrics.keys()
    assert not any(v.requires_grad for v in metrics.values())


def test_a_reset_within_a_sequence_starts_the_latent_and_the_action_anew():
    model, batch = model64(), batch64()
    is_first = batch.is_first.clone()
    is_first[1, 3] = True
    batch = dataclasses.replace(batch, is_first=is_first)
    features = model.encode(batch.observation)
    states = model.observe(features, batch.previous_action, is_first, generator(3))
    uniform = torch.rand(*is_first.shape, MODEL.stoch, generator=generator(3), dtype=torch.float64)
    _, expected = slow_loss(Slow(leaves(model)), batch, uniform)
    torch.testing.assert_close(states.deter[:, -1], expected[-1][0])
    plain = model.observe(features, batch.previous_action, batch64().is_first, generator(3))
    torch.testing.assert_close(states.deter[0], plain.deter[0])
    assert not torch.allclose(states.deter[1, 3], plain.deter[1, 3])


def test_imagination_equals_the_oracle_and_its_gradient_reaches_the_actions():
    model = model64()
    rng = generator(1)
    state = State(
        torch.randn(3, MODEL.deter, generator=rng, dtype=torch.float64),
        torch.rand(3, MODEL.latent, generator=rng, dtype=torch.float64),
    )
    actions = torch.randn(3, 4, MODEL.max_action_dim, generator=rng, dtype=torch.float64, requires_grad=True)
    imagined = model.imagine(state, actions, generator(2))
    imagined.deter[:, -1].square().sum().backward()
    uniform = torch.rand(3, 4, MODEL.stoch, generator=generator(2), dtype=torch.float64)
    again, slow, (deter, stoch) = actions.detach().requires_grad_(), Slow(leaves(model)), state
    for t in range(4):
        deter, stoch = slow.prior_step(deter, stoch, again[:, t], uniform[:, t])
        torch.testing.assert_close(imagined.deter[:, t], deter)
        torch.testing.assert_close(imagined.stoch[:, t], stoch)
    deter.square().sum().backward()
    torch.testing.assert_close(actions.grad, again.grad)


def test_encoder_and_decoder_equal_plain_convolutions_on_pixels():
    model, rng = model64(), np.random.default_rng(0)
    with torch.no_grad():
        model.decoder.last.weight.mul_(10)  # some pixels beyond black and white
    slow = Slow(leaves(model))
    pixels = torch.as_tensor(rng.integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8))
    torch.testing.assert_close(
        model.encode({"pixels": pixels}).flatten(0, 1), slow.part("encoder").encode(pixels.flatten(0, 1))
    )
    deter, stoch = torch.randn(4, MODEL.deter).double(), torch.randn(4, MODEL.latent).double()
    image = slow.part("decoder").decode(deter, stoch).movedim(1, -1)
    torch.testing.assert_close(from_patches(model.decoder(deter, stoch)) + OFFSET, image)
    shown = model.decode(State(deter, stoch))["pixels"]
    assert shown.dtype == torch.uint8
    assert image.abs().max() > 0.6
    assert (shown.double() - ((image + 0.5) * 255).clamp(0, 255)).abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_patches_lose_nothing(channels):
    pixels = torch.randint(0, 256, (2, 64, 64, channels), dtype=torch.uint8, generator=generator())
    patches = to_patches(pixels)
    assert torch.equal(from_patches(patches).to(torch.int16) + 128, pixels.to(torch.int16))
    corner = pixels[1, 6:8, 10:12].flatten().to(torch.int16) - 128
    assert torch.equal(patches[1, 3, 5].to(torch.int16), corner)
    assert Encoder(channels, 2)(pixels).shape == (2, 64)


def test_free_bits_are_clipped_per_step_then_averaged():
    config = dataclasses.replace(MODEL, free_nats=1.0)
    posterior = torch.zeros(1, 2, MODEL.stoch, MODEL.classes, dtype=torch.float64)
    posterior[0, 1, :, 0] = 20.0  # one step agrees with the prior, the other does not at all
    parts = divergences(posterior, torch.zeros_like(posterior), config)
    q = 0.99 * torch.softmax(posterior[0, 1, 0], -1) + 0.01 / MODEL.classes
    far = MODEL.stoch * float((q * (q * MODEL.classes).log()).sum())
    assert parts["dyn"].tolist()[0] == pytest.approx([1.0, far])
    assert masked_mean(parts["dyn"], torch.ones(1, 2)) == pytest.approx((1 + far) / 2)
    assert parts["kl"].tolist()[0] == pytest.approx([0.0, far])


def test_groups_have_their_own_losses_which_add_up_to_the_whole():
    model, batch = model64(), batch64()
    groups = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True, False])}
    loss, _, metrics = model.loss(batch, generator(3), groups)
    steps = {"a": 8, "b": 5}  # the last sequence is two rows short
    for part in ("recon", "dyn", "rep"):
        total = sum(metrics[f"{part}/{name}"] * n for name, n in steps.items())
        torch.testing.assert_close(total / 13, metrics[part])
    valid = batch.valid & groups["b"][:, None]
    _, _, only_b = model.loss(dataclasses.replace(batch, valid=valid), generator(3))
    torch.testing.assert_close(metrics["recon/b"], only_b["recon"])
    assert torch.equal(loss, model.loss(batch, generator(3))[0])


def test_rows_after_the_end_change_neither_loss_nor_gradient():
    model, batch = model64(), batch64()
    loss, *_ = model.loss(batch, generator())
    loss.backward()
    gradient = model.encoder.first.weight.grad.clone()
    pixels, action = batch.observation["pixels"].clone(), batch.previous_action.clone()
    pixels[~batch.valid], action[~batch.valid] = 0, 1
    model.zero_grad()
    other, *_ = model.loss(
        dataclasses.replace(batch, observation={"pixels": pixels}, previous_action=action), generator()
    )
    other.backward()
    assert other.item() == loss.item()
    torch.testing.assert_close(model.encoder.first.weight.grad, gradient, rtol=1e-12, atol=0)


def test_the_same_generator_gives_the_same_result_and_another_does_not():
    model, batch = WorldModel.create(MODEL, 0), TensorBatch.from_batch(noise_batch(np.random.default_rng(0)))
    losses = [model.loss(batch, generator(seed))[0].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    first, second, other = (WorldModel.create(MODEL, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["prior.first.weight"], other["prior.first.weight"])


def test_making_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    WorldModel.create(MODEL, 0)
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_stays_close_to_float32():
    batch = TensorBatch.from_batch(noise_batch(np.random.default_rng(0)))
    gradients, losses = [], []
    for precision in ("float32", "bfloat16"):
        model = WorldModel.create(dataclasses.replace(MODEL, depth=8, precision=precision), 0)
        loss, states, _ = model.loss(batch, generator())
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == states.deter.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in model.decoder.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert torch.cosine_similarity(*gradients, 0) > 0.99


def test_it_learns_to_see_more_than_the_average_image():
    batch = noise_batch(np.random.default_rng(0), b=4, t=6)
    shade = np.clip(128 + 80 * np.cumsum(batch.previous_action[..., 0], 1), 0, 255).astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(shade[..., None, None, None], (4, 6, 64, 64, 3)))
    average = 64 * 64 * 3 * (shade[batch.valid] / 255).var()
    batch = TensorBatch.from_batch(dataclasses.replace(batch, observation={"pixels": pixels}))
    model = WorldModel.create(dataclasses.replace(MODEL, hidden=32, deter=32, stoch=8), 0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng = generator()
    for _ in range(60):
        loss, _, metrics = model.loss(batch, rng)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert metrics["recon"] < 0.6 * average


def test_samples_follow_the_mixed_probabilities_and_are_always_one_hot():
    logits = torch.tensor([[3.0, 0.0, -40.0, 1.0]]).repeat(40_000, 1)[:, None]
    drawn = latents.sample(logits, torch.rand(40_000, 1, generator=generator()), 0.1)
    probs = latents.log_probs(logits[0], 0.1).exp()
    torch.testing.assert_close(drawn.mean(0), probs, rtol=0, atol=0.01)
    assert probs.sum().item() == pytest.approx(1)
    edges = latents.sample(torch.randn(99, 1, 96, generator=generator()), torch.full((99, 1), 1 - 2**-24), 0.01)
    assert torch.equal(edges.sum(-1), torch.ones(99, 1))


def test_mixed_probabilities_divergence_and_entropy_are_the_distributions_own():
    q, p = (torch.randn(4, 3, 5, generator=generator(i), dtype=torch.float64) * 4 for i in (0, 1))
    mixed = [torch.distributions.Categorical(0.93 * x.softmax(-1) + 0.07 / 5) for x in (q, p)]
    log_q, log_p = (latents.log_probs(x, 0.07) for x in (q, p))
    torch.testing.assert_close(log_q.exp(), mixed[0].probs)
    torch.testing.assert_close(latents.kl_divergence(log_q, log_p), torch.distributions.kl_divergence(*mixed).sum(-1))
    torch.testing.assert_close(latents.entropy(log_q), mixed[0].entropy().sum(-1))


def test_a_samples_gradient_is_that_of_the_mixed_probabilities():
    logits = torch.randn(4, 3, 5, generator=generator(), dtype=torch.float64, requires_grad=True)
    weight, uniform = (torch.rand(*shape, generator=generator(2)).double() for shape in ((4, 3, 5), (4, 3)))
    drawn = latents.sample(logits, uniform, 0.07)
    (found,) = torch.autograd.grad((drawn * weight).sum(), logits)
    (expected,) = torch.autograd.grad(((0.93 * logits.softmax(-1) + 0.07 / 5) * weight).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("gates", ["per-block", "flat"])
def test_the_recurrent_cell_and_its_gradients_equal_the_oracle(gates):
    model = model64(gates=gates)
    sizes = (MODEL.deter, MODEL.latent, MODEL.max_action_dim)
    inputs = [torch.randn(3, n, generator=generator(n), dtype=torch.float64, requires_grad=True) for n in sizes]
    again = [x.detach().requires_grad_() for x in inputs]
    found, weights = rssm.Transition(model.cell)(State(*inputs[:2]), inputs[2]), leaves(model.cell)
    expected = Slow(weights, model.config).cell(*again)
    torch.testing.assert_close(found, expected)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    assert_gradients_equal(model.cell, weights)
    for ours, theirs in zip(inputs, again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_unrolled_layers_give_the_gradients_of_plain_ones():
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), BlockLinear(8, 6, 2)).double()
    results = []
    for run in (net, unroll(net)):
        x = start = torch.randn(5, 6, generator=generator(), dtype=torch.float64, requires_grad=True)
        for _ in range(4):
            x = run(x)
        loss = x.square().sum()
        for _ in range(2):  # the second time through the same graph
            start.grad = None
            net.zero_grad()
            loss.backward(retain_graph=True)
        results.append([x, start.grad, *(p.grad for p in net.parameters())])
    for plain, unrolled in zip(*results, strict=True):
        torch.testing.assert_close(unrolled, plain)


def test_frozen_layers_pass_gradients_on_and_take_none():
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), BlockLinear(8, 6, 2))
    x = torch.ones(5, 6, requires_grad=True)
    for run in (lambda: net(x), lambda: unroll(net)(x)):
        x.grad = None
        with frozen(net):
            run().sum().backward()
        assert x.grad.abs().sum() > 0
        assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(("name", "parameters"), [("paper", 281_384_259), ("reference-small", 13_593_027)])
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = WorldModel(preset(name).world_model)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_unknown_and_impossible_sizes_say_what_is_possible():
    with pytest.raises(UsageError, match="reference-small"):
        preset("reference-smal")
    with pytest.raises(UsageError, match="blocks"):
        WorldModelConfig(deter=100, hidden=8, stoch=2, classes=2, depth=2)
    assert set(PRESETS) == {"tiny", "small", "reference-small", "paper"}


def test_foreign_observations_and_actions_are_refused_by_name():
    batch = noise_batch(np.random.default_rng(0))
    state = dataclasses.replace(batch, observation={"state": np.zeros((3, 5, 7), np.float32)})
    with pytest.raises(
        SpecMismatch, match=r"sees pixels \[3, 5, 64, 64, 3\] uint8; the batch has state \[3, 5, 7\] float32"
    ):
        WorldModel.create(MODEL, 0).loss(TensorBatch.from_batch(state), generator())
    model = WorldModel.create(dataclasses.replace(MODEL, max_action_dim=6), 0)
    with pytest.raises(SpecMismatch, match="max_action_dim 6"):
        model.loss(TensorBatch.from_batch(batch), generator())


def test_a_saved_model_comes_back_and_its_hashes_tell_what_changed(tmp_path):
    model = WorldModel.create(MODEL, 0)
    model.save(tmp_path, {"updates": 3})
    again = WorldModel.load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.encoder_hash() == model.encoder_hash()
    with torch.no_grad():
        again.decoder.last.bias += 1
    assert again.encoder_hash() == model.encoder_hash()
    with torch.no_grad():
        again.encoder.net[2].bias += 1
    assert again.encoder_hash() != model.encoder_hash()
    variants = {WorldModel(dataclasses.replace(MODEL, **c)).architecture_hash()
                for c in ({}, {"precision": "bfloat16"}, {"gates": "flat"}, {"depth": 4}, {"unimix": 0.0})}  # fmt: skip
    assert len(variants) == 4  # precision alone decides nothing about the weights


def test_damaged_foreign_and_half_replaced_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no world model in"):
        WorldModel.load(tmp_path)
    WorldModel.create(MODEL, 0).save(tmp_path)
    about, weights = tmp_path / "world_model.json", tmp_path / "world_model.safetensors"
    text, data = about.read_text(), weights.read_bytes()
    for change, error in (
        ({"format": 99}, "format 99"), ({"kind": "behaviour"}, "does not describe a world model"),
        ({"config": {**json.loads(text)["config"], "deter": 32}}, "another size"),
        ({"config": {**json.loads(text)["config"], "depht": 1}}, "depht"),
    ):  # fmt: skip
        about.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises((FormatError, SpecMismatch, UsageError), match=error):
            WorldModel.load(tmp_path)
    about.write_text(text)
    weights.write_bytes(data[:-8])
    with pytest.raises(FormatError, match="damaged"):
        WorldModel.load(tmp_path)
    WorldModel.create(MODEL, 1).save(tmp_path)
    about.write_text(text)
    with pytest.raises(FormatError, match="half replaced"):
        WorldModel.load(tmp_path)


def test_a_dream_of_a_frozen_model_leaves_no_gradient_in_it():
    model = model64()
    action = torch.zeros(2, MODEL.max_action_dim, dtype=torch.float64, requires_grad=True)
    start = State(*(torch.zeros(2, n, dtype=torch.float64) for n in (MODEL.deter, MODEL.latent)))
    with frozen(model):
        state = Dream(model)(start, action, model.draw((2,), generator()))
    state.deter.sum().backward()
    assert action.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
