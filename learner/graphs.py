"""The parts of an update as CUDA graphs: each recorded once, then replayed by one launch instead of thousands.

A graph reads and writes the same memory every time, so batches are copied to where the recorded one lay. Before a graph
is used, its loss and gradient are compared with those of the same part without it. Where recording fails or they
differ, everything goes on without graphs, as it does for batches of another shape or with rows that are not valid.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from gsa.agent.world_model import TensorBatch
from gsa.errors import Unavailable
from learner.optimiser import Optimiser

Result = tuple[Tensor, Any, dict[str, Tensor]]  # a loss, what is left for the next parts, what to watch
Part = Callable[[], Result]
WARM_UP = 3  # updates before anything is recorded: libraries choose their kernels in the first
TOLERANCE = 1e-3  # relative, of loss and gradient norm: GPUs add up in an order that changes
_log = logging.getLogger(__name__)


class Recording:
    """A part and its backward pass, recorded. What it computes stays at the same place: loss, metrics, gradients."""

    def __init__(self, part: Part, optimiser: Optimiser, generator: torch.Generator) -> None:
        """Raises RuntimeError where it cannot be recorded or does not give what the part gives."""
        self._optimiser, before = optimiser, generator.get_state()
        expected = self._sizes(_run(part, optimiser)[0])
        optimiser.clear()
        generator.set_state(before)
        self.result = self._record(lambda: _run(part, optimiser), generator)
        self._gradients = {p: p.grad for p in optimiser.parameters.values()}
        optimiser.clear()
        generator.set_state(before)
        found = self._sizes(self.replay()[0])
        if not torch.allclose(found, expected, rtol=TOLERANCE, atol=1e-6):
            raise RuntimeError(f"loss and gradient norm are {found.tolist()}, without it {expected.tolist()}")

    def replay(self) -> Result:
        """Computes loss, what is left, metrics and gradients anew."""
        self._replay()
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        return self.result

    def _record(self, run: Part, generator: torch.Generator) -> Result:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others may allocate meanwhile
            return run()

    def _replay(self) -> None:
        self._graph.replay()

    def _sizes(self, loss: Tensor) -> Tensor:
        gradients = [p.grad for p in self._optimiser.parameters.values() if p.grad is not None]
        return torch.stack([loss.float(), torch.nn.utils.get_total_norm(gradients).float()])


class Graphs:
    """Owns the recordings of an update's parts and the memory that they read the batch from."""

    def __init__(
        self, device: torch.device, compile: Literal["auto", "on", "off"], recording: type[Recording] = Recording,
        on: bool | None = None,
    ) -> None:  # fmt: skip
        """With `compile` "on" what fails to be recorded is Unavailable. `on`: whether to record; default: on a GPU."""
        self.device, self._strict, self._recording = device, compile == "on", recording
        self._on = compile != "off" and (device.type == "cuda" if on is None else on)
        self._data: TensorBatch | None = None
        self._recordings: dict[str, Recording] = {}
        self._fits, self._seen = False, 0

    def load(self, batch: Any) -> TensorBatch:
        """A schema.Batch on the device: where the recordings read it, if it is like the one they were made with."""
        fresh = TensorBatch.from_batch(batch, self.device)
        self._fits = self._on and fresh.whole and (self._data is None or _shapes(fresh) == _shapes(self._data))
        if not self._fits:
            return fresh
        self._seen += 1
        if self._data is None:
            self._data = copy.deepcopy(fresh)
        for kept, new in zip(self._data.tensors(), fresh.tensors(), strict=True):
            kept.copy_(new)
        return self._data

    def run(self, name: str, part: Part, optimiser: Optimiser, generator: torch.Generator) -> Result:
        """What the part gives, detached; its gradients are left in the optimiser's weights."""
        if self._on and self._fits and self._seen > WARM_UP:
            before = generator.get_state()
            try:
                if name in self._recordings:
                    return self._recordings[name].replay()
                self._recordings[name] = self._recording(part, optimiser, generator)
                return self._recordings[name].result
            except RuntimeError as error:
                self._give_up(name, error)
                optimiser.clear()
                generator.set_state(before)
        return _run(part, optimiser)

    def _give_up(self, name: str, error: RuntimeError) -> None:
        sentence = f"The {name} part of the update cannot run as a CUDA graph: {str(error).splitlines()[0]:.200}."
        if self._strict:
            raise Unavailable(f"{sentence} Take compile 'auto' or 'off'.") from error
        _log.warning("%s The training goes on without graphs, which is slower.", sentence)
        self._on = False
        self._recordings.clear()


def _run(part: Part, optimiser: Optimiser) -> Result:
    loss, left, watched = part()
    optimiser.backward(loss)
    return loss.detach(), left, watched


def _shapes(data: TensorBatch) -> list[torch.Size]:
    return [x.shape for x in data.tensors()]
