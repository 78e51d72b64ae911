"""What losses usually are at a level and at a time, and how far they spread there."""

import torch
from torch import Tensor

BINS = 32  # of the level axis, and of an epoch's visits in their order
MEMORY = 0.5  # what is kept, an epoch, of what earlier epochs told
PRIOR = 8.0  # visits' worth of belief that a bin spreads as all do


class LevelStats:
    """Running mean and spread of losses by bin of the level axis, and how the losses moved in the last epoch.

    Visits are weighted by 1 / their probability: what was kept is not a fair sample of its level. What is usual at a
    level and a time is usual(level) * trend(time): the network learns while an epoch runs, so an early visit's loss is
    no measure for a late one's.

    Attributes:
        sums: float64 [2, 3, BINS]; of weight^a * loss^b for a = 1, 2 and b = 0, 1, 2, the trend taken out; weights of
            older epochs count `MEMORY` as much each epoch.
        usual: float64 [BINS]; mean loss at each level.
        spread: float64 [BINS]; standard deviation of the loss over its mean; 1 is that of all levels together.
        trend: float64 [BINS]; mean loss at each time of the last epoch, 1 on average.
    """

    def __init__(self) -> None:
        self.restore(torch.zeros(2, 3, BINS, dtype=torch.float64))

    def restore(self, sums: Tensor) -> None:
        """Go on from these sums."""
        self.sums = sums.clone()
        self.trend = torch.ones(BINS, dtype=torch.float64)
        self.usual, relative, trust = _estimate(sums)
        self.spread = 1 + trust * (relative - 1)

    def take(self, sums: Tensor) -> None:
        """Take an epoch's `sums_of` in."""
        power = torch.arange(3).view(-1, 1, 1)
        usual = _estimate(sums.sum(3))[0].view(-1, 1)
        by_time, _, _ = _estimate((sums / usual**power).sum(2))
        trend = by_time / by_time.mean()
        fade = torch.tensor([MEMORY, MEMORY**2], dtype=torch.float64).view(2, 1, 1)
        self.restore(fade * self.sums + (sums / trend**power).sum(3))
        self.trend = trend

    def comparable(self, loss: Tensor, level: Tensor, time: Tensor) -> Tensor:
        """Scores, float64 [V], from losses: 1 on average, and equally far spread at every level.

        1 + (loss / usual - 1) / spread, and not below 0: where the spread is alike, the loss over the usual one.
        """
        u, t = _bin(level), _bin(time)
        return (1 + (loss / (self.usual[u] * self.trend[t]) - 1) / self.spread[u]).clamp(min=0)


def _bin(value: Tensor) -> Tensor:
    return (value * BINS).long()


def sums_of(loss: Tensor, level: Tensor, time: Tensor, weight: Tensor) -> Tensor:
    """float64 [2, 3, BINS, BINS]; what `LevelStats` takes in, by level and time, of visits [V], float64."""
    cell = _bin(level) * BINS + _bin(time)
    sums = [torch.bincount(cell, weight**a * loss**b, minlength=BINS**2) for a in (1, 2) for b in (0, 1, 2)]
    return torch.stack(sums).view(2, 3, BINS, BINS)


def _estimate(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and relative spread by bin, float64 [BINS], from sums [2, 3, BINS]; and how far the bins are trusted.

    The means are drawn towards what they have in common as far as they may differ by chance alone (an empirical Bayes
    estimate), and a little more: noise must not pass for knowledge. A trust of 0: the bins tell nothing; of 1: all.
    """
    (count, total, squares), (count2, total2, squares2) = sums
    there = count > 0
    seen, all_seen = count.clamp(min=1e-12), count.sum().clamp(min=1e-12)
    overall = total.sum() / all_seen
    mean = torch.where(there, total / seen, overall)
    # Variance of a weighted mean, were the overall mean that of the bin: sum of w^2 (loss - mean)^2 over (sum of w)^2.
    chance = ((squares2 - 2 * overall * total2 + overall**2 * count2) / seen**2)[there].mean()
    between = (mean - overall)[there].square().mean()
    limit = 1 + 2 * (2 / there.sum().clamp(min=1)) ** 0.5  # by chance, that ratio is exceeded one time in 40
    trust = (1 - limit * chance / between).nan_to_num(0.0).clamp(0, 1)
    usual = (overall + trust * (mean - overall)).clamp(min=1e-12)

    variance = torch.where(there, squares / seen - mean**2, 0).clamp(min=0)
    relative = variance / mean.clamp(min=1e-12) ** 2
    pooled = ((count * relative).sum() / all_seen).clamp(min=1e-12)
    spread = ((count * relative + PRIOR * pooled) / (count + PRIOR) / pooled).sqrt()
    return usual, spread, trust
