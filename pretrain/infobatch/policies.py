"""Policies: pure functions from the scores to the rule by which an epoch is planned.

A policy cuts the scores into bands and returns the share of each band that is used, and how densely levels are drawn.
It never returns weights: k of the n samples of a band are drawn without replacement and weigh n / k; a level that is
drawn d times as densely as uniformly weighs 1 / d. So the expected gradient is that of the full data set under every
policy (docs/concepts.md).

A policy of your own is a function, `InfoBatch(..., policy=mine)`, or one in a file, `--pruning.policy path/to/mine.py`;
docs/policies.md has an example.
"""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.infobatch.histogram import CHUNK, cell_start, histogram, quantiles

MIN_DENSITY = 1e-3  # of a level, relative to the mean: every level is drawn, and no weight exceeds 1,000
MAX_EDGES = 200  # of a rule; a sample's band is a byte
MAX_BANDS = 64  # that `importance` cuts the scores into
MIN_BAND_SIZE = 16  # samples in each, about; k of n needs an n


class ScoreStats(NamedTuple):
    """Statistics of the scores.

    Attributes:
        level: float64 [bins]; mean loss at each level, 1 on average. All 1 until the first epoch has ended.
        reliability: share of a difference between two scores that the next losses of these samples are expected to
            show again, in [0, 1].
    """

    level: Tensor
    reliability: float


class SamplingRule(NamedTuple):
    """How an epoch is planned.

    Attributes:
        edges: float32 [E], ascending, finite; a score s is in band b if edges[b - 1] <= s < edges[b].
        keep: float64 [E + 1], each in (0, 1]; the share of each band that is used.
        unseen: share of the samples without a score that is used, in (0, 1].
        density: float64 [bins], each above 0; of levels, up to a factor. None: uniform.
    """

    edges: Tensor
    keep: Tensor
    unseen: float = 1.0
    density: Tensor | None = None


# Called with the scores, float32 [N], NaN where a sample has none yet, and `ScoreStats`. A policy with a budget also
# has the keyword argument `share`, the share of the samples that the epoch may use. Further keyword arguments are its
# settings, with their defaults.
Policy = Callable[..., SamplingRule]

NO_EDGES = torch.empty(0, dtype=torch.float32)


def full(score: Tensor, stats: ScoreStats) -> SamplingRule:
    """All samples with weight 1: ordinary training."""
    return SamplingRule(NO_EDGES, torch.ones(1, dtype=torch.float64))


def random(score: Tensor, stats: ScoreStats, *, share: float) -> SamplingRule:
    """A fresh uniform subset of `share` of the samples, each weighing 1 / share: the control arm.

    As RS2 (Okanovic et al., ICLR 2024) but with the weights of an unbiased sum.
    """
    return SamplingRule(NO_EDGES, torch.full((1,), share, dtype=torch.float64), share)


def raw_losses(policy: Policy) -> Policy:
    """Mark a policy whose scores are the last losses themselves: not compared across levels, not smoothed."""
    policy.raw_losses = True  # pyright: ignore[reportFunctionMemberAccess]
    return policy


@raw_losses
def infobatch(score: Tensor, stats: ScoreStats, *, prune_ratio: float = 0.5) -> SamplingRule:
    """The published method: skip a share of the samples whose last loss is below the mean.

    Qin et al. (ICLR 2024), section 2: p = 1 - prune_ratio where loss < mean, else 1; with annealing at the end.

    Args:
        score, stats: scores and their statistics.
        prune_ratio: share of the samples below the mean that is skipped, in [0, 1).
    """
    _require(0 <= prune_ratio < 1, "prune_ratio", "in [0, 1)", prune_ratio)
    total = seen = 0.0
    for chunk in score.split(CHUNK):
        value = chunk.numpy()
        total += value.sum(dtype=np.float64, where=value == value)
        seen += np.count_nonzero(value == value)
    if not seen:
        return full(score, stats)
    # Rounded to the scores' own precision: equal scores are then not below their mean.
    return SamplingRule(
        torch.tensor([total / seen], dtype=score.dtype), torch.tensor([1 - prune_ratio, 1.0], dtype=torch.float64)
    )


