"""Building blocks of nm.py: N:M masks and their gradient, the layers that have them, and what selects a choice."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

DECAY = 2e-4  # of masked weights (Zhou et al., 2021)


def nm_mask(weight: Tensor, keep: int, group: int) -> Tensor:
    """Mark the `keep` largest absolute values of every `group` weights along the input dimension.

    Masks of one weight are nested: that of a smaller `keep` lies inside that of a larger one. Of equal values those
    that come first are kept.

    Args:
        weight: float [out, in, ...]; `group` divides in.
        keep: N.
        group: M.

    Returns:
        bool, of the weight's shape.
    """
    grouped = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, group))
    rank = grouped.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < keep).flatten(-2).movedim(-1, 1)


class MaskedWeight(torch.autograd.Function):
    """weight * mask, with the gradient of SR-STE.

    The gradient of the product passes to all weights (straight through), and masked weights decay:
    dL/dW = dL/d(W * mask) + `DECAY` (1 - mask) W (Zhou et al., "Learning N:M fine-grained structured sparse neural
    networks from scratch", 2021).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient + DECAY * weight.masked_fill(mask, 0), None


def inner_layers(network: nn.Module, group: int) -> dict[str, nn.Module]:
    """Linear layers and convolutions inside the network's repeated blocks whose input channels `group` divides.

    A repeated block is a numbered child (of a ModuleList or Sequential) that has children itself. So the first and last
    layers, norms and embeddings are not among them.
    """
    found = {}
    for path, module in network.named_modules():
        in_block = any(name.isdigit() for name in path.split(".")[:-1])
        if in_block and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and module.weight.shape[1] % group == 0:
            found[path] = module
    return found


def shares_of_budget(costs: Sequence[float], budget: float) -> list[float]:
    """Shares of the choices: of those whose mean cost is the budget, the ones of largest entropy, p ~ exp(s cost).

    Args:
        costs: of each choice.
        budget: between the smallest and the largest; ignored for one choice.
    """
    low, high = -1e4, 1e4
    weights = [1.0]
    for _ in range(100):  # bisection: the mean cost increases with s
        s = (low + high) / 2
        top = max(s * cost for cost in costs)
        weights = [math.exp(s * cost - top) for cost in costs]
        mean = sum(w * cost for w, cost in zip(weights, costs, strict=True)) / sum(weights)
        low, high = (s, high) if mean < budget else (low, s)
    return [w / sum(weights) for w in weights]


class Classifier(nn.Module):
    """Logits of the choices from a noisy image and its time: two strided convolutions, their mean, a linear layer.

    Args:
        channels: of the images.
        choices: number of choices.
    """

    def __init__(self, channels: int, choices: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.out = nn.Linear(17, choices)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] and times [B] in [0, 1000]."""
        pooled = self.features(x).mean(dim=(2, 3))
        return self.out(torch.cat([pooled, (time[:, None] / 1000).to(pooled.dtype)], dim=1))
