"""Policies: pure functions from what is known of the samples to the rule by which an epoch is planned.

A policy cuts the scores into bands and says which share of each band is kept, and how densely levels are
visited. It never says a weight: what is kept of a band is drawn without replacement, k of n, and weighs
n / k; a level that is visited d times as densely as uniformly weighs 1 / d. So no policy, whatever it
does with the scores, makes the expected gradient another one (docs/method.md).

One of your own is one function in one file, `policy="path/to/mine.py"`; docs/policies.md shows it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20  # scores looked at at a time
CELLS = 1 << 16  # of a histogram of scores: a float32 by its upper 16 bits, 128 cells an octave
MIN_DENSITY = 1e-3  # of a level, relative to the mean: every level is seen, and no weight exceeds 1,000
MOST_EDGES = 200  # of a rule; a sample's band is a byte
BANDS = 64  # that `importance` cuts the scores into, at most,
LEAST = 16  # about as many samples in each, so that a share of them is a number of samples


class ScoreStats(NamedTuple):
    """What is known beside the scores.

    Attributes:
        level: float64 [bins]; what losses usually are at each level, 1 on average. All 1 as long as nothing is known.
        reliability: share of a difference between two scores that further visits would show again, in [0, 1].
    """

    level: Tensor
    reliability: float


class SamplingRule(NamedTuple):
    """How an epoch is planned.

    Attributes:
        edges: float32 [E], ascending, finite; a score s is in band b if edges[b - 1] <= s < edges[b].
        keep: float64 [E + 1], each in (0, 1]; the share of every band that is kept.
        unseen: the share of the samples that were never visited that is kept, in (0, 1].
        density: float64 [bins], each above 0; how often levels are visited, to scale. None: all alike.
    """

    edges: Tensor
    keep: Tensor
    unseen: float = 1.0
    density: Tensor | None = None


# A policy's arguments are the scores, float32 [N], NaN where a sample was never seen, and `ScoreStats`. One that keeps
# to a budget also takes `share`, the share of the samples that the epoch may use. Its other keyword arguments are its
# settings, with their defaults.
Policy = Callable[..., SamplingRule]

NOWHERE = torch.empty(0)


def full(score: Tensor, known: ScoreStats) -> SamplingRule:
    """Everybody, weight 1: ordinary training."""
    return SamplingRule(NOWHERE, torch.ones(1, dtype=torch.float64))


def random(score: Tensor, known: ScoreStats, *, share: float) -> SamplingRule:
    """A fresh uniform subset of `share` of the samples, each weighing 1 / share: the control arm.

    As RS2 (Okanovic et al., ICLR 2024) but with the weights of an unbiased sum.
    """
    return SamplingRule(NOWHERE, torch.full((1,), share, dtype=torch.float64), share)


def raw_losses(policy: Policy) -> Policy:
    """Mark a policy whose scores are the last losses as they are: not compared across noise levels, not smoothed."""
    policy.raw_losses = True  # pyright: ignore[reportFunctionMemberAccess]
    return policy


@raw_losses
def infobatch(score: Tensor, known: ScoreStats, *, prune_ratio: float = 0.5) -> SamplingRule:
    """The published method: skip a share of the samples whose last loss is below the mean; n / k weighs those kept.

    Qin et al. (ICLR 2024), section 2: p = 1 - prune_ratio where loss < mean, else 1; with annealing at the end.

    Args:
        score, known: of the samples.
        prune_ratio: share of the samples below the mean that is skipped, in [0, 1).
    """
    _require(0 <= prune_ratio < 1, "prune_ratio", "in [0, 1)", prune_ratio)
    total = seen = 0.0
    for chunk in score.split(CHUNK):
        value = chunk.numpy()
        total += value.sum(dtype=np.float64, where=value == value)
        seen += np.count_nonzero(value == value)
    if not seen:
        return full(score, known)
    # Rounded to the scores' own precision: equal scores are then not below their mean.
    return SamplingRule(
        torch.tensor([total / seen], dtype=score.dtype), torch.tensor([1 - prune_ratio, 1.0], dtype=torch.float64)
    )


@raw_losses
def quantile(
    score: Tensor, known: ScoreStats, *, at: tuple[float, ...] = (0.2, 0.85), keep: tuple[float, ...] = (0.25, 0.5, 1.0)
) -> SamplingRule:
    """Keep a share of each band between percentiles; the default skips 47.5 %.

    The variant of the authors' ImageNet runs: a quarter of the lowest 20 %, half of what lies below the 85th
    percentile, all of the rest.
    """
    _require(len(keep) == len(at) + 1, "keep", f"one share more than the {len(at)} of `at`", keep)
    _require(list(at) == sorted(at) and all(0 < q < 1 for q in at), "at", "ascending, in (0, 1)", at)
    return SamplingRule(at_quantiles(score, at), torch.tensor(keep, dtype=torch.float64))


def importance(
    score: Tensor,
    known: ScoreStats,
    *,
    share: float,
    over: Literal["samples", "levels", "both"] = "both",
    floor: float = 0.2,
    level_floor: float = 0.1,
) -> SamplingRule:
    """Importance sampling: samples in proportion to the root of their score, levels to the root of their usual loss.

    The variance of a weighted gradient is least where probabilities are in proportion to the root of the mean squared
    gradient norm, of which the root of a squared error is a proxy (for timesteps: Nichol and Dhariwal 2021). Of the
    samples, p = min(1, max(floor, c sqrt(score))), with c such that the mean of p is `share` (water-filling); scores
    are first drawn towards their mean as far as they are not reliable. A weight is 1 / (p * density of the level).

    Args:
        score, known: of the samples and levels.
        share: of the samples that are used, in (0, 1].
        over: what is chosen by what was learned; with "levels" alone the samples are a uniform subset, those never
            seen like any other.
        floor: least probability of a sample, so that no weight exceeds 1 / floor; less where `share` is less.
        level_floor: least density of a level, relative to uniform, in (0, 1].
    """
    _require(over in ("samples", "levels", "both"), "over", "samples, levels or both", over)
    _require(0 < floor <= 1, "floor", "in (0, 1]", floor)
    _require(0 < level_floor <= 1, "level_floor", "in (0, 1]", level_floor)
    rule = random(score, known, share=share) if over == "levels" else _by_score(score, known, share, floor)
    if over != "samples":
        root = known.level.sqrt()
        rule = rule._replace(density=level_floor + (1 - level_floor) * root / root.mean())
    return rule


def _by_score(score: Tensor, known: ScoreStats, share: float, floor: float) -> SamplingRule:
    """`share` of the samples, whoever was never visited first, the others in proportion to the root of their score."""
    count, value = histogram(score)
    seen = count.sum().item()
    rest = (share * len(score) - (len(score) - seen)) / max(seen, 1)
    rest = min(max(rest, min(floor, share)), 1.0)
    if not seen:
        return SamplingRule(NOWHERE, torch.full((1,), rest, dtype=torch.float64))
    return _water_filling(count, value, rest, min(floor, rest), known.reliability)


def _water_filling(count: Tensor, value: Tensor, share: float, floor: float, reliability: float) -> SamplingRule:
    """Bands of about equally many samples, and the share of each that is kept."""
    bands = max(1, min(BANDS, int(count.sum()) // LEAST))
    band = ((count.cumsum(0) - count / 2) / count.sum() * bands).long().clamp(max=bands - 1)[count > 0]
    count, value = count[count > 0], value[count > 0]
    first = torch.cat([torch.tensor([True]), band.diff() > 0])  # cells that begin a band
    band = first.cumsum(0) - 1
    n = torch.zeros(int(band[-1]) + 1, dtype=torch.float64).index_add_(0, band, count)
    mean = torch.zeros_like(n).index_add_(0, band, count * value) / n
    overall = (n * mean).sum() / n.sum()
    root = (overall + reliability * (mean - overall)).clamp(min=1e-12 * overall + 1e-300).sqrt()
    low, high = 0.0, 1 / root.min().item()
    for _ in range(100):  # the share kept rises with c
        c = (low + high) / 2
        kept = ((c * root).clamp(floor, 1) * n).sum().item()
        low, high = (c, high) if kept < share * n.sum().item() else (low, c)
    return SamplingRule(_cell_start(value[first])[1:], (high * root).clamp(floor, 1))


def histogram(score: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores lie in each of `CELLS` cells, and each cell's middle: float64 [CELLS] twice.

    A cell is a float32's upper 16 bits, so cells ascend and are 0.8 % wide at most. Unvisited samples are left out.
    """
    bits = score.view(torch.int32)
    count = torch.zeros(CELLS, dtype=torch.int64)
    for chunk in bits.split(CHUNK):
        count += torch.bincount((chunk >> 16).clamp_(min=0), minlength=CELLS)
    count[0x7F80:] = 0
    cells = torch.arange(CELLS, dtype=torch.int32)
    middle = ((cells << 16) + (1 << 15)).view(torch.float32).double()
    middle[0x7F80:] = 0
    return count.double(), middle