@raw_losses
def quantile(
    score: Tensor, stats: ScoreStats, *, at: tuple[float, ...] = (0.2, 0.85), keep: tuple[float, ...] = (0.25, 0.5, 1.0)
) -> SamplingRule:
    """Use a share of each band between quantiles; the default skips 47.5 %.

    The variant of the authors' ImageNet runs: a quarter of the samples below the 20th percentile, half of those between
    the 20th and the 85th, all above.

    Args:
        score, stats: scores and their statistics.
        at: quantiles that separate the bands, ascending, in (0, 1).
        keep: share of each band that is used, in (0, 1].
    """
    _require(len(keep) == len(at) + 1, "keep", f"one share more than the {len(at)} of `at`", keep)
    _require(list(at) == sorted(at) and all(0 < q < 1 for q in at), "at", "ascending, in (0, 1)", at)
    return SamplingRule(quantiles(score, at), torch.tensor(keep, dtype=torch.float64))


def importance(
    score: Tensor,
    stats: ScoreStats,
    *,
    share: float,
    over: Literal["samples", "levels", "both"] = "both",
    floor: float = 0.2,
    level_floor: float = 0.1,
) -> SamplingRule:
    """Importance sampling over samples, levels, or both.

    The variance of a weighted gradient is least if probabilities are proportional to the root mean square of the
    gradient norm; for a squared error the square root of the loss is a proxy (for timesteps: Nichol and Dhariwal,
    2021). Samples have p = min(1, max(floor, c sqrt(score))) with c such that the mean of p is `share` (water-filling),
    where scores are first shrunk towards their mean as far as they are not reliable. Levels have a density proportional
    to the square root of their mean loss. A sample's weight is 1 / (p * density of its level).

    Args:
        score, stats: scores and their statistics.
        share: of the samples that are used, in (0, 1].
        over: what has non-uniform probabilities. With "levels" the samples are a uniform subset, with or without a
            score.
        floor: least probability of a sample, so that 1 / p is at most 1 / floor; lower if `share` is.
        level_floor: least density of a level relative to uniform, in (0, 1].
    """
    _require(over in ("samples", "levels", "both"), "over", "samples, levels or both", over)
    _require(0 < floor <= 1, "floor", "in (0, 1]", floor)
    _require(0 < level_floor <= 1, "level_floor", "in (0, 1]", level_floor)
    rule = random(score, stats, share=share) if over == "levels" else _by_score(score, stats, share, floor)
    if over != "samples":
        rms = stats.level.sqrt()
        rule = rule._replace(density=level_floor + (1 - level_floor) * rms / rms.mean())
    return rule


def _by_score(score: Tensor, stats: ScoreStats, share: float, floor: float) -> SamplingRule:
    """`share` of the samples: all without a score, the others in proportion to the square root of their score."""
    count, value = histogram(score)
    seen = count.sum().item()
    rest = (share * len(score) - (len(score) - seen)) / max(seen, 1)
    rest = min(max(rest, min(floor, share)), 1.0)
    if not seen:
        return SamplingRule(NO_EDGES, torch.full((1,), rest, dtype=torch.float64))
    return _water_filling(count, value, rest, min(floor, rest), stats.reliability)


