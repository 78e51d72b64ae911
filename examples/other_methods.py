"""Methods that save training on samples by other rules than InfoBatch's, as rows of a comparison.

`--training.policy orderdp`, `seta`, `ies` or `selective-backprop`, for the examples that train by fit.py. None of them
weights its samples, so each one minimizes another loss than the mean over the data set: they are biased. They run on
one process and can't be resumed.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from pretrain.core.padding import is_padding, sample_of
from pretrain.core.rng import SampleRNG, generator


class OtherMethod(Sampler[int]):
    """The part of InfoBatch's interface that fit.py uses, by default for training on all samples without weights.

    A method overrides `select`, the samples of an epoch, or `chosen`, the samples of a batch whose losses are used.

    Args:
        size: samples in the data set, N.
        epochs: of the training.
        seed: of all random draws.
        budget: share of the samples that is used, in (0, 1]; for methods that have one.

    Attributes:
        epoch: the current epoch, from 0.
        seen: samples of this epoch whose losses were passed.
        forward_only: samples so far whose losses were computed and not used; they need no backward pass.
        last: float32 [N]; the last loss of each sample; 3 before there is one, as in the code of OrderDP and SeTa.

    Raises:
        ValueError: the method takes no budget, or needs one.
    """

    budgeted = True
    reliability = None  # of scores: not measured

    def __init__(self, size: int, *, epochs: int, seed: int = 0, budget: float | None = None) -> None:
        name = type(self).__name__
        if (budget is None) == self.budgeted:
            raise ValueError(
                f"{name} needs a budget, the share of the samples to use, for example 0.7"
                if self.budgeted
                else f"{name} takes no budget, as its rule says how many samples are used"
            )
        _require(budget is None or 0 < budget <= 1, "budget", "in (0, 1]", budget)
        _require(size >= 1 and epochs >= 1, "size and epochs", "at least 1", (size, epochs))
        self.size, self.total_epochs, self.seed, self.budget = size, epochs, seed, budget or 1.0
        self.epoch = self.seen = self.used_before = self.forward_only = 0
        self.last = torch.full((size,), 3.0)
        self._index, self._total = torch.empty(0, dtype=torch.int64), 0.0

    def select(self) -> Tensor:
        """The samples of this epoch, int64 [K], in any order."""
        return torch.arange(self.size)

    def chosen(self, loss: Tensor, index: Tensor) -> Tensor:
        """Which losses of a batch are used, bool [B].

        Args:
            loss: float32 [B], on the CPU.
            index: int64 [B]; the samples. `last` has their losses before this batch.
        """
        return torch.ones(len(loss), dtype=torch.bool)

    def draws(self, *key: int) -> torch.Generator:
        """Random numbers of (seed, epoch, key)."""
        return generator(self.seed, self.epoch, *key)

    def level(self, index: Tensor) -> Tensor:
        """float32 [B] in [0, 1); the levels of samples (or padding), int64 [B], in this epoch, uniform."""
        return SampleRNG(self.seed, self.epoch, index=sample_of(index)).uniform()

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return (self.epoch + self.seen / max(len(self._index), 1)) / self.total_epochs

    @property
    def samples_used(self) -> int:
        """Samples whose losses were passed, those in `forward_only` included."""
        return self.used_before + self.seen

    def mean(self) -> float:
        """Mean of this epoch's losses, also of those that are not used."""
        return self._total / max(self.seen, 1)

    def epochs(self) -> Iterator[int]:
        """Select each epoch's samples and yield its number.

        Raises:
            FloatingPointError: a loss of the epoch was not finite.
        """
        while self.epoch < self.total_epochs:
            selected = self.select()
            self._index, self._total = selected[torch.randperm(len(selected), generator=self.draws(0))], 0.0
            yield self.epoch
            if not math.isfinite(self._total):
                raise FloatingPointError(f"epoch {self.epoch + 1}: a loss is not finite")
            self.used_before += self.seen
            self.epoch, self.seen = self.epoch + 1, 0

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[int]:
        return iter(self._index.tolist())

    def __call__(self, loss: Tensor, index: Tensor, score: Tensor | None = None) -> Tensor:
        """Store the losses, or the scores in their place, and return the mean of the losses that are used.

        Args:
            loss, score: [B].
            index: int64 [B]; samples, or padding.
        """
        real = ~is_padding(index.cpu())
        sample = sample_of(index.cpu())
        known = (loss if score is None else score).detach().float().cpu()
        used = self.chosen(known, sample) & real
        self.last[sample[real]] = known[real]
        self.seen += len(index)
        self.forward_only += int((real & ~used).sum())
        self._total += float(known[real].sum())
        return torch.where(used.to(loss.device), loss, 0.0).sum() / max(int(used.sum()), 1)


