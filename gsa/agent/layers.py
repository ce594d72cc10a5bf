"""The layers every network is made of, and how they are seeded and frozen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.agent.kernels import norm_silu


class BlockLinear(nn.Module):
    """`blocks` separate linear maps: each from its slice of the input to its slice of the output.

    weight [blocks, inputs/blocks, outputs/blocks], bias [outputs].
    """

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = 1 / math.sqrt(inputs // blocks)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] → [..., outputs]."""
        blocks, inputs, outputs = self.weight.shape
        by_block = x.reshape(-1, blocks, inputs).transpose(0, 1)
        y = torch.baddbmm(self.bias.view(blocks, 1, outputs), by_block, self.weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], blocks * outputs)


class Norm(nn.LayerNorm):
    """Layer normalisation that can take the SiLU after it along."""

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised x, [..., n] → [..., n]."""
        y = norm_silu(x, self.weight, self.bias, self.eps)
        return F.silu(self(x)) if y is None else y


class ChannelNorm(Norm):
    """Layer normalisation over the channels of [N, C, H, W]; memory stays channels-last."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        if rows.shape[-1] < 16:  # torch's bfloat16 kernel is many times slower on rows this short
            rows = rows.to(self.weight.dtype)
        return super().forward(rows).to(x.dtype).permute(0, 3, 1, 2)

    def silu(self, x: Tensor) -> Tensor:
        y = norm_silu(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps)
        return F.silu(self(x)) if y is None else y.permute(0, 3, 1, 2)


class Layers(nn.Sequential):
    """One layer after the other, with normalisation and SiLU as one."""

    def forward(self, x: Tensor) -> Tensor:
        return run(fused(self))(x)


def run(maps: Iterable[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """One after the other."""
    row = list(maps)

    def call(x: Tensor) -> Tensor:
        for each in row:
            x = each(x)
        return x

    return call


def fused(layers: Iterable[nn.Module]) -> Iterator[Callable[[Tensor], Tensor]]:
    """The same layers, with each normalisation that SiLU follows as one with it."""
    row = list(layers)
    for before, layer, after in zip([None, *row], row, [*row[1:], None], strict=False):
        if isinstance(layer, Norm) and isinstance(after, nn.SiLU):
            yield layer.silu
        elif not (isinstance(before, Norm) and isinstance(layer, nn.SiLU)):
            yield layer


def dense(inputs: int, outputs: int, activation: type[nn.Module] = nn.SiLU) -> list[nn.Module]:
    """Linear, layer normalisation, activation."""
    return [nn.Linear(inputs, outputs), Norm(outputs), activation()]


class StateMLP(nn.Module):
    """A network on a latent state: both halves mapped to `units` and summed, then `layers` hidden layers."""

    def __init__(self, deter: int, latent: int, outputs: int, layers: int, units: int, blocks: int) -> None:
        super().__init__()
        self.deter = Layers(
            BlockLinear(deter, 2 * units, blocks), Norm(2 * units), nn.SiLU(), nn.Linear(2 * units, units)
        )
        self.stoch = nn.Linear(latent, units)
        self.net = Layers(*(m for _ in range(layers) for m in dense(units, units)))
        self.last = nn.Linear(units, outputs)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """[..., D], [..., Z] → [..., outputs]."""
        return self.last(self.net(self.deter(deter) + self.stoch(stoch)))


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Gradients flow through these modules but not into their weights."""
    held = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights initialised inside depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
