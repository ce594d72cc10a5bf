"""Linear maps that are applied many times in one graph: at every step of a scan.

Plain autograd makes and sums a gradient of the whole weight at every step, and autocast may convert it at every
step. Here the weight is converted once, and its gradient is one product over all steps at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gsa.agent.layers import BlockLinear, StateMLP, fused, run
from gsa.agent.precision import compute_dtype

Map = Callable[[Tensor], Tensor]


class Unrolled:
    """x ↦ x·weight + bias of one graph. weight [I, O] with bias [1, O], or in blocks [G, I, O] with [G, 1, O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._steps: list[tuple[Tensor, Tensor]] = []  # input and output gradient of each step gone through backward
        self._weight, self._bias = _Share.apply(self._steps, compute_dtype(weight), weight, bias)

    @classmethod
    def of(cls, layer: nn.Module) -> Unrolled:
        """The map of an nn.Linear or a BlockLinear."""
        if isinstance(layer, BlockLinear):
            return cls(layer.weight, layer.bias.view(len(layer.weight), 1, -1))
        assert isinstance(layer, nn.Linear)
        return cls(layer.weight.t(), layer.bias[None])

    def __call__(self, x: Tensor) -> Tensor:
        """[N, I] → [N, O]; in blocks [N, G·I] → [N, G·O]."""
        if self._weight.ndim == 2:
            return self._product(x)
        return self.by_block(x).transpose(0, 1).flatten(1)

    def by_block(self, x: Tensor) -> Tensor:
        """[N, G·I] → [G, N, O]: as it comes out of the product."""
        x = x.unflatten(-1, (self._weight.shape[0], -1)).transpose(0, 1)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _product(x.to(self._weight.dtype), self._weight, self._bias)
        return _Product.apply(self._steps, x, self._weight, self._bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x, weight) if weight.ndim == 2 else torch.baddbmm(bias, x, weight)


def unroll(layers: Iterable[nn.Module]) -> Map:
    """The layers one after the other, with their linear maps unrolled. Holds for one graph."""
    return run(Unrolled.of(m) if isinstance(m, nn.Linear | BlockLinear) else m for m in fused(layers))


def unroll_mlp(net: StateMLP) -> Callable[[Tensor, Tensor], Tensor]:
    """The network, with its linear maps unrolled. Holds for one graph."""
    deter, stoch, rest = unroll(net.deter), Unrolled.of(net.stoch), unroll([*net.net, net.last])
    return lambda d, z: rest(deter(d) + stoch(z))


class _Share(torch.autograd.Function):
    """Hands the weight to all steps. Its backward runs after theirs, and makes the gradient of what they left."""

    @staticmethod
    def forward(ctx, steps: list, dtype: torch.dtype, weight: Tensor, bias: Tensor | None):
        ctx.set_materialize_grads(False)
        ctx.steps, ctx.dtype, ctx.bias = steps, weight.dtype, bias is not None
        return weight.to(dtype).view_as(weight), None if bias is None else bias.to(dtype).view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, _weight, _bias):
        if not ctx.steps:
            return None, None, None, None
        inputs, grads = (torch.cat(x, -2) for x in zip(*ctx.steps, strict=True))
        ctx.steps.clear()
        weight = (inputs.mT @ grads).to(ctx.dtype)
        return None, None, weight, grads.sum(-2, keepdim=True, dtype=ctx.dtype) if ctx.bias else None


class _Product(torch.autograd.Function):
    """One step: the product, and backward the gradient of its input alone."""

    @staticmethod
    def forward(ctx, steps: list, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.steps, ctx.dtype = steps, x.dtype
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.steps.append((x.detach(), grad))
        return None, (grad @ weight.mT).to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None