class OrderDP(OtherMethod):
    """The samples with the largest last losses in a uniform pool.

    Jin et al., "OrderDP: a theoretically guaranteed lossless dynamic data pruning framework" (ICLR 2026), and its code:
    s of the n samples are drawn uniformly, the q of them with the largest last losses are used, in all epochs. Biased
    towards large losses: the expected gradient, given the last losses, is that of the sum over samples of p L / q,
    where the sample of the j-th largest last loss has p = sum_{l <= q} C(j-1, l-1) C(n-j, s-l) / C(n, s); the authors
    call it unbiased for this loss. The published text could not be had, so how s is chosen for a given q is not known;
    here q / s is the default of the code.

    Args:
        budget: q / n.
        top: q / s.
    """

    def __init__(self, size: int, *, top: float = 0.85, **settings: Any) -> None:
        super().__init__(size, **settings)
        _require(0 < top <= 1, "top", "in (0, 1]", top)
        self.used = max(1, round(self.budget * size))
        self.pool = min(size, max(self.used, round(self.used / top)))

    def select(self) -> Tensor:
        """The q of the pool with the largest last losses."""
        pool = torch.randperm(self.size, generator=self.draws(1))[: self.pool]
        return pool[self.last[pool].topk(self.used).indices]


class SeTa(OtherMethod):
    """A window over groups of samples that slides from easy to hard, again and again.

    Zhou et al., "Scale efficient training for large datasets" (CVPR 2025), and its code: a share of the samples is
    drawn uniformly, k-means cuts their last losses into groups, and the window of groups moves on by one in each epoch.
    The first epoch uses all groups, the last ones a uniform share. Biased towards the groups in the middle, which lie
    in more windows, and in each epoch towards its window. How many samples a window has depends on the losses. The
    defaults are those of the authors' script for CIFAR.

    Args:
        keep: share that is drawn uniformly, in (0, 1].
        groups: number of groups.
        window: groups in the window, as a share of all.
        anneal: share of the epochs, the last ones, without groups.
    """

    budgeted = False

    def __init__(
        self,
        size: int,
        *,
        keep: float = 0.9,
        groups: float = 5,
        window: float = 0.9,
        anneal: float = 0.125,
        **more: Any,
    ) -> None:
        super().__init__(size, **more)
        for name, value in (("keep", keep), ("window", window)):
            _require(0 < value <= 1, name, "in (0, 1]", value)
        _require(groups >= 1 and groups == int(groups), "groups", "a whole number from 1", groups)
        _require(0 <= anneal <= 1, "anneal", "in [0, 1]", anneal)
        self.keep, self.groups, self.window = keep, int(groups), max(1, round(groups * window))
        self.first_full = self.total_epochs - math.ceil(anneal * self.total_epochs - 1e-9)

    def select(self) -> Tensor:
        """The samples of this epoch's window."""
        drawn = torch.randperm(self.size, generator=self.draws(1))[: max(1, round(self.keep * self.size))]
        if not self.epoch or self.epoch >= self.first_full:
            return drawn
        start = self.epoch % (self.groups - self.window + 1)
        group = intervals(self.last[drawn], self.groups)
        inside = drawn[(group >= start) & (group < start + self.window)]
        return inside if len(inside) else drawn[:1]


