"""The kernels in C against float64, against torch's own operations, and where they cannot be had."""

import copy
import os
import stat

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsa.agent import kernels
from gsa.agent.layers import ChannelNorm, Layers, Norm
from gsa.agent.unroll import unroll
from gsa.errors import UsageError
from learner.compute import set_up
from learner.config import ComputeConfig

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="there is no C compiler on this machine")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    kernels.enabled = True


def drawn(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def with_gradients(function, *inputs, seed=9):
    """The result and the gradient of each input, float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.double(), *(g.double() for g in torch.autograd.grad(y, leaves, drawn(*y.shape, seed=seed).to(y.dtype)))]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 8), (130, 16), (65, 32), (3, 5, 129), (4, 512), (1, 3), (0, 16)])
def test_the_kernel_and_its_gradients_equal_float64(shape, dtype):
    x = drawn(*shape).to(dtype)
    weight, bias = drawn(shape[-1], seed=1).float(), drawn(shape[-1], seed=2).float()
    found = with_gradients(lambda x, w, b: kernels.norm_silu(x, w, b, 1e-3), x, weight, bias)
    expected = with_gradients(
        lambda x, w, b: F.silu(F.layer_norm(x, shape[-1:], w, b, 1e-3)), *(v.double() for v in (x, weight, bias))
    )
    for ours, oracle in zip(found, expected, strict=True):
        most = TOLERANCE[dtype] * max(1.0, float(oracle.detach().abs().max()) if oracle.numel() else 1.0)
        torch.testing.assert_close(ours, oracle, rtol=TOLERANCE[dtype], atol=most)


@needs_compiler
def test_far_from_zero_nothing_overflows_and_what_is_not_finite_stays_so():
    ones, zeros = torch.ones(4), torch.zeros(4)
    assert not torch.isnan(kernels.norm_silu(torch.randn(5, 4), 1e4 * ones, zeros, 1e-5)).any()
    for bad in (float("nan"), float("inf")):
        x = torch.tensor([[1.0, 2.0, bad, 3.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
        y = kernels.norm_silu(x, ones, zeros, 1e-5)
        y.sum().backward()
        assert torch.isnan(y[0]).all() and torch.isfinite(y[1]).all()
        assert torch.isnan(x.grad[0]).all() and torch.isfinite(x.grad[1]).all()


@needs_compiler
def test_layers_with_the_kernel_equal_the_separate_operations():
    torch.manual_seed(0)
    images = Layers(nn.Conv2d(3, 12, 3), ChannelNorm(12), nn.SiLU(), nn.Conv2d(12, 8, 2), ChannelNorm(8), nn.ELU())
    rows = Layers(nn.Linear(6, 24), Norm(24), nn.SiLU(), nn.SiLU(), Norm(24), nn.Linear(24, 4), nn.SiLU())
    for layers, x in ((images, torch.randn(5, 3, 9, 9)), (rows, torch.randn(5, 6))):
        results = {}
        for kernels.enabled in (True, False):
            again = copy.deepcopy(layers)
            y = again(x)
            y.square().sum().backward()
            results[kernels.enabled] = [y.detach(), *(p.grad for p in again.parameters())]
        for ours, plain in zip(results[True], results[False], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unroll(rows)(torch.ones(2, 6)), rows(torch.ones(2, 6)))


def test_what_the_kernel_is_not_for_is_left_to_torch():
    norm, x = Norm(8), torch.randn(3, 8)
    plain = F.silu(F.layer_norm(x, (8,), norm.weight, norm.bias))
    torch.set_num_threads(kernels.MOST_THREADS + 1)
    assert kernels.norm_silu(x, norm.weight, norm.bias, norm.eps) is None
    assert torch.equal(norm.silu(x), plain)
    torch.set_num_threads(1)
    double = copy.deepcopy(norm).double()
    assert kernels.norm_silu(x.double(), double.weight, double.bias, norm.eps) is None


def test_without_a_compiler_everything_runs_and_only_who_insists_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    kernels._library.cache_clear()
    try:
        assert not kernels.available()
        assert torch.isfinite(Norm(8).silu(torch.randn(3, 8))).all()
        set_up(ComputeConfig("cpu"))
        with pytest.raises(UsageError, match="install a C compiler"):
            set_up(ComputeConfig("cpu", compile="on"))
    finally:
        kernels._library.cache_clear()


def test_a_compiler_that_fails_is_as_good_as_none(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo cc 1 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels._library.cache_clear()
    try:
        assert not kernels.available()
        assert not list((tmp_path / "cache/gsa/kernels").iterdir()), "something half-made was left behind"
    finally:
        kernels._library.cache_clear()


def test_nothing_is_run_out_of_a_folder_that_others_can_write_to(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = kernels._cache()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.chmod(folder, 0o777)
    with pytest.raises(PermissionError, match="others can write"):
        kernels._cache()


def test_the_kernels_can_be_switched_off():
    set_up(ComputeConfig("cpu", compile="off"))
    x = torch.randn(3, 8)
    assert kernels.norm_silu(x, torch.ones(8), torch.zeros(8), 1e-5) is None
