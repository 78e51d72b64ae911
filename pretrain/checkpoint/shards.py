"""Sharded tensors in one safetensors file per process, by torch's distributed checkpoint; nothing is unpickled."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Groups = dict[str, dict[str, Tensor]]  # tensors by file of a checkpoint, and name


def files(folder: Path) -> list[Path]:
    """The files of sharded tensors in a folder."""
    return sorted(folder.glob("shard-*.safetensors"))


def write(folder: Path, groups: Groups) -> None:
    """Write sharded tensors, and whole ones that all ranks have; all ranks call it.

    Raises:
        OSError: they can't be written, on any rank.
    """
    tensors = {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {' '.join(str(failure).split())[:300]}") from None


def describe(folder: Path) -> Groups:
    """The tensors of `write`, on the meta device."""
    groups: Groups = {}
    for path, about in dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        group, slash, name = path.partition("/")
        if slash and isinstance(about, TensorStorageMetadata):
            dtype = about.properties.dtype
            groups.setdefault(group, {})[name] = torch.empty(about.size, dtype=dtype, device="meta")
    return groups


def read(folder: Path, group: str, tensors: Mapping[str, Tensor]) -> None:
    """Read a group into tensors, each of which is whole or sharded, over any number of processes."""
    wanted = {f"{group}/{name}": value for name, value in tensors.items()}
    with _alone():
        dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that ranks don't communicate: each reads what it needs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
