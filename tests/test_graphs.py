"""An update whose parts are recorded and replayed, against one without. The recording's twin runs anywhere: it does
what a CUDA graph does, the same computation onto the same memory."""

import logging

import numpy as np
import pytest
import torch

from gsa.errors import Unavailable
from learner.finetune import FineTuner
from learner.graphs import WARM_UP, Graphs, Recording
from tests.test_learner import BEHAVIOUR, changed, dot_batch, tuner, weights


class Twin(Recording):
    def _record(self, run, generator):
        self._again = run
        return run()

    def _replay(self):
        (loss, left, watched), (new_loss, new_left, new_watched) = self.result, self._again()
        for kept, new in zip(tensors((loss, left, watched)), tensors((new_loss, new_left, new_watched)), strict=True):
            kept.copy_(new)
        for parameter, gradient in self._gradients.items():
            gradient.copy_(parameter.grad)


class Forgetful(Twin):
    """Replays the first loss for ever."""

    def _replay(self):
        self.result[0].mul_(2.0).add_(1.0)


class Refusing(Twin):
    def _record(self, run, generator):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value or ()
    return [tensor for each in values for tensor in tensors(each)]


def recorded(recording, compile="auto") -> FineTuner:
    learner = tuner(behaviour=BEHAVIOUR)
    learner._graphs = Graphs(learner.device, compile, recording, on=True)
    return learner


def batches():
    """Enough to warm up, record and replay, with some that fit no recording; the first ones without any reward."""
    plain = [dot_batch(n, online=3 if n > WARM_UP else 0) for n in range(WARM_UP + 5)]
    short, torn = dot_batch(50, t=5), dot_batch(51)
    torn.valid[0, 5:] = False
    return [*plain[: WARM_UP + 2], short, plain[WARM_UP + 2], torn, *plain[WARM_UP + 3 :]]


def run(learner):
    return [learner.update(batch) for batch in batches()]


def test_replayed_updates_equal_plain_ones_bit_for_bit():
    plain, replaying = tuner(behaviour=BEHAVIOUR), recorded(Twin)
    assert run(replaying) == run(plain)
    assert changed(weights(plain.agent), replaying.agent) == set()
    assert set(replaying._graphs._recordings) == {"world_model", "reward", "actor", "critic"}


@pytest.mark.parametrize(("recording", "why"), [(Refusing, "not permitted"), (Forgetful, "without it")])
def test_what_cannot_be_recorded_or_differs_is_left_with_one_warning(recording, why, caplog):
    plain, giving_up = tuner(behaviour=BEHAVIOUR), recorded(recording)
    with caplog.at_level(logging.WARNING):
        found = run(giving_up)
    assert found == run(plain)
    assert [why in r.getMessage() for r in caplog.records] == [True]
    assert "\n" not in caplog.text.strip()


def test_who_insists_on_graphs_is_told_why_there_are_none():
    with pytest.raises(Unavailable, match="cannot run as a CUDA graph: operation not permitted"):
        run(recorded(Refusing, "on"))


def test_on_a_cpu_and_where_they_are_off_nothing_is_recorded():
    assert not Graphs(torch.device("cpu"), "auto")._on
    assert not Graphs(torch.device("cuda"), "off")._on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: CUDA graphs are not run")
def test_cuda_graphs_give_what_the_same_update_gives_without():
    import dataclasses

    from learner.config import ComputeConfig

    found = []
    for compile in ("off", "on"):
        learner = tuner(behaviour=dataclasses.replace(BEHAVIOUR, imagination_starts=5),
                        compute=ComputeConfig("cuda", "float32", compile=compile))  # fmt: skip
        found.append([metrics["world_model_loss"] for metrics in run(learner)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)
