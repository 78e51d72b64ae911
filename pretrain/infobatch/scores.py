"""The samples' scores, and how reliable they are."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.infobatch.epoch_losses import UNSEEN
from pretrain.infobatch.level_stats import BINS, DECAY, LevelStats, level_sums
from pretrain.infobatch.plan import Plan

CHUNK = 1 << 18  # losses processed at a time


class Records(NamedTuple):
    """Samples of an epoch that have a loss, in the order in which they were used."""

    index: Tensor  # int64 [B]
    loss: Tensor  # float64 [B]
    level: Tensor  # float64 [B]
    time: Tensor  # float64 [B] in [0, 1); position in the epoch
    weight: Tensor  # float64 [B]


class ScoreReliability:
    """How well a score predicts what the same sample's next loss shows.

    Attributes:
        sums: float64 [7]; over samples that had a score before the epoch: of the weight w, w old, w new, w old^2, w old
            new, w new^2 and w^2, where old is that score and new the score of the epoch's loss alone. An epoch counts
            `DECAY` as much as the next one.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(7, dtype=torch.float64)

    def update(self, sums: Tensor) -> None:
        """Include an epoch's `reliability_sums`."""
        decay = torch.full((7,), DECAY, dtype=torch.float64)
        decay[-1] = DECAY**2
        self.sums = decay * self.sums + sums

    @property
    def reliability(self) -> float | None:
        """Share of a difference between two scores that the next losses show again, in [0, 1]; None: not known yet.

        The regression slope of new on old. With independent errors it is the variance of the true scores over that of
        the observed ones, so mean + slope * (score - mean) is the best linear estimate of a true score (Kelley, 1947).
        0 if the slope is not above twice its standard error.
        """
        w, old, new, old2, both, new2, w2 = (self.sums / self.sums[0].clamp(min=1e-300)).tolist()
        variance, covariance = old2 - old**2, both - old * new
        count = w**2 * self.sums[0].item() / w2 if w2 else 0.0
        if count < 10 or variance <= 1e-12 * old2:
            return None
        slope = covariance / variance
        error = (max(new2 - new**2 - slope * covariance, 0.0) / (variance * count)) ** 0.5
        return min(slope, 1.0) if slope > 2 * error else 0.0


def reliability_sums(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """float64 [7]; the sums of `ScoreReliability`, of samples [B], float64; those without an old score are left out."""
    known = ~old.isnan()
    o, n, w = old[known], new[known], weight[known]
    return torch.stack([term.sum() for term in (w, w * o, w * n, w * o**2, w * o * n, w * n**2, w**2)])


class ScoreStore:
    """One score per sample, updated once an epoch.

    Args:
        size: samples, N.
        smoothing: weight of the old score in the new one, in [0, 1).
        raw: a loss is its own score; else it is divided by the expected loss at its level and time.

    Attributes:
        score: float32 [N]; about 1 on average unless `raw`; NaN where a sample has none yet.
    """

    def __init__(self, size: int, smoothing: float, raw: bool = False) -> None:
        self.score = torch.full((size,), torch.nan, dtype=torch.float32)
        self.smoothing, self.raw = smoothing, raw
        self.levels, self.reliability = LevelStats(), ScoreReliability()

    def records(self, loss: Tensor, plan: Plan) -> Iterator[Records]:
        """An epoch's losses, float32 [N] on the CPU, with what the plan says of them, a chunk at a time."""
        for first in range(0, plan.length, CHUNK):
            position = np.arange(first, min(first + CHUNK, plan.length))
            index = torch.from_numpy(plan.at(position))
            present = loss[index] != UNSEEN
            index, time = index[present], torch.from_numpy(position)[present].double() / plan.length
            weight = plan.weight_of(index, self.score[index]).double()
            yield Records(index, loss[index].double(), plan.level_of(index).double(), time, weight)

    def mean(self, loss: Tensor, plan: Plan) -> float:
        """Weighted mean of an epoch's losses, an estimate of that of the data set; NaN if there are none."""
        total = weights = 0.0
        for _, value, _, _, weight in self.records(loss, plan):
            total, weights = total + (weight * value).sum().item(), weights + weight.sum().item()
        return total / weights if weights else torch.nan

    def update(self, loss: Tensor, plan: Plan) -> None:
        """Turn an epoch's losses, float32 [N] on the CPU, not negative, into scores."""
        sums = torch.zeros(2, 3, BINS, BINS, dtype=torch.float64)
        for _, value, level, time, weight in self.records(loss, plan):
            sums += level_sums(value, level, time, weight)
        self.levels.update(sums)
        repeated = torch.zeros(7, dtype=torch.float64)
        for index, value, level, time, weight in self.records(loss, plan):
            new = value if self.raw else self.levels.scores_of(value, level, time)
            old = self.score[index]
            repeated += reliability_sums(old.double(), new, weight)
            self.score[index] = torch.where(old.isnan(), new.float(), old.lerp(new.float(), 1 - self.smoothing))
        self.reliability.update(repeated)