def _cell_start(middle: Tensor) -> Tensor:
    """float32; the least score that lies in the cell of a middle."""
    return ((middle.float().view(torch.int32) >> 16) << 16).view(torch.float32)


def at_quantiles(score: Tensor, at: tuple[float, ...]) -> Tensor:
    """float32 [len(at)]; the scores that these shares of all scores precede, exactly; 0 where nobody has one."""
    count, _ = histogram(score)
    if not count.any():
        return torch.zeros(len(at))
    return torch.stack([_at_rank(score, count, int(q * count.sum().item())) for q in at])


def _at_rank(score: Tensor, count: Tensor, rank: int) -> Tensor:
    """float32; the score that `rank` others precede, exactly, with `count` as of `histogram`."""
    up_to = count.cumsum(0)
    cell = int((up_to > rank).nonzero()[0])
    inside = [chunk[chunk.view(torch.int32) >> 16 == cell] for chunk in score.split(CHUNK)]
    return torch.cat(inside).sort().values[rank - int(up_to[cell] - count[cell])]


def checked(rule: Any) -> SamplingRule:
    """The rule, if it is one.

    Raises:
        ValueError: it is not, and why.
    """
    _require(isinstance(rule, SamplingRule), "what a policy returns", "a Rule", type(rule).__name__)
    edges, keep, unseen, density = rule
    _require(edges.ndim == 1 and len(edges) <= MOST_EDGES, "edges", f"[E], at most {MOST_EDGES}", tuple(edges.shape))
    good = bool(edges.isfinite().all()) and bool((edges.diff() >= 0).all())
    _require(good, "edges", "finite and ascending", edges.tolist())
    _require(keep.shape == (len(edges) + 1,), "keep", f"one share a band, {len(edges) + 1}", tuple(keep.shape))
    _require(bool(((keep > 0) & (keep <= 1)).all()), "keep", "in (0, 1]: nobody may starve", keep.tolist())
    _require(0 < unseen <= 1, "unseen", "in (0, 1]", unseen)
    if density is not None:
        good = density.ndim == 1 and bool(density.isfinite().all()) and bool((density > 0).all())
        _require(good, "density", "[bins], finite and above 0", density.tolist())
        least = (density.min() / density.double().mean()).item()  # less could not be told from 0 by 24-bit numbers
        _require(least >= MIN_DENSITY, "density", f"at least {MIN_DENSITY} of its mean", f"{least:.2g} of it")
    dense = None if density is None else density.double()
    return SamplingRule(edges.float(), keep.double(), float(unseen), dense)


