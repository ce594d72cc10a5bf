"""Where our update's time goes: its parts by themselves, each forward and backward on inputs of the right shapes, how
many floating-point operations of matrix products and convolutions each needs, and how long all of these take alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals import Case
from benchmarks.rivals.ours import batch, tuner
from gsa.agent import behaviour, observation
from gsa.agent.agent import Agent, Imagination
from gsa.agent.layers import frozen
from gsa.agent.rssm import State
from gsa.agent.vision import squared_error
from gsa.agent.world_model import TensorBatch
from learner.finetune import FineTuner

_OPS = torch.ops.aten
PRODUCTS = {
    op.default
    for op in (_OPS.mm, _OPS.addmm, _OPS.bmm, _OPS.baddbmm, _OPS.convolution, _OPS.convolution_backward)
}  # fmt: skip


class Products(TorchDispatchMode):
    """Keeps which matrix products and convolutions are computed inside, in which shapes, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: dict[str, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in PRODUCTS:
            key = repr([op, *((a.shape, a.stride()) if isinstance(a, Tensor) else a for a in args)])
            self.counts[key] += 1
            if key not in self.calls:
                self.calls[key] = op, [_alike(a) if isinstance(a, Tensor) else a for a in args]
        return op(*args, **(kwargs or {}))

    def seconds(self, rounds: int) -> float:
        """Of all of them, one after the other and nothing else: each at its fastest, with its arguments in the cache as
        far as they fit."""
        total = 0.0
        for key, (op, args) in self.calls.items():
            best = float("inf")
            for _ in range(rounds):
                started = time.perf_counter()
                op(*args)
                best = min(best, time.perf_counter() - started)
            total += best * self.counts[key]
        return total


def _alike(x: Tensor) -> Tensor:
    """Of the same layout."""
    return torch.empty_strided(x.shape, x.stride()).normal_()


def products_alone(case: Case, rounds: int) -> float:
    """Seconds that the products and convolutions of one update take by themselves, in their own shapes."""
    learner, data = tuner(case), batch(case)
    with Products() as products:
        learner.update(data)
    return products.seconds(rounds)


def parts(case: Case) -> dict[str, Callable[[], object]]:
    """Part → a call that runs it once."""
    learner = tuner(case)
    data = TensorBatch.from_batch(batch(case))
    learner.update(batch(case))
    agent, model, generator = learner.agent, learner.agent.world_model, torch.Generator().manual_seed(0)
    patches = observation.prepare(model.config.observation, data.observation).patches
    assert model.encoder is not None and model.decoder is not None and patches is not None
    encoder, decoder = model.encoder, model.decoder
    features = encoder.encode(patches).detach().view(case.batch, case.length, -1).requires_grad_()
    with torch.no_grad():
        seen = model.observe(features, data.previous_action, data.is_first, generator)
    states = State(*(x.clone().requires_grad_() for x in seen.state))
    starts = seen.state.flatten()
    with torch.no_grad():
        imagined = behaviour.imagine(model, agent.actor, starts, agent.config.horizon, generator).states

    def scan() -> None:
        found = model.observe(features, data.previous_action, data.is_first, generator)
        _back(found.deter.sum() + found.logits.sum() + model.prior(found.deter).sum())

    def imagination() -> None:
        with frozen(model):
            found = behaviour.imagine(model, agent.actor, starts, agent.config.horizon, generator)
            _back(found.entropy.sum() + sum(x.sum() for state in found.states for x in state))

    return {
        "encoder": lambda: _back(encoder.encode(patches).sum()),
        "scan": scan,
        "decoder": lambda: _back(squared_error(decoder(states.deter, states.stoch), patches).sum()),
        "imagination": imagination,
        "heads": lambda: _heads(agent, states, data, imagined),
        "optimiser": lambda: _steps(learner),
    }


def _heads(agent: Agent, states: State, data: TensorBatch, imagined: list[State]) -> None:
    """Reward head on what was inferred; reward head and slow critic on what was imagined; the critic's loss."""
    _back(agent.reward_loss(states, data)[0])
    steps = [State(*(x.detach().requires_grad_() for x in state)) for state in imagined]
    with frozen(agent.reward):
        reward = torch.stack([agent.reward.value(s) for s in steps[:-1]])
        value = torch.stack([agent.slow_critic.value(s) for s in steps[1:]])
        _back(reward.sum() + value.sum())
    returns = value.detach()
    left = Imagination([s.detach() for s in steps[:-1]], returns, torch.ones_like(returns))
    _back(agent.critic_loss(left)[0])


def _steps(learner: FineTuner) -> None:
    for optimiser in learner._optimisers.values():
        weights = list(optimiser.parameters.values())
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(weights, 100.0, norm)
        optimiser._adam.step()
    learner.agent.update_slow_critic()


def _back(value: Tensor) -> None:
    value.backward()


def gigaflops(call: Callable[[], object]) -> float:
    """Of matrix products and convolutions in one call, in units of 10⁹."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def gemm_rate(size: int = 1024, rounds: int = 30) -> float:
    """The best rate of a float32 matrix product in 10⁹ operations a second: no arrangement of an update beats it."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9
