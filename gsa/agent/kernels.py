"""Layer normalisation and SiLU as one kernel on the CPU, compiled from kernels.c where there is a C compiler.

torch makes five passes over memory of the two, forward and backward; the kernel two, and keeps half as much. It is
compiled once a machine, in a second, into a private folder of the user's cache. It has one thread: with more than two
threads, without a compiler, on a GPU or in float64, torch's own operations are taken, which give the same to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("kernels.c")
MOST_THREADS = 2  # up to which one thread of the kernel is faster than torch's operations
# Sums may be reordered, so that they are computed in vectors; NaN and infinity stay what they are.
FLAGS = (
    "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
    "-fno-signed-zeros",
)  # fmt: skip
MACROS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
_log = logging.getLogger(__name__)
_long, _pointer = ctypes.c_long, ctypes.c_void_p
enabled = True  # for the whole process: learner.compute.set_up


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | None:
    """silu(layer_norm(x)) over the last dimension, [..., n] → [..., n] of x's dtype. None where it is not for the
    kernel to compute."""
    library = _library(x.dtype) if _suits(x, weight) else None
    if library is None:
        return None
    if not torch.is_grad_enabled():  # acting takes so few rows that a Function would cost it more than the kernel does
        return _forward(x.contiguous(), weight.contiguous(), bias.contiguous(), eps, library)[0]
    return _NormSiLU.apply(x, weight, bias, eps, library)


def available() -> bool:
    """Whether this machine has the kernels, or can compile them."""
    return _library(torch.float32) is not None


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        enabled and x.device.type == "cpu" and x.dtype in MACROS and weight.dtype == torch.float32
        and torch.get_num_threads() <= MOST_THREADS and not torch.compiler.is_compiling()
    )  # fmt: skip


class _NormSiLU(torch.autograd.Function):
    """Keeps the input and two numbers a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, library: ctypes.CDLL) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        y, stats = _forward(x, weight, bias, eps, library)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.library = library
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, bias, stats = ctx.saved_tensors
        grad, out, work = grad.contiguous(), torch.empty_like(x), weight.new_zeros(6, x.shape[-1])
        ctx.library.norm_silu_backward(
            len(stats), x.shape[-1], x.data_ptr(), weight.data_ptr(), bias.data_ptr(), stats.data_ptr(),
            grad.data_ptr(), out.data_ptr(), work.data_ptr(),
        )  # fmt: skip
        return out, work[0], work[1], None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, library: ctypes.CDLL) -> tuple[Tensor, Tensor]:
    """The result, and mean and scale of each row; all arguments contiguous."""
    n = x.shape[-1]
    rows = x.numel() // n
    y, stats = torch.empty_like(x), weight.new_empty(rows, 2)
    library.norm_silu_forward(
        rows, n, eps, x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), stats.data_ptr()
    )
    return y, stats


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for one dtype; None, said once in the log, where they cannot be compiled."""
    try:
        library = ctypes.CDLL(str(_compiled(MACROS[dtype])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.info("Layers run as separate operations of torch, which is slower: %s", error)
        return None
    library.norm_silu_forward.argtypes = [_long, _long, ctypes.c_float, *[_pointer] * 5]
    library.norm_silu_backward.argtypes = [_long, _long, *[_pointer] * 7]
    library.norm_silu_forward.restype = library.norm_silu_backward.restype = None
    return library


def _compiled(macros: tuple[str, ...]) -> Path:
    """The shared library: from the cache, or compiled into it. OSError or SubprocessError where that fails."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("there is no C compiler ('cc', or what CC names)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    processor = "".join(line for line in _cpuinfo() if line.startswith(("model name", "flags")))
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), repr((FLAGS, macros, platform.machine())).encode(), version,
                                     processor.encode()])).hexdigest()[:16]  # fmt: skip
    library = _cache() / f"kernels-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *FLAGS, *_wide(compiler), *macros, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            os.replace(made, library)
    return library


def _wide(compiler: str) -> list[str]:
    """Vectors of 512 bits where the processor has them: compilers shy away from them by themselves."""
    return ["-mprefer-vector-width=512"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else []


def _cpuinfo() -> list[str]:
    try:
        return sorted(set(Path("/proc/cpuinfo").read_text().splitlines()))
    except OSError:
        return [platform.processor()]


def _cache() -> Path:
    """A folder that only this user can write to: what lies in it is run."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "gsa" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {folder}")
    return folder
