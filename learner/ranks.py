"""Several processes that train one model together: equal weights in all, each on its share of every batch.

They are what torchrun starts, or `gsa pretrain --processes`; both say by RANK, WORLD_SIZE and LOCAL_RANK who is who.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gsa.errors import Unavailable, UsageError
from learner.config import ComputeConfig

RENDEZVOUS = "GSA_RENDEZVOUS"  # where the processes find each other, as torch.distributed names it; else MASTER_ADDR
BUCKET = 1 << 24  # numbers that are added up at a time: a second copy of all gradients would cost memory


class Ranks:
    """Owns this process's place among `size` of them. Rank 0 writes; a process alone is rank 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, compute: ComputeConfig, deadline_s: float) -> Ranks:
        """Joins the processes that the environment tells of. Raises Unavailable where they do not come together."""
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if size == 1:
            return cls()
        gpu = compute.device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        try:
            dist.init_process_group(
                "nccl" if gpu else "gloo", os.environ.get(RENDEZVOUS, "env://"), world_size=size, rank=rank,
                timeout=datetime.timedelta(seconds=deadline_s),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise Unavailable(f"Process {rank} of {size} did not find the others: {_short(error)}.") from None
        return cls(rank, size)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, the same bits in each.

        Raises Unavailable where a process is gone, or does not answer within the deadline.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                raise Unavailable(
                    f"Process {self.rank} of {self.size} lost another one, or had no answer in time: {_short(error)}. "
                    "Start all again: they go on from the last checkpoint."
                ) from None
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def require_same(self, what: str, value: int, device: torch.device) -> None:
        """Raises UsageError unless all processes have the same number."""
        values = torch.zeros(self.size, dtype=torch.float64, device=device)
        values[self.rank] = value
        self.add_up([values])
        if len(set(values.tolist())) > 1:
            raise UsageError(
                f"The processes disagree about {what}: {', '.join(f'{v:.0f}' for v in values.tolist())}. "
                "All of them need the same store and the same output folder."
            )

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """In order, of one dtype each, and not much more than BUCKET numbers."""
    buckets: list[list[Tensor]] = []
    room, dtype = 0, None
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.numel() > room:
            buckets.append([])
            room, dtype = BUCKET, tensor.dtype
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
