"""Small agents and batches of noise, and the agent's networks written out slowly."""

import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from gsa.agent.sizes import BehaviourConfig, WorldModelConfig
from gsa.agent.world_model import TensorBatch
from gsa.schema import Batch

MODEL = WorldModelConfig(
    deter=16, hidden=8, stoch=3, classes=5, depth=2, blocks=4, max_action_dim=4, precision="float32"
)
BEHAVIOUR = BehaviourConfig(units=6, actor_layers=2, critic_layers=1, reward_layers=1, horizon=4)


def noise_batch(rng, b=3, t=5, action_dim=2, max_action_dim=4):
    """Random everything; the last sequence is two rows short."""
    valid = np.ones((b, t), bool)
    valid[-1, -2:] = False
    action = np.zeros((b, t, max_action_dim), np.float32)
    action[:, 1:, :action_dim] = rng.uniform(-1, 1, (b, t - 1, action_dim))
    is_first = np.zeros((b, t), bool)
    is_first[:, 0] = True
    reward_mask = rng.random((b, t)) < 0.6
    return Batch(
        {"pixels": rng.integers(0, 256, (b, t, 64, 64, 3), dtype=np.uint8)}, action,
        np.repeat((np.arange(max_action_dim) < action_dim)[None].astype(np.float32), b, 0),
        np.where(reward_mask, rng.normal(size=(b, t)), 0).astype(np.float32), reward_mask,
        np.ones((b, t), np.float32), is_first, valid, (),
    )  # fmt: skip


def doubled(batch):
    """A batch's tensors, numbers in float64 and images as they are."""

    def wide(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    fields = {f.name: wide(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    return TensorBatch(**fields | {"observation": {k: wide(v) for k, v in batch.observation.items()}})


class Slow:
    """Forward passes from a state dict, layer by layer as the method has them. Axes [N, …]; float64."""

    def __init__(self, weights, model=MODEL):
        self.w, self.model = weights, model

    def part(self, prefix):
        return Slow({k[len(prefix) + 1 :]: v for k, v in self.w.items() if k.startswith(prefix + ".")}, self.model)

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x, eps=1e-5):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return unit * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def block_linear(self, name, x):
        weight = self.w[f"{name}.weight"]
        parts = [part @ block for part, block in zip(x.chunk(len(weight), -1), weight, strict=True)]
        return torch.cat(parts, -1) + self.w[f"{name}.bias"]

    def dense(self, name, x):
        return F.silu(self.norm(f"{name}.1", self.linear(f"{name}.0", x)))

    def dense_at(self, i, x):
        """The dense layer whose linear map is number `i` of the whole part."""
        return F.silu(self.norm(str(i + 1), self.linear(str(i), x)))

    def channel_norm(self, name, x):
        return self.norm(name, x.movedim(1, -1), eps=1e-3).movedim(-1, 1)

    def encode(self, pixels):
        x = pixels.movedim(-1, 1).double() / 255 - 0.5
        x = F.conv2d(x, self.w["first.weight"], self.w["first.bias"], stride=2)
        for conv in (None, 2, 5, 8):
            if conv:
                x = F.conv2d(x, self.w[f"net.{conv}.weight"], self.w[f"net.{conv}.bias"], stride=2)
            x = F.silu(self.channel_norm(f"net.{conv + 1 if conv else 0}", x))
        return x.flatten(1)

    def decode(self, deter, stoch):
        """[N, 3·cameras, 64, 64] in [-0.5, 0.5]."""
        deter = F.silu(self.norm("deter.1", self.block_linear("deter.0", deter)))
        x = self.linear("deter.3", deter) + self.linear("stoch.3", self.dense("stoch", stoch))
        x = F.conv_transpose2d(x[:, :, None, None], self.w["first.weight"], self.w["first.bias"], stride=2)
        for conv in (2, 5):
            x = F.silu(self.channel_norm(f"net.{conv - 2}", x))
            x = F.conv_transpose2d(x, self.w[f"net.{conv}.weight"], self.w[f"net.{conv}.bias"], stride=2)
        x = F.silu(self.channel_norm("net.6", x))
        return F.conv_transpose2d(x, self.w["last.weight"], self.w["last.bias"], stride=2)

    def cell(self, deter, stoch, action):
        inputs = [self.dense("deter", deter), self.dense("stoch", stoch), self.dense("action", action)]
        blocks = [torch.cat([part, *inputs], -1) for part in deter.chunk(self.model.blocks, -1)]
        x = F.silu(self.norm("norm", self.block_linear("mix", torch.cat(blocks, -1))))
        gates = self.block_linear("gate", x)
        if self.model.gates == "flat":
            reset, candidate, update = gates.chunk(3, -1)
        else:
            by_block = [block.chunk(3, -1) for block in gates.chunk(self.model.blocks, -1)]
            reset, candidate, update = (torch.cat([b[i] for b in by_block], -1) for i in range(3))
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter

    def head(self, x, layers=1):
        x = F.silu(self.norm("net.0", self.linear("first", x)))
        for i in range(layers - 1):
            x = F.silu(self.norm(f"net.{3 * i + 3}", self.linear(f"net.{3 * i + 2}", x)))
        return self.linear(f"net.{3 * layers - 1}", x).unflatten(-1, (self.model.stoch, self.model.classes))

    def probs(self, logits):
        return (1 - self.model.unimix) * logits.softmax(-1) + self.model.unimix / self.model.classes

    def sample(self, logits, uniform):
        """Straight-through: the value of the draw, the gradient of the probabilities. [N, S, K] → [N, S·K]."""
        probs = self.probs(logits)
        below = probs.detach().cumsum(-1) <= uniform[..., None]
        index = below.sum(-1).clamp(max=self.model.classes - 1)
        return (F.one_hot(index, self.model.classes) + probs - probs.detach()).flatten(-2)

    def prior_step(self, deter, stoch, action, uniform):
        deter = self.part("cell").cell(deter, stoch, action)
        return deter, self.sample(self.part("prior").head(deter, 2), uniform)

    def state_mlp(self, deter, stoch, layers):
        x = F.silu(self.norm("deter.1", self.block_linear("deter.0", deter)))
        x = self.linear("deter.3", x) + self.linear("stoch", stoch)
        for i in range(layers):
            x = F.silu(self.norm(f"net.{3 * i + 1}", self.linear(f"net.{3 * i}", x)))
        return self.linear("last", x)


def leaves(module):
    """The module's weights by name, as float64 leaves of a graph of their own."""
    return {k: v.detach().double().clone().requires_grad_() for k, v in module.state_dict().items()}


def assert_gradients_equal(module, weights, **tolerance):
    """`module`'s gradients against those of the leaves; a missing gradient counts as zero."""
    for name, parameter in module.named_parameters():
        ours, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, weights[name]))
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
