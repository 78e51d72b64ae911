"""Collectives of `torch.distributed`; with a single process they return their argument."""

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from pretrain.core.errors import UserError

T = TypeVar("T", bound=Hashable)


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes.

    Raises:
        ValueError: a launcher started several processes and the process group is not initialized yet.
    """
    if _initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"this is one of {os.environ['WORLD_SIZE']} processes and the process group is not initialized; make "
            "InfoBatch after torch.distributed.init_process_group, or pass rank and world"
        )
    return 0, 1


def all_reduce_max(table: Tensor) -> Tensor:
    """The element-wise maximum of a tensor over all ranks, on its device; all ranks must call it."""
    return _all_reduce(table, torch.distributed.ReduceOp.MAX)


def all_reduce_sum(table: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all ranks, on its device; all ranks must call it."""
    return _all_reduce(table, torch.distributed.ReduceOp.SUM)


def _all_reduce(table: Tensor, operation: Any) -> Tensor:
    if not _initialized():
        return table
    shared = table.cuda() if torch.distributed.get_backend() == "nccl" else table
    torch.distributed.all_reduce(shared, op=operation)
    return shared.to(table.device)


def max_over_ranks(*numbers: int) -> list[int]:
    """The maximum of each number over all ranks; all ranks must call it."""
    return all_reduce_max(torch.tensor(numbers)).tolist()


def _all_gather_object(item: Any) -> list[Any]:
    """The objects of all ranks, by rank; all ranks must call it."""
    if not _initialized():
        return [item]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, item)
    return found


def all_gather_set(items: set[T]) -> set[T]:
    """The union of the sets of all ranks; all ranks must call it."""
    return set().union(*_all_gather_object(items))


def all_gather_rows(columns: Sequence[Tensor]) -> list[Tensor]:
    """Concatenate tensors of all ranks along their first axis; all ranks must call it.

    Args:
        columns: [rows, ...]; the number of rows may differ between ranks, the other axes and the dtype may not. A rank
            without rows may pass an empty sequence.

    Returns:
        For each column its rows of all ranks, by rank, on the CPU.
    """
    columns = [column.detach().cpu() for column in columns]
    if not _initialized():
        return columns
    shapes = _all_gather_object([(tuple(column.shape), column.dtype) for column in columns])
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = []
    for number, (shape, dtype) in enumerate(max(shapes, key=len)):
        rows = [each[number][0][0] if each else 0 for each in shapes]
        padded = torch.zeros(max(rows), *shape[1:], dtype=dtype, device=device)  # gloo gathers equal shapes only
        if columns:
            padded[: len(columns[number])] = columns[number].to(device)
        every = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(every, padded)
        found.append(torch.cat([part[:count].cpu() for part, count in zip(every, rows, strict=True)]))
    return found


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A context: if a rank raises a `UserError` in it, all ranks raise one at its end, with the lowest rank's message.

    So no rank waits in a collective for one that has failed. All ranks must enter it; the code in it must not
    communicate.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if rank_and_world_size()[1] == 1:
        if error is not None:
            raise error
    elif max_over_ranks(int(error is not None))[0]:
        messages = [message for message in _all_gather_object(str(error) if error else "") if message]
        raise UserError(messages[0]) from error