def uses_raw_losses(policy: str | Policy) -> bool:
    """Whether a policy, by name or itself, is marked by `raw_losses`."""
    return getattr(POLICIES.get(policy) if isinstance(policy, str) else policy, "raw_losses", False)


def with_settings(policy: str | Policy, budgeted: bool, settings: dict[str, Any]) -> Policy:
    """The policy, by name or itself, its settings filled in.

    Args:
        policy: a name in `POLICIES`, or a function like those there.
        budgeted: whether it will be told the `share` that an epoch may visit.
        settings: by name.

    Raises:
        ValueError: there is none of that name, or it has no such setting, or keeps to no budget, or needs one.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; there are {', '.join(POLICIES)}")
        policy = POLICIES[policy]
    name = getattr(policy, "__name__", type(policy).__name__)
    theirs = {item.name for item in inspect.signature(policy).parameters.values() if item.kind == item.KEYWORD_ONLY}
    if budgeted != ("share" in theirs):
        able = ", ".join(other for other, made in POLICIES.items() if "share" in inspect.signature(made).parameters)
        raise ValueError(
            f"policy {name} keeps to no budget; {able} do"
            if budgeted
            else f"policy {name} needs a budget, the share of the visits to spend, for example budget=0.6"
        )
    for setting in settings:
        if setting not in theirs - {"share"}:
            raise ValueError(
                f"policy {name} has no setting {setting!r}; it has {', '.join(sorted(theirs - {'share'})) or 'none'}"
            )
    return partial(policy, **settings)


def _require(good: bool, name: str, allowed: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {value}")


POLICIES: dict[str, Policy] = {policy.__name__: policy for policy in (full, random, infobatch, quantile, importance)}
