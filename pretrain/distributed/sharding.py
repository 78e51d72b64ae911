"""Parameters that are split over the processes: fully sharded data parallel, torch's `fully_shard` (FSDP2).

Each process holds a slice of every parameter, along its first dimension, and of its gradient, its moments and its EMA.
A repeated block of the network is gathered while it computes.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pretrain.core.errors import UserError


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks: numbered children (of a ModuleList or Sequential) that have children, too."""
    for name, module in model.named_children():
        if name.isdigit() and [*module.children()]:
            yield module
        else:
            yield from repeated_blocks(module)


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a network over all processes, in place; all of them call it, with the same network.

    Args:
        model: the bare network; its parameters become `DTensor`s.
        device: of this process.

    Raises:
        UserError: the network has a parameter without dimensions, which can't be sharded.
    """
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise UserError(
            f"--shard: the parameter {scalars[0]} of the network has no dimension to be split along; give it the shape "
            "(1,), or leave --shard out"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in repeated_blocks(model):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_like(model: nn.Module, sharded: nn.Module) -> None:
    """Replace each parameter of a network by its slice, as the same parameter of a sharded copy of it has.

    The network then only stores parameters; `gathered` makes one that computes.
    """
    layout = dict(sharded.named_parameters())
    for path, module in [*model.named_modules()]:
        for name, parameter in [*module.named_parameters(path, recurse=False)]:
            local = nn.Parameter(place(parameter.detach(), layout[name]), parameter.requires_grad)
            setattr(module, name.rpartition(".")[2], local)


def place(whole: Tensor, like: Tensor) -> Tensor:
    """This process's slice of a tensor as a DTensor, in the layout of `like`; the tensor, if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one, gathered from all processes, which all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a sharded tensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a network has sharded parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(model: nn.Module) -> nn.Module:
    """The network; if it was sharded by `shard_like`, a copy of it with whole parameters. All processes call it."""
    if not is_sharded(model):
        return model
    whole = {id(one): nn.Parameter(full(one.detach()), one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, whole)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A network's `state_dict` with whole tensors; of a sharded one, on the CPU. All processes call it."""
    return {
        name: full(value).cpu() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }


def whole_matrices(slices: Sequence[Tensor], shape: tuple[int, int], mesh: DeviceMesh) -> Tensor:
    """Exchange slices of B matrices between the processes, so that each process has some of the matrices whole.

    Args:
        slices: this process's rows of each of the B matrices.
        shape: (rows, columns) of a matrix.
        mesh: of the processes.

    Returns:
        [B', rows, columns]; B' is about B over the number of processes, and may be 0.
    """
    stack = DTensor.from_local(
        torch.stack([*slices]), mesh, [Shard(1)], shape=torch.Size((len(slices), *shape)), stride=_stride(shape)
    )
    return stack.redistribute(placements=[Shard(0)]).to_local()


def slices_of_matrices(matrices: Tensor, count: int, mesh: DeviceMesh) -> Tensor:
    """The inverse of `whole_matrices`: this process's rows of all `count` matrices, [count, its rows, columns]."""
    shape = (matrices.shape[1], matrices.shape[2])
    stack = DTensor.from_local(matrices, mesh, [Shard(0)], shape=torch.Size((count, *shape)), stride=_stride(shape))
    return stack.redistribute(placements=[Shard(1)]).to_local()


def _stride(shape: tuple[int, int]) -> tuple[int, int, int]:
    return (shape[0] * shape[1], shape[1], 1)
