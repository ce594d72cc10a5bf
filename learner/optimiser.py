"""Adam as the method uses it: one clip by the global norm, one decay of the weights, no step on a broken gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gsa.errors import FormatError, GsaError
from learner.config import OptimiserConfig

AddUp = Callable[[Sequence[Tensor]], None]


class Optimiser:
    """Owns the moments of one module's weights, and of no other's: a loss that runs through a second module
    (the actor's runs through the world model) leaves that module's gradients alone.

    A step is w ← (1 − decay)·w, then Adam on the clipped gradient. A gradient that is not finite is skipped and
    counted; `max_skips` in a row end the training.
    """

    def __init__(
        self, name: str, parameters: Iterable[tuple[str, Tensor]], config: OptimiserConfig, add_up: AddUp | None = None
    ) -> None:
        """`add_up` adds to gradients and loss, in place, what other processes made of their share of the batch."""
        self.name, self.config, self._add_up = name, config, add_up
        self.parameters = {key: p for key, p in parameters if p.requires_grad}
        self.steps = self.skips = self._skips_in_a_row = 0
        # AdamW multiplies the weights by 1 − lr·weight_decay, inside the one fused pass over them.
        self._adam = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.learning_rate, betas=(0.9, 0.999), eps=config.epsilon,
            weight_decay=config.weight_decay / config.learning_rate, fused=True,
        )  # fmt: skip
        for parameter in self.parameters.values():
            self._adam.state[parameter] = _fresh_moments(parameter)

    def step(self, loss: Tensor) -> dict[str, float]:
        """Descends `loss` (a scalar) by one step: `backward` and `apply`."""
        self.backward(loss)
        return self.apply(loss)

    def backward(self, loss: Tensor) -> None:
        """Leaves the loss's gradients in these weights."""
        # backward(inputs=…) and not autograd.grad: it lays a gradient out like its weight, as the fused pass expects.
        torch.autograd.backward(loss, inputs=list(self.parameters.values()))

    def clear(self) -> None:
        """Forgets the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def apply(self, loss: Tensor) -> dict[str, float]:
        """One step by the gradients that are there, which are then gone; returns {name}_loss and {name}_grad_norm
        (before the clip). Raises GsaError after `max_skips` broken gradients in a row."""
        weights = list(self.parameters.values())
        gradients, value = [p.grad for p in weights if p.grad is not None], loss.detach().float()
        if self._add_up is not None:
            self._add_up([*gradients, value])
        norm = torch.nn.utils.get_total_norm(gradients)
        values = torch.stack((value, norm.float())).tolist()  # one wait for the device
        metrics = {f"{self.name}_loss": values[0], f"{self.name}_grad_norm": values[1]}
        if all(map(_finite, values)):
            torch.nn.utils.clip_grads_with_norm_(weights, self.config.clip_norm, norm)
            self._adam.step()
            self.steps, self._skips_in_a_row = self.steps + 1, 0
        else:
            self._skip(metrics)
        self.clear()
        return metrics

    def _skip(self, metrics: Mapping[str, float]) -> None:
        self.skips += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row >= self.config.max_skips:
            values = ", ".join(f"{k} {v:g}" for k, v in metrics.items())
            raise GsaError(
                f"The {self.name} training has diverged: {self._skips_in_a_row} updates in a row without a finite "
                f"gradient ({values}). Resume from an earlier checkpoint with a lower learning rate, or in float32."
            )

    def state(self) -> dict[str, Any]:
        """All that continues the optimiser exactly. The tensors are the live ones: copy or save them at once."""
        moments = {key: dict(self._adam.state[p]) for key, p in self.parameters.items()}
        return {
            "moments": moments, "steps": self.steps, "skips": self.skips, "skips_in_a_row": self._skips_in_a_row,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. Raises FormatError where it is of other weights than these."""
        moments = state["moments"]
        if set(moments) != set(self.parameters):
            different = sorted(set(moments) ^ set(self.parameters))
            raise FormatError(
                f"The {self.name} optimiser's state is of another model: {', '.join(different[:3])} "
                f"{'is' if len(different) == 1 else 'are'} on one side only."
            )
        for key, parameter in self.parameters.items():
            for name, own in self._adam.state[parameter].items():
                copy_exactly(own, moments[key][name], f"{self.name} optimiser, {key}.{name}")
        self.steps, self.skips = int(state["steps"]), int(state["skips"])
        self._skips_in_a_row = int(state["skips_in_a_row"])


def copy_exactly(target: Tensor, source: Tensor, where: str) -> None:
    """Copies the values; raises FormatError where shape or dtype differ, as a cast or broadcast would hide."""
    if source.shape != target.shape or source.dtype != target.dtype:
        raise FormatError(
            f"{where} is {source.dtype} {list(source.shape)} in the checkpoint and {target.dtype} "
            f"{list(target.shape)} in this model: use the checkpoint's own config."
        )
    with torch.no_grad():
        target.copy_(source)


def _fresh_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state before its first step, made at once so that state() is complete before it too."""
    zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone(memory_format=torch.preserve_format)}


def _finite(value: float) -> bool:
    return value - value == 0.0
