"""The recurrent core: h' = f(h, z, a), and the two heads that read latents off it (method, section 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.agent import latents
from gsa.agent.layers import BlockLinear, Layers, Norm, dense
from gsa.agent.unroll import Map, Unrolled, unroll


class State(NamedTuple):
    """A latent state."""

    deter: Tensor  # [..., D]
    stoch: Tensor  # [..., Z] one-hot in each of its variables

    def detach(self) -> State:
        return State(self.deter.detach(), self.stoch.detach())

    def flatten(self) -> State:
        """[B, T, …] → [B·T, …]."""
        return State(self.deter.flatten(0, -2), self.stoch.flatten(0, -2))


class States(NamedTuple):
    """What the filter inferred at every step of B sequences."""

    deter: Tensor  # [B, T, D]
    stoch: Tensor  # [B, T, Z]
    logits: Tensor  # [B, T, S, K] of the posterior

    @property
    def state(self) -> State:
        return State(self.deter, self.stoch)


class RecurrentCell(nn.Module):
    """A gated cell whose D units form blocks: each block sees its own slice of h and all of the inputs."""

    def __init__(
        self, deter: int, latent: int, action: int, hidden: int, blocks: int, gates: Literal["per-block", "flat"]
    ) -> None:
        super().__init__()
        self.blocks, self.gates = blocks, gates
        self.deter = Layers(*dense(deter, hidden))
        self.stoch = Layers(*dense(latent, hidden))
        self.action = Layers(*dense(action, hidden))
        self.mix = BlockLinear(deter + 3 * hidden * blocks, deter, blocks)
        self.norm = Norm(deter)
        self.gate = BlockLinear(deter, 3 * deter, blocks)


class Transition:
    """The cell made ready for many steps of one graph; its weights must not change meanwhile.

    The mixing layer is cut into the blocks' own slices and the part of the inputs, which all blocks share: that part
    is one plain product, and nothing is repeated to the blocks.
    """

    def __init__(self, cell: RecurrentCell) -> None:
        own = cell.gate.inputs // cell.blocks
        weight, blocks = cell.mix.weight, cell.blocks
        self._cell = cell
        self._deter, self._stoch = unroll(cell.deter), unroll(cell.stoch)
        self._own = Unrolled(weight[:, :own], cell.mix.bias.view(blocks, 1, -1))
        self._shared = Unrolled(weight[:, own:].transpose(0, 1).flatten(1), None)
        self._gate = Unrolled.of(cell.gate)

    def __call__(self, state: State, action: Tensor) -> Tensor:
        """h' [N, D] from a state of [N, …] and the padded action [N, A]."""
        return self.step(state, self._cell.action(action))

    def step(self, state: State, action: Tensor) -> Tensor:
        """As a call, from the action's projection [N, hidden]."""
        deter = state.deter.to(action.dtype)
        inputs = torch.cat([self._deter(deter), self._stoch(state.stoch), action], -1)
        x = self._cell.norm.silu(self._own(deter) + self._shared(inputs))
        if self._cell.gates == "flat":
            return _gated(state.deter, *self._gate(x).chunk(3, -1))
        by_block = state.deter.unflatten(-1, (self._cell.blocks, -1)).transpose(0, 1)  # [G, N, D/G]
        return _gated(by_block, *self._gate.by_block(x).chunk(3, -1)).transpose(0, 1).flatten(1)


def _gated(state: Tensor, reset: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
    """h' = u·tanh(r·c) + (1−u)·h, in the state's dtype."""
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    return torch.lerp(state, candidate.to(state.dtype), torch.sigmoid(update - 1).to(state.dtype))


class Head(nn.Module):
    """Hidden layers and the logits of S variables of K classes."""

    def __init__(self, inputs: int, hidden: int, layers: int, stoch: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        deeper = (m for _ in range(layers - 1) for m in dense(hidden, hidden))
        self.net = Layers(Norm(hidden), nn.SiLU(), *deeper, nn.Linear(hidden, stoch * classes))
        self.shape = (stoch, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] → logits [..., S, K]."""
        return self.net(self.first(x)).unflatten(-1, self.shape)

    def layers(self) -> list[nn.Module]:
        return [self.first, *self.net]

    def ready(self) -> Map:
        """The head, made ready for many calls under weights that stay as they are."""
        logits, shape = unroll(self.layers()), self.shape
        return lambda x: logits(x).unflatten(-1, shape)


def filter_step(
    transition: Transition, posterior: Map, state: State, previous_action: Tensor, features: Tensor, uniform: Tensor,
    unimix: float,
) -> State:  # fmt: skip
    """The state after seeing one more image: for acting.

    previous_action [N, A] as executed and padded, features [N, E] of the image, uniform [N, S] in [0, 1).
    """
    deter = transition(state, previous_action)
    logits = posterior(torch.cat([deter, features], -1))
    return State(deter, latents.sample(logits, uniform, unimix).flatten(-2))


def scan(
    cell: RecurrentCell, posterior: Head, features: Tensor, previous_action: Tensor, is_first: Tensor, uniform: Tensor,
    unimix: float,
) -> States:  # fmt: skip
    """filter_step over T, from a latent of zeros; where `is_first`, latent and previous action start anew.

    features [B, T, E], previous_action [B, T, A], is_first [B, T] bool, uniform [B, T, S]. All that does not depend
    on the latent is computed before the loop.
    """
    first, size, latent = posterior.first, cell.gate.inputs, posterior.shape[0] * posterior.shape[1]
    keep = (~is_first).to(previous_action.dtype)[..., None]
    resets = is_first.is_cuda or bool(is_first[:, 1:].any())  # never, in batches as they are cut; a GPU is not asked
    actions = cell.action(previous_action * keep)
    seen = F.linear(features, first.weight[:, size:], first.bias)
    transition, look = Transition(cell), Unrolled(first.weight[:, :size].t(), None)
    head = unroll(posterior.net)
    state = State(*(previous_action.new_zeros(len(features), n) for n in (size, latent)))
    steps = []
    for action, seen_now, noise, keep_now in zip(*(x.unbind(1) for x in (actions, seen, uniform, keep)), strict=True):
        if resets:
            state = State(state.deter * keep_now, state.stoch * keep_now)
        deter = transition.step(state, action)
        logits = head(look(deter) + seen_now).unflatten(-1, posterior.shape)
        state = State(deter, latents.sample(logits, noise, unimix).flatten(-2))
        steps.append((*state, logits))
    return States(*(torch.stack(x, 1) for x in zip(*steps, strict=True)))
