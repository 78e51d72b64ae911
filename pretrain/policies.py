"""Policies: pure functions from what is known of the samples to the plan of one epoch.

Every policy keeps the two promises that make a weighted visit unbiased (docs/method.md): a sample's
chance of being visited is decided before the epoch's noise, masks and crops are drawn, and its weight
is one over exactly that chance.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Plan(NamedTuple):
    """One epoch: whom to visit, what each visit counts for, and at what level."""

    order: Tensor  # int64 [K]; whom to visit, in this order
    weight: Tensor  # float32 [N]; what a visit counts for, 0 where pruned; sums to N
    level: Tensor  # float32 [N] in [0, 1); where each is visited


class Policy(Protocol):
    """A plan from scores.

    Args:
        score: float32 [N]; how badly a sample is learned, about 1 on average; NaN where it was never visited.
        level: float32 [N] in [0, 1); uniform draws of where to visit each sample.
        ratio: share skipped among well-learned samples, in [0, 1).
        rng: the only source of randomness.
    """

    def __call__(self, score: Tensor, level: Tensor, *, ratio: float, rng: torch.Generator) -> Plan:
        """Draw one epoch."""
        ...


def full(score: Tensor, level: Tensor, *, ratio: float, rng: torch.Generator) -> Plan:
    """Everybody, weight 1: ordinary training."""
    return Plan(torch.randperm(len(score), generator=rng), torch.ones_like(score), level)


def infobatch(score: Tensor, level: Tensor, *, ratio: float, rng: torch.Generator) -> Plan:
    """Skip a share `ratio` of the samples below the mean score; the k kept of those n weigh n / k.

    Qin et al. (ICLR 2024), section 2, with k of n drawn without replacement, so that the weights sum to N whatever
    n and `ratio` are. A sample that was never visited is never pruned.
    """
    order = torch.randperm(len(score), generator=rng)  # first, so that skipping nobody is `full` to the bit
    # The threshold is rounded to the scores' own precision: equal scores are then not below their mean.
    mean = score[~score.isnan()].double().mean().to(score.dtype)
    low = (score < mean).nonzero().squeeze(1)
    low = low[torch.randperm(len(low), generator=rng)]
    skipped, kept = low.tensor_split([int(ratio * len(low))])
    weight = torch.ones_like(score)
    weight[skipped] = 0.0
    weight[kept] = len(low) / max(len(kept), 1)
    return Plan(order[weight[order] > 0], weight, level)


POLICIES: dict[str, Callable[..., Plan]] = {"full": full, "infobatch": infobatch}
