"""The processes of `torch.distributed`, for whoever uses InfoBatch without the trainers."""

import os
from collections.abc import Sequence
from typing import Any

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
    return _reduced(table, torch.distributed.ReduceOp.MAX)


def total(table: Tensor) -> Tensor:
    """The element-wise sum over all processes, if there are several; all of them must call it."""
    return _reduced(table, torch.distributed.ReduceOp.SUM)


def _reduced(table: Tensor, by: Any) -> Tensor:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return table
    shared = table.cuda() if torch.distributed.get_backend() == "nccl" else table
    torch.distributed.all_reduce(shared, op=by)
    return shared.to(table.device)


def gathered(columns: Sequence[Tensor]) -> list[Tensor]:
    """Tensors whose rows are those of all processes, by rank, on the CPU; all of them must call it.

    Args:
        columns: of one shape beyond the rows on every process; a process that has no rows may give none.
    """
    columns = [column.detach().cpu() for column in columns]
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return columns
    shapes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shapes, [(tuple(column.shape), column.dtype) for column in columns])
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = []
    for number, (shape, dtype) in enumerate(max(shapes, key=len)):
        rows = [each[number][0][0] if each else 0 for each in shapes]
        padded = torch.zeros(max(rows), *shape[1:], dtype=dtype, device=device)  # gloo gathers equal shapes alone
        if columns:
            padded[: len(columns[number])] = columns[number].to(device)
        every = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(every, padded)
        found.append(torch.cat([part[:count].cpu() for part, count in zip(every, rows, strict=True)]))
    return found
