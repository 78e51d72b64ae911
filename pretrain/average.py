"""The exponential average of the parameters over progress."""

import copy

import torch
from torch import nn


class Average:
    """A copy of the network whose parameters follow the network's, halving their distance every `halflife`.

    Progress is the clock, not steps: an epoch that skips half of the samples moves the average as far as a
    whole one. Early on the half-life is half of the progress made, so that the start is forgotten.

    Args:
        model: the bare network.
        halflife: share of the training, above 0.
    """

    def __init__(self, model: nn.Module, halflife: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.halflife = halflife
        self.progress = 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, progress: float) -> None:
        """Move towards the network as it is at `progress`."""
        halflife = min(self.halflife, progress / 2)
        passed = max(progress - self.progress, 0.0)  # a run that is given more epochs has its clock set back
        share = 1 - 0.5 ** (passed / halflife)
        self.progress = progress
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], share)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)
