"""What losses usually are at a level, and how far they spread there."""

import torch
from torch import Tensor

BINS = 32  # of the level axis
MEMORY = 0.5  # what is kept, an epoch, of what earlier epochs told
PRIOR = 8.0  # visits' worth of belief that a bin spreads as all do


class Levels:
    """Running mean and spread of losses by bin of the level axis.

    Visits are weighted by 1 / their probability: what was kept is not a fair sample of its level. The bins are drawn
    towards what they have in common as far as their means differ by chance alone (an empirical Bayes estimate): where
    levels do not matter, they do nothing.

    Attributes:
        sums: float64 [3, BINS]; of weight, weight * loss and weight * loss^2, older epochs counting `MEMORY` as much
            each epoch.
        usual: float64 [BINS]; mean loss.
        spread: float64 [BINS]; standard deviation of the loss over its mean; 1 is that of all levels together.
    """

    def __init__(self) -> None:
        self.restore(torch.zeros(3, BINS, dtype=torch.float64))

    def restore(self, sums: Tensor) -> None:
        """Go on from these sums."""
        self.sums = sums.clone()
        count, total, squares = self.sums
        seen = count.clamp(min=1e-12)
        overall = total.sum() / count.sum().clamp(min=1e-12)
        mean = torch.where(count > 0, total / seen, overall)
        variance = torch.where(count > 0, squares / seen - mean**2, 0).clamp(min=0)
        # Bins of a visit or two are their own mean and do not vary: then the variance of all counts.
        whole = squares.sum() / count.sum().clamp(min=1e-12) - overall**2
        freedom = (count.sum() - (count > 0).sum()).clamp(min=0)
        within = ((count * variance).sum() + PRIOR * whole.clamp(min=0)) / (freedom + PRIOR)
        by_chance = within * BINS / count.sum().clamp(min=1)
        between = (mean - overall).square().mean()
        trust = (1 - by_chance / between.clamp(min=1e-300)).clamp(0, 1)
        self.usual = (overall + trust * (mean - overall)).clamp(min=1e-12)
        relative = variance / mean.clamp(min=1e-12) ** 2
        pooled = ((count * relative).sum() / count.sum().clamp(min=1e-12)).clamp(min=1e-12)
        relative = ((count * relative + PRIOR * pooled) / (count + PRIOR) / pooled).sqrt()
        self.spread = 1 + trust * (relative - 1)

    def take(self, sums: Tensor) -> None:
        """Take an epoch's `sums_of` in."""
        self.restore(MEMORY * self.sums + sums)

    def comparable(self, loss: Tensor, level: Tensor) -> Tensor:
        """Scores, float64 [V], from losses at levels: 1 on average and equally far spread at every level.

        1 + (loss / usual - 1) / spread, and not below 0: where the spread is alike, the loss over the usual one.
        """
        bin = (level * BINS).long()
        return (1 + (loss / self.usual[bin] - 1) / self.spread[bin]).clamp(min=0)


def sums_of(loss: Tensor, level: Tensor, weight: Tensor) -> Tensor:
    """float64 [3, BINS]; what `Levels` keeps, of visits [V], float64."""
    bin = (level * BINS).long()
    return torch.stack([torch.bincount(bin, weight * loss**power, minlength=BINS) for power in range(3)])
