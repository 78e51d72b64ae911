"""What losses usually are at a level."""

import torch
from torch import Tensor

BINS = 32  # of the level axis
MEMORY = 0.5  # what is kept, an epoch, of the losses that say what is usual


class Usual:
    """The running mean of losses by bin of the level axis.

    Attributes:
        sums: float64 [2, BINS]; of weight * loss and of weight, older epochs counting `MEMORY` as much each epoch.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, BINS, dtype=torch.float64)

    def at(self, loss: Tensor, level: Tensor, weight: Tensor) -> Tensor:
        """Take an epoch's visits in, and say what loss is usual at the level of each.

        The visits are weighted by 1 / their probability: what was kept is not a fair sample of its level. The bins'
        means are drawn towards the overall mean as far as they differ by chance alone (an empirical Bayes estimate):
        where levels do not matter, they do nothing.

        Args:
            loss, level, weight: float64 [V].

        Returns:
            float64 [V], above 0.
        """
        bin = (level * BINS).long()

        def by_bin(value: Tensor) -> Tensor:
            return torch.bincount(bin, value, minlength=BINS)

        self.sums = MEMORY * self.sums + torch.stack([by_bin(weight * loss), by_bin(weight)])
        total, count = self.sums
        overall = total.sum() / count.sum().clamp(min=1)
        mean = torch.where(count > 0, total / count.clamp(min=1e-12), overall)
        within = (weight * (loss - mean[bin]) ** 2).sum() / (weight.sum() - BINS).clamp(min=1)
        by_chance = within * BINS / count.sum().clamp(min=1)
        between = (mean - overall).square().mean()
        trust = (1 - by_chance / between.clamp(min=1e-300)).clamp(0, 1)
        return (overall + trust * (mean - overall))[bin].clamp(min=1e-12)
