"""The samples' scores, and how reliable they are."""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from torch import Tensor

from pretrain.infobatch.chunks import CHUNK, map_chunks
from pretrain.infobatch.epoch_losses import UNSEEN
from pretrain.infobatch.level_stats import BINS, DECAY, LevelStats, bins_of, level_sums
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.sample_weights import SampleWeights

STATISTICS = 1 << 22  # samples from which means by level and the reliability are estimated; of more, evenly spaced ones


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
    wo, wn = w * o, w * n
    return torch.stack([w.sum(), wo.sum(), wn.sum(), wo @ o, wo @ n, wn @ n, w @ w])


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

    def mean(self, loss: Tensor, plan: Plan, sample_weights: SampleWeights | None = None) -> float:
        """Weighted mean of an epoch's losses, an estimate of the data set's mean loss; NaN if there are none.

        Args:
            loss: float32 [N] on the CPU; `UNSEEN` where there is none.
            plan: of the epoch.
            sample_weights: beside the plan's; None: 1.
        """
        sample_weights = sample_weights or SampleWeights(None, len(loss))

        def sums(first: int) -> Tensor:
            index = _present(loss, first)
            weight = sample_weights.times(plan.weight_of(index, self.score[index]).double(), index)
            return torch.stack([weight @ loss[index].double(), weight.sum()])

        total, weights = sum(map_chunks(sums, len(loss)), torch.zeros(2, dtype=torch.float64)).tolist()
        return total / weights if weights else torch.nan

    def update(self, loss: Tensor, plan: Plan) -> None:
        """Turn an epoch's losses into scores.

        The losses are read in the order in which they are stored, not in that in which the samples were used: random
        reads of 100 million samples take longer than all the rest.

        Args:
            loss: float32 [N] on the CPU, not negative; `UNSEEN` where there is none.
            plan: of the epoch.
        """
        time, stride = torch.from_numpy(plan.parts(BINS)), max(len(loss) // STATISTICS, 1)

        def bins(index: Tensor) -> tuple[Tensor, Tensor]:
            return bins_of(plan.level_of(index)), time[index].long()

        def sums(first: int) -> Tensor:
            index = _present(loss, first)[::stride]
            return level_sums(loss[index].double(), *bins(index), plan.weight_of(index, self.score[index]).double())

        def update_scores(first: int) -> Tensor:
            index = _present(loss, first)
            old, new = self.score[index], loss[index].double()
            new = new if self.raw else self.levels.scores_of(new, *bins(index))
            weight = plan.weight_of(index[::stride], old[::stride]).double()
            self.score[index] = torch.where(old.isnan(), new.float(), old.lerp(new.float(), 1 - self.smoothing))
            return reliability_sums(old[::stride].double(), new[::stride], weight)

        self.levels.update(sum(map_chunks(sums, len(loss)), torch.zeros(2, 3, BINS, BINS, dtype=torch.float64)))
        self.reliability.update(sum(map_chunks(update_scores, len(loss)), torch.zeros(7, dtype=torch.float64)))


def _present(loss: Tensor, first: int) -> Tensor:
    """int64; the samples of the chunk from `first` on that have a loss."""
    return (loss[first : first + CHUNK] != UNSEEN).nonzero().squeeze(1) + first
