"""A check that all processes of a launch were started alike; otherwise they hang, or train on in silence."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.distributed.collectives import all_gather_set, all_reduce_max, rank_and_world_size

SHOWN = 3  # differing settings that the message names


def require_same_settings(settings: Mapping[str, Any]) -> None:
    """Compare the settings of all processes; all of them must call it before any other collective.

    The content of files that settings name (code, initial weights) and the version of this package are compared, too.

    Args:
        settings: by the names that the message is to have.

    Raises:
        UserError: a process differs from rank 0; on all processes.
    """
    rank, world = rank_and_world_size()
    if world == 1:
        return
    own = {name: _described(value) for name, value in settings.items()}
    own["the version of infobatch-pretrain"] = __version__
    entries = all_gather_set({(rank, name, value) for name, value in own.items()})
    by_rank: list[dict[str, str]] = [{} for _ in range(world)]
    for number, name, value in entries:
        by_rank[number][name] = value
    for number, theirs in enumerate(by_rank):
        differing = sorted(n for n in theirs.keys() | by_rank[0].keys() if theirs.get(n) != by_rank[0].get(n))
        if differing:
            shown = ", ".join(
                f"{name} is {by_rank[0].get(name, 'not there')} on rank 0 and {theirs.get(name, 'not there')} on rank "
                f"{number}"
                for name in differing[:SHOWN]
            )
            more = f" (and {len(differing) - SHOWN} more)" if len(differing) > SHOWN else ""
            raise UserError(f"the processes were started differently: {shown}{more}; start all with the same command")


def _described(value: Any) -> str:
    """The value and, if it names a file, the hash of the file's content."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, str) and "\0" not in value and len(value) < 1024 and expand(value).is_file():
        with expand(value).open("rb") as file:
            return f"{value} (SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"
    return repr(value)


def require_same_data(name: str, marks: Tensor, kind: str = "training images") -> int | None:
    """Compare the data of all processes; all of them must call it.

    Args:
        name: of the data set, for the message.
        marks: int32 [N]; a hash of each sample.
        kind: what the samples are, for the message.

    Returns:
        The first sample that is not the same on all processes; None if there is none.

    Raises:
        UserError: the processes have different numbers of samples; on all processes.
    """
    rank, world = rank_and_world_size()
    if world == 1:
        return None
    counts = dict(all_gather_set({(rank, len(marks))}))
    for number in range(world):
        if counts[number] != counts[0]:
            raise UserError(
                f"the processes have different data: --data {name} has {counts[0]:,} {kind} on rank 0 and "
                f"{counts[number]:,} on rank {number}; give all processes the same data"
            )
    largest, smallest = all_reduce_max(marks.long()), -all_reduce_max(-marks.long())
    differing = torch.nonzero(largest != smallest).flatten()
    return int(differing[0]) if len(differing) else None
