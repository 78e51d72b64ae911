"""Mean and spread of the losses by level, and their trend within an epoch."""

import torch
from torch import Tensor

BINS = 32  # of the level axis, and of the time within an epoch
DECAY = 0.5  # an epoch's weight relative to that of the next one
PRIOR = 8.0  # pseudo-count of losses with the common spread, in every bin


class LevelStats:
    """Running mean and spread of losses by bin of the level axis, and the trend of losses in the last epoch.

    Losses are weighted by 1 / their probability, since the samples of a pruned epoch are not a uniform sample. The
    expected loss at a level and time is mean(level) * trend(time): the network learns within an epoch, so an early loss
    is larger than a late one.

    Attributes:
        sums: float64 [2, 3, BINS]; of weight^a * loss^b for a = 1, 2 and b = 0, 1, 2, the trend divided out. An epoch
            counts `DECAY` as much as the next one.
        mean: float64 [BINS]; mean loss at each level.
        spread: float64 [BINS]; coefficient of variation of the loss at each level, relative to that of all levels.
        trend: float64 [BINS]; mean loss at each time of the last epoch, 1 on average.
    """

    def __init__(self) -> None:
        self.restore(torch.zeros(2, 3, BINS, dtype=torch.float64))

    def restore(self, sums: Tensor) -> None:
        """Continue from `sums`."""
        self.sums = sums.clone()
        self.trend = torch.ones(BINS, dtype=torch.float64)
        self.mean, relative, signal = _estimate(sums)
        self.spread = 1 + signal * (relative - 1)

    def update(self, sums: Tensor) -> None:
        """Include an epoch's `level_sums`."""
        power = torch.arange(3).view(-1, 1, 1)
        mean = _estimate(sums.sum(3))[0].view(-1, 1)
        by_time, _, _ = _estimate((sums / mean**power).sum(2))
        trend = by_time / by_time.mean()
        decay = torch.tensor([DECAY, DECAY**2], dtype=torch.float64).view(2, 1, 1)
        self.restore(decay * self.sums + (sums / trend**power).sum(3))
        self.trend = trend

    def scores_of(self, loss: Tensor, level: Tensor, time: Tensor) -> Tensor:
        """Scores that can be compared across levels and times: 1 on average, with the same spread at every level.

        1 + (loss / (mean * trend) - 1) / spread, clamped at 0.

        Args:
            loss: float64 [B].
            level, time: int [B]; bins of the level axis and of the epoch.

        Returns:
            float64 [B].
        """
        scale = 1 / (self.mean[:, None] * self.trend * self.spread[:, None])
        return (loss * scale.view(-1)[level * BINS + time] + (1 - 1 / self.spread)[level]).clamp_(min=0)


def bins_of(value: Tensor) -> Tensor:
    """int64; the bins of levels or times, float [B] in [0, 1)."""
    return (value * BINS).long()


def level_sums(loss: Tensor, level: Tensor, time: Tensor, weight: Tensor) -> Tensor:
    """float64 [2, 3, BINS, BINS]; sums of weight^a * loss^b by level and time.

    Args:
        loss, weight: float64 [B].
        level, time: int [B]; bins of the level axis and of the epoch.
    """
    cell = level * BINS + time
    sums: list[Tensor] = []
    for term in (weight, weight * weight):
        for _ in range(3):
            sums.append(torch.bincount(cell, term, minlength=BINS**2))
            term = term * loss
    return torch.stack(sums).view(2, 3, BINS, BINS)


def _estimate(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and relative spread by bin, float64 [BINS], from sums [2, 3, BINS]; and the share of signal in the means.

    An empirical Bayes estimate: the means are shrunk towards the overall mean by the part of their variance that
    sampling error explains, and a little more, so that noise alone gives equal means (signal 0).
    """
    (count, total, squares), (count2, total2, squares2) = sums
    present = count > 0
    safe, all_count = count.clamp(min=1e-12), count.sum().clamp(min=1e-12)
    overall = total.sum() / all_count
    mean = torch.where(present, total / safe, overall)
    # Variance of a weighted mean, were the overall mean that of the bin: sum of w^2 (loss - mean)^2 over (sum of w)^2.
    error = ((squares2 - 2 * overall * total2 + overall**2 * count2) / safe**2)[present].mean()
    between = (mean - overall)[present].square().mean()
    limit = 1 + 2 * (2 / present.sum().clamp(min=1)) ** 0.5  # noise alone exceeds this ratio one time in 40
    signal = (1 - limit * error / between).nan_to_num(0.0).clamp(0, 1)
    shrunk = (overall + signal * (mean - overall)).clamp(min=1e-12)

    variance = torch.where(present, squares / safe - mean**2, 0).clamp(min=0)
    relative = variance / mean.clamp(min=1e-12) ** 2
    pooled = ((count * relative).sum() / all_count).clamp(min=1e-12)
    spread = ((count * relative + PRIOR * pooled) / (count + PRIOR) / pooled).sqrt()
    return shrunk, spread, signal