def _water_filling(count: Tensor, value: Tensor, share: float, floor: float, reliability: float) -> SamplingRule:
    """Bands of about equally many samples, and the share of each that is used."""
    bands = max(1, min(MAX_BANDS, int(count.sum()) // MIN_BAND_SIZE))
    band = ((count.cumsum(0) - count / 2) / count.sum() * bands).long().clamp(max=bands - 1)[count > 0]
    count, value = count[count > 0], value[count > 0]
    first = torch.cat([torch.tensor([True]), band.diff() > 0])  # the first cell of each band
    band = first.cumsum(0) - 1
    n = torch.zeros(int(band[-1]) + 1, dtype=torch.float64).index_add_(0, band, count)
    mean = torch.zeros_like(n).index_add_(0, band, count * value) / n
    overall = (n * mean).sum() / n.sum()
    rms = (overall + reliability * (mean - overall)).clamp(min=1e-12 * overall + 1e-300).sqrt()
    return SamplingRule(cell_start(value[first])[1:], inclusion_probabilities(rms, share, floor, n))


def inclusion_probabilities(size: Tensor, share: float, floor: float, count: Tensor | None = None) -> Tensor:
    """min(1, max(floor, c size)) with c such that the mean over the last dimension is `share` (water-filling).

    If gradient norms are proportional to `size`, a weighted sum has the least variance at these probabilities for that
    mean, up to the floor.

    Args:
        size: float64 [..., N], positive.
        share: in (0, 1].
        floor: least probability, at most `share`.
        count: [..., N], not negative; how many samples each element stands for. None: 1.

    Returns:
        float64 [..., N], in [floor, 1].
    """
    count = torch.ones_like(size) if count is None else count
    wanted = share * count.sum(dim=-1, keepdim=True)
    high = 1 / size.amin(dim=-1, keepdim=True)
    low = torch.zeros_like(high)
    for _ in range(100):  # bisection: the sum rises with c
        c = (low + high) / 2
        below = ((c * size).clamp(floor, 1) * count).sum(dim=-1, keepdim=True) < wanted
        low, high = torch.where(below, c, low), torch.where(below, high, c)
    return (high * size).clamp(floor, 1)


def checked(rule: Any) -> SamplingRule:
    """Validate what a policy returned.

    Raises:
        ValueError: it is not a `SamplingRule`, or a field is out of range.
    """
    _require(isinstance(rule, SamplingRule), "what a policy returns", "a SamplingRule", type(rule).__name__)
    edges, keep, unseen, density = rule
    for name, value in (("edges", edges), ("keep", keep), *([("density", density)] if density is not None else [])):
        _require(isinstance(value, Tensor), name, "a tensor", type(value).__name__)
    _require(edges.ndim == 1 and len(edges) <= MAX_EDGES, "edges", f"[E], at most {MAX_EDGES}", tuple(edges.shape))
    good = bool(edges.isfinite().all()) and bool((edges.diff() >= 0).all())
    _require(good, "edges", "finite and ascending", edges.tolist())
    _require(keep.shape == (len(edges) + 1,), "keep", f"one share per band, {len(edges) + 1}", tuple(keep.shape))
    in_range = bool(((keep > 0) & (keep <= 1)).all())
    _require(in_range, "keep", "in (0, 1], so that every sample has a chance", keep.tolist())
    _require(0 < unseen <= 1, "unseen", "in (0, 1]", unseen)
    if density is not None:
        good = density.ndim == 1 and bool(density.isfinite().all()) and bool((density > 0).all())
        _require(good, "density", "[bins], finite and above 0", density.tolist())
        relative = (density.min() / density.double().mean()).item()  # levels are drawn by 24-bit numbers
        _require(relative >= MIN_DENSITY, "density", f"at least {MIN_DENSITY} of its mean", f"{relative:.2g} of it")
        density = density.double()
    return SamplingRule(edges.float(), keep.double(), float(unseen), density)


def uses_raw_losses(policy: str | Policy) -> bool:
    """Whether a policy, given as a function or by its name, is marked by `raw_losses`."""
    return getattr(POLICIES.get(policy) if isinstance(policy, str) else policy, "raw_losses", False)


def with_settings(policy: str | Policy, budgeted: bool, settings: dict[str, Any]) -> Policy:
    """The policy as a function with its settings bound.

    Args:
        policy: a name in `POLICIES`, or a function like those there.
        budgeted: whether it will be called with `share`.
        settings: by name.

    Raises:
        ValueError: there is no such policy or setting, or a budget is missing, or given to a policy without one.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; there are {', '.join(POLICIES)}")
        policy = POLICIES[policy]
    name = getattr(policy, "__name__", type(policy).__name__)
    accepted = {item.name for item in inspect.signature(policy).parameters.values() if item.kind == item.KEYWORD_ONLY}
    if budgeted != ("share" in accepted):
        able = ", ".join(other for other, made in POLICIES.items() if "share" in inspect.signature(made).parameters)
        raise ValueError(
            f"policy {name} takes no budget (it has no keyword-only argument share); {able} do"
            if budgeted
            else f"policy {name} needs a budget, the share of N x epochs samples to use, for example budget=0.6"
        )
    for setting in settings:
        if setting not in accepted - {"share"}:
            raise ValueError(
                f"policy {name} has no setting {setting!r}; it has {', '.join(sorted(accepted - {'share'})) or 'none'}"
            )
    return partial(policy, **settings)


def _require(good: bool, name: str, allowed: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {value}")


POLICIES: dict[str, Policy] = {policy.__name__: policy for policy in (full, random, infobatch, quantile, importance)}
