"""Numbers as distributions over 255 bins, evenly spaced in symlog over [-20, 20]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsa.agent.precision import full

BINS, LIMIT = 255, 20.0


def symlog(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


def decode(logits: Tensor) -> Tensor:
    """Logits [..., 255] → the number they stand for, float32 [...]."""
    return symexp(_Mean.apply(full(logits)))


class _Mean(torch.autograd.Function):
    """The mean of the bins under softmax. Keeps one array of the logits' size, where plain operations keep three."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        probs = torch.softmax(logits, -1)
        bins = torch.linspace(-LIMIT, LIMIT, BINS, device=probs.device, dtype=probs.dtype)
        with torch.autocast(probs.device.type, enabled=False):
            mean = probs @ bins
        ctx.save_for_backward(probs, bins, mean)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        probs, bins, mean = ctx.saved_tensors
        return torch.addcmul((-mean * grad)[..., None], grad[..., None], bins).mul_(probs)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in nats of logits [..., 255] to the two bins around each target [...] → [...]."""
    logits = full(logits)
    position = (symlog(full(target)).clamp(-LIMIT, LIMIT) + LIMIT) * ((BINS - 1) / (2 * LIMIT))
    low = position.floor().clamp(max=BINS - 2)
    share = position - low
    near = logits.gather(-1, torch.stack([low, low + 1], -1).long())
    return logits.logsumexp(-1) - torch.lerp(near[..., 0], near[..., 1], share)