def intervals(value: Tensor, groups: int) -> Tensor:
    """int64 [K]; the group of each value, float32 [K], by k-means (Lloyd's, begun at quantiles), in ascending order."""
    centre = value.double().quantile((torch.arange(groups, dtype=torch.float64) + 0.5) / groups)
    group = torch.zeros(len(value), dtype=torch.int64)
    for _ in range(50):
        group = torch.bucketize(value.double(), (centre[1:] + centre[:-1]) / 2)
        count = torch.bincount(group, minlength=groups)
        total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, value.double())
        centre = torch.where(count > 0, total / count.clamp(min=1), centre)
    return group


class IES(OtherMethod):
    """No backward pass for samples whose loss has settled.

    Yuan et al., "Instance-dependent early stopping" (ICLR 2025), and its code: a sample is excluded in epochs in which
    the mean absolute second difference of its loss, over the last `window` of at least `window` + 1 second differences,
    is below the threshold. Its loss is still computed in every epoch, so that it can come back. Biased towards samples
    whose losses change. Here the loss of an excluded sample is computed within its batch, in training mode; the authors
    compute it after the epoch, in evaluation mode, and their batches have none of those samples.

    Args:
        threshold: above 0.
        window: second differences in the mean.
    """

    budgeted = False

    def __init__(self, size: int, *, threshold: float = 1e-3, window: float = 3, **more: Any) -> None:
        super().__init__(size, **more)
        _require(threshold > 0, "threshold", "above 0", threshold)
        _require(window >= 1 and window == int(window), "window", "a whole number from 1", window)
        self.threshold, self.window = threshold, int(window)
        self.history = torch.full((self.window + 3, size), torch.nan)  # losses, the newest last; NaN before the first

    def select(self) -> Tensor:
        """All samples, after the last epoch's losses have joined the history."""
        if self.epoch:
            self.history = torch.cat([self.history[1:], self.last[None]])
        return super().select()

    def chosen(self, loss: Tensor, index: Tensor) -> Tensor:
        """False for samples that are excluded in this epoch."""
        history = self.history[:, index]
        change = (history[2:] - 2 * history[1:-1] + history[:-2]).abs()
        settled = change[-self.window :].mean(dim=0) < self.threshold
        return ~(settled & change.isfinite().all(dim=0))


class SelectiveBackprop(OtherMethod):
    """A backward pass for samples by the rank of their loss among recent losses.

    Jiang et al., "Accelerating deep learning by focusing on the biggest losers" (2019): a loss with the share F of the
    last losses below it is used with probability F ** beta, which is 1 / (1 + beta) on average. Biased towards large
    losses: sample i counts F_i ** beta times. A batch's gradient is the mean over its samples that are used; the
    authors collect these until they are a whole batch, and may run them forward a second time. The FLOPs of a sample
    that is not used are those of its forward pass; in time nothing is saved, as the backward pass is computed for all
    of the batch.

    Args:
        budget: 1 / (1 + beta).
        recent: number of recent losses.
    """

    def __init__(self, size: int, *, recent: float = 1024, **settings: Any) -> None:
        super().__init__(size, **settings)
        _require(recent >= 1, "recent", "at least 1", recent)
        self.beta, self.most, self.recent = 1 / self.budget - 1, int(recent), torch.empty(0)

    def chosen(self, loss: Tensor, index: Tensor) -> Tensor:
        """Draws by rank."""
        self.recent = torch.cat([self.recent, loss])[-self.most :]
        rank = torch.searchsorted(self.recent.sort().values, loss, right=True) / len(self.recent)
        return torch.rand(len(loss), generator=self.draws(1, self.seen)) < rank**self.beta


def _require(good: bool, name: str, allowed: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {value}")


METHODS: dict[str, type[OtherMethod]] = {
    "orderdp": OrderDP,
    "seta": SeTa,
    "ies": IES,
    "selective-backprop": SelectiveBackprop,
}
