"""What is remembered of the samples: a score each, and how far scores can be relied on."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.infobatch.epoch_losses import UNSEEN
from pretrain.infobatch.level_stats import BINS, MEMORY, LevelStats, sums_of
from pretrain.infobatch.plan import Plan

SOME = 1 << 18  # visits taken in at a time


class Visits(NamedTuple):
    """Visits whose losses came back, in the order in which they were made."""

    index: Tensor  # int64 [V]
    loss: Tensor  # float64 [V]
    level: Tensor  # float64 [V]
    time: Tensor  # float64 [V] in [0, 1); when in the epoch
    weight: Tensor  # float64 [V]


class ScoreReliability:
    """How scores foretell the same samples' next visits.

    Attributes:
        sums: float64 [7]; over visits of samples that had a score: of weight w, w old, w new, w old^2, w old new,
            w new^2 and w^2; old the score before the visit, new what the visit alone says. Older epochs count less.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(7, dtype=torch.float64)

    def take(self, sums: Tensor) -> None:
        """Take an epoch's `repeats_of` in."""
        fade = torch.full((7,), MEMORY, dtype=torch.float64)
        fade[-1] = MEMORY**2
        self.sums = fade * self.sums + sums

    @property
    def reliability(self) -> float | None:
        """Share of a difference between two scores that the next visits show again, in [0, 1]; None: not known yet.

        The slope of new on old: with independent errors it is the variance of what persists over the variance of the
        scores, so mean + slope * (score - mean) is the best linear guess of what a sample is really like (Kelley,
        1947). 0 where the slope is not above its own error, twice.
        """
        w, old, new, old2, both, new2, w2 = (self.sums / self.sums[0].clamp(min=1e-300)).tolist()
        variance, covariance = old2 - old**2, both - old * new
        count = w**2 * self.sums[0].item() / w2 if w2 else 0.0
        if count < 10 or variance <= 1e-12 * old2:
            return None
        slope = covariance / variance
        error = (max(new2 - new**2 - slope * covariance, 0.0) / (variance * count)) ** 0.5
        return min(slope, 1.0) if slope > 2 * error else 0.0


def repeats_of(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """float64 [7]; what `ScoreReliability` keeps, of visits [V], float64; those without an old score don't matter."""
    had = ~old.isnan()
    o, n, w = old[had], new[had], weight[had]
    return torch.stack([part.sum() for part in (w, w * o, w * n, w * o**2, w * o * n, w * n**2, w**2)])


class ScoreStore:
    """The samples' scores.

    Args:
        size: samples, N.
        smoothing: what a score keeps of its past at a visit, in [0, 1).
        raw: a loss is its own score; else it is compared with what is usual at its level and time.

    Attributes:
        score: float32 [N]; how badly each sample is learned, about 1 on average; NaN where never visited.
    """

    def __init__(self, size: int, smoothing: float, raw: bool = False) -> None:
        self.score = torch.full((size,), torch.nan)
        self.smoothing, self.raw = smoothing, raw
        self.levels, self.repeats = LevelStats(), ScoreReliability()

    def visits(self, loss: Tensor, plan: Plan) -> Iterator[Visits]:
        """An epoch's visits, from the table of its losses, float32 [N] on the CPU, some at a time."""
        for first in range(0, plan.length, SOME):
            position = np.arange(first, min(first + SOME, plan.length))
            index = torch.from_numpy(plan.at(position))
            seen = loss[index] != UNSEEN
            index, time = index[seen], torch.from_numpy(position)[seen].double() / plan.length
            weight = plan.weight_of(index, self.score[index]).double()
            yield Visits(index, loss[index].double(), plan.level_of(index).double(), time, weight)

    def mean(self, loss: Tensor, plan: Plan) -> float:
        """Mean loss over the data set, estimated from an epoch's visits; NaN if there are none."""
        total = weights = 0.0
        for _, value, _, _, weight in self.visits(loss, plan):
            total, weights = total + (weight * value).sum().item(), weights + weight.sum().item()
        return total / weights if weights else torch.nan

    def take(self, loss: Tensor, plan: Plan) -> None:
        """Turn an epoch's losses into scores.

        Raises:
            ValueError: one is negative.
        """
        sums = torch.zeros(2, 3, BINS, BINS, dtype=torch.float64)
        for index, value, level, time, weight in self.visits(loss, plan):
            if (value < 0).any():
                raise ValueError(
                    f"scores must not be negative, got {value.min().item():.3g} for sample "
                    f"{index[value.argmin()].item()}; hand over a `score` beside a loss that can be negative"
                )
            sums += sums_of(value, level, time, weight)
        self.levels.take(sums)
        repeats = torch.zeros(7, dtype=torch.float64)
        for index, value, level, time, weight in self.visits(loss, plan):
            new = value if self.raw else self.levels.comparable(value, level, time)
            old = self.score[index]
            repeats += repeats_of(old.double(), new, weight)
            self.score[index] = torch.where(old.isnan(), new.float(), old.lerp(new.float(), 1 - self.smoothing))
        self.repeats.take(repeats)
