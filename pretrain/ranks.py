"""The processes of `torch.distributed`, for whoever uses InfoBatch without the trainers."""

import os

import torch
import torch.distributed
from torch import Tensor


def place() -> tuple[int, int]:
    """This process's rank and the number of processes.

    Raises:
        ValueError: there are several that don't know of each other yet.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"this is one of {os.environ['WORLD_SIZE']} processes that don't know of each other yet; make InfoBatch "
            "after torch.distributed.init_process_group, or say which it is with rank and world"
        )
    return 0, 1


def maximum(table: Tensor) -> Tensor:
    """The element-wise maximum over all processes, if there are several; all of them must call it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return table
    shared = table.cuda() if torch.distributed.get_backend() == "nccl" else table
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return shared.to(table.device)
