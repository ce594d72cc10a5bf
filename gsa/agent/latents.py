"""The categorical latents: S variables of K classes, mixed with a little of the uniform distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsa.agent.precision import full


def log_probs(logits: Tensor, unimix: float) -> Tensor:
    """[..., K] → log of the mixed probabilities, float32 at least."""
    probs = torch.softmax(full(logits), -1)
    return torch.log((1 - unimix) * probs + unimix / logits.shape[-1])


def sample(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    """One class a variable, by the inverse of the distribution function; gradients pass straight through.

    logits [..., S, K]; uniform [..., S] in [0, 1) → one-hot [..., S, K] of the logits' dtype.
    """
    if not torch.is_grad_enabled():
        return _one_hot(logits, uniform, unimix)[0]
    return _StraightThrough.apply(logits, uniform, unimix)


def _one_hot(logits: Tensor, uniform: Tensor, unimix: float) -> tuple[Tensor, Tensor]:
    """The sample, and the probabilities before they were mixed."""
    probs = torch.softmax(logits.to(uniform.dtype), -1)
    mixed = (1 - unimix) * probs + unimix / logits.shape[-1]
    below = torch.searchsorted(mixed.cumsum(-1), uniform[..., None].contiguous(), right=True)  # classes passed
    below.clamp_(max=logits.shape[-1] - 1)  # rounding may leave the last one below 1
    return torch.zeros_like(logits).scatter_(-1, below, 1.0), probs


class _StraightThrough(torch.autograd.Function):
    """Forward: the one-hot sample. Backward: the gradient of the mixed probabilities."""

    @staticmethod
    def forward(ctx, logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
        chosen, probs = _one_hot(logits, uniform, unimix)
        ctx.save_for_backward(probs)
        ctx.unimix, ctx.dtype = unimix, logits.dtype
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (probs,) = ctx.saved_tensors
        inner = torch._softmax_backward_data(grad.to(probs.dtype), probs, -1, probs.dtype)
        return ((1 - ctx.unimix) * inner).to(ctx.dtype), None, None


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q ‖ p) in nats, summed over the variables: [..., S, K] twice → [...]."""
    return (log_q.exp() * (log_q - log_p)).sum((-2, -1))


def entropy(log_p: Tensor) -> Tensor:
    """In nats, summed over the variables: [..., S, K] → [...]."""
    return -(log_p.exp() * log_p).sum((-2, -1))
