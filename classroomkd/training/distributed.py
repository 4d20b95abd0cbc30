"""Train one network in several processes, started by torchrun."""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, its defaults would hold the group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from classroomkd.errors import UserError

# Each process keeps its own batch norm statistics; newer versions of torch renamed the option.
_OWN_BUFFERS: dict[str, Any] = {
    next(
        name
        for name in ("forward_sync_buffers", "broadcast_buffers")
        if name in inspect.signature(DistributedDataParallel).parameters
    ): False
}

# Networks that hold the process group.
_wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


class Processes:
    """The processes of a run, including this one; without torchrun, only this one.

    The constructor reads the environment set by torchrun and joins the process group: NCCL if
    ``device`` is a GPU, else gloo. All processes need the same files at the same paths.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.together and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)

    @property
    def together(self) -> bool:
        """Whether there are several processes."""
        return self.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def place(self) -> dict[str, int]:
        """The rank and the number of processes, as arguments of a loader."""
        return {"rank": self.rank, "world_size": self.world_size}

    def share(self, batch_size: int) -> int:
        """Images of a batch per process; raises UserError if it cannot be divided evenly."""
        part, rest = divmod(batch_size, self.world_size)
        if rest:
            raise UserError(
                f"a batch of {batch_size} cannot be divided evenly among {self.world_size} "
                "processes: choose another batch size"
            )
        return part

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes."""
        if not self.together:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(network, device_ids=ids, **_OWN_BUFFERS)
        _wrapped.add(wrapped)
        return wrapped

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of parameters outside the network that `wrap` returned."""
        if self.together:
            for parameter in parameters:
                assert parameter.grad is not None  # the loss depends on all of them
                dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
                parameter.grad.div_(self.world_size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in place."""
        if self.together:
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """The ``value`` of the main process. The host waits."""
        if not self.together:
            return value
        box = [value if self.is_main else None]
        device = self.device if self.device.type == "cuda" else None
        dist.broadcast_object_list(box, src=0, device=device)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process. The host waits."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def align(self, network: nn.Module) -> None:
        """Copy the main process's buffers to all, because each updates its own in batch norms."""
        if self.together:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.together:
            dist.barrier()


def _leave() -> None:
    """Leave the group when the process ends.

    Gloo's threads need the GIL to free tensors after an exchange, and a thread that requests it
    while Python finalizes aborts the process. They end with the last reference to the group.
    """
    for network in _wrapped:
        del network.reducer, network.logger, network.process_group
    gc.collect()
    dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU that torchrun assigns to this process; raises UserError if there is none."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise UserError(f"torchrun chooses the GPU of each process: leave out device {device}")
        if index >= count:
            raise UserError(f"process {index} of this machine has no GPU: there are {count}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
