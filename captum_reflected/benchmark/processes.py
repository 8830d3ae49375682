"""The processes that share a run: one, or those that torchrun started on one node or many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The fastest process waits for the slowest at the end, however long its share takes.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run.

    Attributes:
        rank: its number.
        count: how many there are.
        local_rank: its number on this node, which picks its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """What the first process says, in every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process says, in every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def started_processes() -> Processes:
    """What torchrun's environment says; one process where it says nothing."""
    return Processes(
        rank=int(os.environ.get("RANK", 0)),
        count=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


@contextmanager
def connected(processes: Processes, device: torch.device) -> Iterator[None]:
    """Lets the processes speak to each other: gloo on CPUs, nccl on GPUs."""
    if processes.count == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
