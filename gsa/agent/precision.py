"""Which number format matrix products run in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from gsa.agent.sizes import Precision


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products inside, where `precision` asks for it; "auto": where the hardware is fast at them."""
    if precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has matrix units for bfloat16: GPUs since 2020, CPUs with AMX."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The format of matrix products with `weight` here and now."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def full(x: Tensor) -> Tensor:
    """As float32 at least: what statistics, distributions and losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
