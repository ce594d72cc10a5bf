"""Convolutional encoder and decoder of 64×64 images (method, section 3).

Both see an image as 32×32 patches of 2×2 pixels, held as signed bytes. A stride-2 convolution on pixels is a stride-1
convolution on patches, which is the same sum, several times faster on a CPU, where three channels fill no register.
A signed byte s stands for s/255 + OFFSET in the networks' scale of [-0.5, 0.5]; first and last bias take the offset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gsa.agent.layers import BlockLinear, ChannelNorm, Layers, Norm, dense, fused, run
from gsa.agent.precision import compute_dtype, full

OFFSET = 128 / 255 - 0.5


def to_patches(pixels: Tensor) -> Tensor:
    """uint8 [..., 64, 64, C] → int8 [N, 32, 32, 4C], each patch (row, column, channel), less 128."""
    rows = pixels.reshape(-1, 32, 2, 32, 2 * pixels.shape[-1])
    return torch.cat(rows.unbind(2), -1).bitwise_xor(128).view(torch.int8)


def from_patches(patches: Tensor) -> Tensor:
    """[..., 32, 32, 4C] → [..., 64, 64, C] of any dtype."""
    halves = torch.stack(patches.chunk(2, -1), -3)  # [..., 32, 2, 32, 2C]
    return halves.reshape(*patches.shape[:-3], 64, 64, -1)


class Encoder(nn.Module):
    """Four convolutions, kernel 4, stride 2, no padding: 64 → 31 → 14 → 6 → 2."""

    def __init__(self, channels: int, depth: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, depth, 4, stride=2)
        layers: list[nn.Module] = [ChannelNorm(depth), activation()]
        for inputs in (depth, 2 * depth, 4 * depth):
            layers += [nn.Conv2d(inputs, 2 * inputs, 4, stride=2), ChannelNorm(2 * inputs), activation()]
        self.net = Layers(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 64, 64, C] → [..., 32·depth]."""
        return self.encode(to_patches(pixels)).view(*pixels.shape[:-3], -1)

    def encode(self, patches: Tensor) -> Tensor:
        """int8 [N, 32, 32, 4C] → [N, 32·depth]."""
        return self.net(_convolve(patches, *self.by_patch())).flatten(1)

    def ready(self) -> Callable[[Tensor], Tensor]:
        """`encode`, made ready for many calls under weights that stay as they are."""
        (weight, bias), rest = self.by_patch(), run(fused(self.net))
        return lambda patches: rest(_convolve(patches, weight, bias)).flatten(1)

    def by_patch(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first convolution, as patches of signed bytes take it."""
        weight = self.first.weight
        by_patch = weight.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return _channels_last(by_patch / 255), _bias(self.first) + OFFSET * weight.sum((1, 2, 3))


def _convolve(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The encoder's first convolution, 64 → 30: the next one reads no more of its 31."""
    patches = patches[:, :31, :31].to(compute_dtype(weight), memory_format=torch.contiguous_format)
    return F.conv2d(patches.permute(0, 3, 1, 2), weight, bias)


class Decoder(nn.Module):
    """A latent state to the image it stands for: 1 → 5 → 13 → 30 → 64."""

    def __init__(self, deter: int, latent: int, hidden: int, depth: int, blocks: int, channels: int = 3) -> None:
        super().__init__()
        features = 32 * depth
        self.deter = Layers(
            BlockLinear(deter, 2 * hidden, blocks), Norm(2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, features)
        )
        self.stoch = Layers(*dense(latent, 2 * hidden), nn.Linear(2 * hidden, features))
        self.first = nn.ConvTranspose2d(features, 4 * depth, 5, stride=2)
        layers: list[nn.Module] = [ChannelNorm(4 * depth), nn.SiLU()]
        for inputs, kernel in ((4 * depth, 5), (2 * depth, 6)):
            layers += [Deconvolution(inputs, inputs // 2, kernel, stride=2), ChannelNorm(inputs // 2), nn.SiLU()]
        self.net = Layers(*layers)
        self.last = nn.ConvTranspose2d(depth, channels, 6, stride=2)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """[..., D], [..., Z] → patches [N, 32, 32, 4C] of s/255: what to_patches gives of the image, over 255."""
        x = (self.deter(deter) + self.stoch(stoch)).flatten(0, -2)
        x = self.net(self._first(x))
        by_patch = self.last.weight.unflatten(3, (3, 2)).unflatten(2, (3, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        image = deconvolve(x, by_patch, (_bias(self.last) - OFFSET).repeat(4), stride=1)
        return image.permute(0, 2, 3, 1)

    def image(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """[..., D], [..., Z] → uint8 [..., 64, 64, C]."""
        patches = full(self(deter, stoch)).mul(255).round().add(128).clamp(0, 255)
        return from_patches(patches.to(torch.uint8)).view(*deter.shape[:-1], 64, 64, -1)

    def _first(self, x: Tensor) -> Tensor:
        """The first transposed convolution, 1 → 5: a matrix product. [N, 32·depth] → [N, 4·depth, 5, 5]."""
        rows = self.first.weight.permute(2, 3, 1, 0)  # [5, 5, 4·depth, 32·depth]
        y = F.linear(x, rows.flatten(0, 2), _bias(self.first).repeat(25))
        return y.view(-1, *rows.shape[:3]).permute(0, 3, 1, 2)


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution without padding, by `deconvolve`."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return deconvolve(x, self.weight, _bias(self), self.stride[0])


def deconvolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """[N, I, H, W] by weight [I, O, K, K] and bias [O] → [N, O, (H-1)·stride+K, …], channels-last in memory."""
    dtype = compute_dtype(weight)
    return _Deconvolve.apply(_channels_last(x.to(dtype)), _channels_last(weight.to(dtype)), bias.to(dtype), stride)


class _Deconvolve(torch.autograd.Function):
    """conv_transpose2d, but for the bias's gradient, on which a CPU spends more than on all the rest."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = [stride, stride]
        return F.conv_transpose2d(x, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = _channels_last(grad)
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, ctx.stride, [0, 0], [1, 1], True, [0, 0], 1, needed
        )
        rows = grad.permute(0, 2, 3, 1).flatten(0, 1).flatten(1)  # long rows first: adding up short ones is slow
        sums = rows.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).view(grad.shape[3], -1).sum(0)
        return x_grad, weight_grad, sums.to(grad.dtype), None


def squared_error(predicted: Tensor, patches: Tensor) -> Tensor:
    """Summed over an image, in the scale of [-0.5, 0.5]: the decoder's output and to_patches' → float32 [N]."""
    return _SquaredError.apply(predicted, patches)


class _SquaredError(torch.autograd.Function):
    """Keeps one array of the images' size for the backward pass, where plain operations keep three."""

    @staticmethod
    def forward(ctx, predicted: Tensor, patches: Tensor) -> Tensor:
        difference = patches.to(predicted.dtype)
        torch.add(predicted, difference, alpha=-1 / 255, out=difference)
        ctx.save_for_backward(difference)
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        return torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=dtype).square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (difference,) = ctx.saved_tensors
        return difference * (2 * grad).to(difference.dtype)[:, None, None, None], None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
