"""Optimizers, and the learning rate over progress."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.config.schema import Optim
from pretrain.distributed.sharding import local, repeated_blocks, slices_of_matrices, whole_matrices

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the polynomial a x + b x^3 + c x^5
ITERATIONS = 5
MOMENTUM = 0.95


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """The optimizer of the trainable parameters.

    With `name` "muon" the weights of `hidden_matrices` take Muon's steps and all other parameters AdamW's. Vectors,
    such as biases and the scales of norms, have no weight decay.

    Args:
        model: the network, in the adapter's module if that has parameters.
        optim: settings; the learning rate is set before every step.
    """
    matrices = [*hidden_matrices(model)] if optim.name == "muon" else []
    chosen = {id(parameter) for parameter in matrices}
    vectors = [name for name, parameter in model.named_parameters() if sum(side > 1 for side in parameter.shape) <= 1]
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=vectors)
    settings: Any = {"lr": optim.lr, "betas": optim.betas, "fused": True}
    if matrices:
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            group["muon"] = False
        groups.append({"params": matrices, "weight_decay": optim.weight_decay, "muon": True})
    optimizer = (Muon if matrices else torch.optim.AdamW)(groups, **settings)
    # A GradScaler would leave it to a fused step to divide the gradients and to skip those that overflow; not Muon's.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def hidden_matrices(model: nn.Module) -> Iterator[Tensor]:
    """Weights of linear layers and convolutions inside the network's repeated blocks.

    See `repeated_blocks`. Not among them are the first and last layers, embeddings, depthwise convolutions, and
    matrices with fewer than 4 rows or columns.
    """
    inside = {id(module): module for block in repeated_blocks(model) for module in block.modules()}
    for module in inside.values():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        weight = module.weight
        if weight.requires_grad and min(_sides(weight)) >= 4 and weight.shape[1] > 1:
            yield weight


def _sides(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix."""
    return weight.shape[0], weight.shape[1:].numel()


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the groups with ``muon=True`` (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

    The momentum of a matrix is replaced by its nearest semi-orthogonal matrix, approximately, by a Newton-Schulz
    iteration. The step is scaled by 0.2 sqrt(max(rows, columns)), so that an update is as large as AdamW's (Liu et al.
    2025, "Muon is scalable for LLM training", section 2.2); its best learning rate was 0.4 to 5 times AdamW's best one
    on our benches. A convolution is a matrix [out, in * kernel]. timm and torch have Muon, too, but iterate in bfloat16
    on every device, which is 15 times slower on a CPU, and one matrix at a time.

    Of sharded parameters each process iterates some of the matrices, which are exchanged before and after it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; the gradients of Muon's parameters are None afterwards."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return super().step(closure)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        same_shape: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                same_shape[_sides(parameter)].append(parameter)
        for (rows, columns), parameters in same_shape.items():
            updates = [self._momentum(parameter).reshape(-1, columns) for parameter in parameters]
            if isinstance(first := parameters[0], DTensor):
                mine = orthogonalized(whole_matrices(updates, (rows, columns), first.device_mesh))
                steps = slices_of_matrices(mine, len(parameters), first.device_mesh)
            else:
                steps = orthogonalized(torch.stack(updates))
            scale = -group["lr"] * 0.2 * math.sqrt(max(rows, columns))
            for parameter, step in zip(map(local, parameters), steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step.view_as(parameter).to(parameter.dtype), alpha=scale)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Update a parameter's momentum by its gradient, which is used up; return Nesterov's momentum (its slice)."""
        state, gradient = self.state[parameter], local(parameter.grad)  # pyright: ignore[reportArgumentType]
        if not state:
            state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(parameter))  # AdamW expects `step`
        state["step"] += 1
        momentum = local(state["momentum"]).lerp_(gradient, 1 - MOMENTUM)
        parameter.grad = None  # so that AdamW's step leaves it alone
        return gradient.lerp(momentum, MOMENTUM)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximately U V^T for each matrix U S V^T, float [B, m, n]; singular values end between 0.7 and 1.2.

    In bfloat16 on an accelerator, in float32 on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    if transposed := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def step_flops(model: nn.Module, optim: Optim) -> int:
    """FLOPs of one optimizer step's matrix products: 5 (4 m^2 n + 2 m^3) for each m x n matrix of Muon, m <= n."""
    if optim.name == "adamw":
        return 0
    sides = [sorted(_sides(weight)) for weight in hidden_matrices(model)]
    return sum(ITERATIONS * (4 * m**2 * n + 2 * m**3) for m, n in sides)


def steps_in_epoch(samples: int, batch_size: int) -> int:
    """Optimizer steps of an epoch; less than half a batch at its end joins the step before it (`micro_batches`)."""
    return max(1, (2 * samples + batch_size) // (2 * batch_size))


def warmup_cosine(progress: float, warmup: float) -> float:
    """Factor of the peak learning rate: a linear rise from 0 to 1, then a cosine decay to 0.

    Args:
        progress: of the training, in [0, 1].
        warmup: share of the training in which it rises, in [0, 1).
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
