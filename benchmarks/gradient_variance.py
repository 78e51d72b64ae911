"""The variance of each policy's gradient at equal cost, relative to uniform sampling; below 1 is better.

    python benchmarks/gradient_variance.py RUN            # a run's folder; minutes for a small network
    python benchmarks/gradient_variance.py runs/compare/runs/full-seed0 --output runs/compare/gradient_variance.json

The second command writes the numbers to where proof.py compares them with the measured cost ratios.

At the last parameters of a run, the gradients of single samples are computed at levels spread over the whole axis. A
policy keeps sample i with probability p_i, draws levels with density d, and weights a sample by 1 / (p_i d). Its
estimate of the mean gradient then has, per sample used, the variance

    V = K E[|g|^2 / (p d)] - |E g|^2,    K the share that is kept, E over samples, levels and random draws.

The result is V divided by the same for p = d = 1, times the relative cost of a sample: below 1 the same variance costs
less. "Preconditioned" is the same with gradients divided by the square root of Adam's running mean of squares.
Intervals (95 %) are a bootstrap over samples.

For comparison there are: the best possible probabilities for samples and for levels; levels stratified within the
batch; a backward pass for half the batch only, selected by the losses of a forward pass for the whole batch (a third of
a sample's cost); and, for a masked autoencoder whose hidden patches don't attend to each other, predicting a share of
them.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from score_signal import random_samples
from torch import Tensor

from pretrain.adapters import Adapter, Batch
from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import LoadedRun, load_run
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.rng import SampleRNG, generator
from pretrain.infobatch.level_stats import LevelStats
from pretrain.infobatch.policies import POLICIES, SamplingRule, ScoreStats, inclusion_probabilities
from pretrain.infobatch.sampler import MIN_RELIABILITY
from pretrain.infobatch.scores import ScoreReliability
from pretrain.training.flops import profile_sample
from pretrain.training.optim import build_optimizer
from pretrain.training.references import with_references

BINS = 32  # of the level axis, for the best possible density
STRATA = 8  # of the level axis, for levels stratified within the batch
HALF = 0.5  # share of the batch that is selected by new losses
SHARE = 0.65  # budget of the policies that have one
UNIFORM = torch.ones(1, 1, dtype=torch.float64)  # density of levels


class Gradients(NamedTuple):
    """Losses and gradients of S samples at D levels each; norms are plain and preconditioned."""

    index: Tensor  # int64 [S]
    level: Tensor  # float64 [S, D]
    loss: Tensor  # float64 [S, D]
    square: Tensor  # float64 [S, D, 2]; squared norm of each gradient
    mean: Tensor  # float64 [2]; squared norm of the mean gradient, an unbiased estimate
    strata: Tensor  # float64 [2]; the same for the mean gradient in each of `STRATA` strata, averaged over the strata


class Estimate(NamedTuple):
    """An estimator of the mean gradient."""

    keep: Tensor  # float64, broadcastable to [S, D, 2]; probability p of each sample
    share: float  # K: mean of p over the data set
    density: Tensor  # float64 [bins, 1 or 2]; density d of levels
    cost: float = 1.0  # of a sample that is used, relative to a forward and backward pass


def trained_parameters(run: LoadedRun) -> tuple[list[Tensor], list[Tensor]]:
    """The trained parameters of a run, and for each 1 / (sqrt(Adam's running mean of squares) + epsilon)."""
    for parameter in profile_sample(run.adapter, run.model, run.source.shape, run.source.classes).unused:
        parameter.requires_grad_(False)
    optimizer = build_optimizer(run.model, run.config.optim)
    packed = run.state.tensors["optimizer"], run.state.values["optimizer"]
    optimizer.load_state_dict(storage.unpack_optimizer(*packed))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any("exp_avg_sq" not in optimizer.state[parameter] for parameter in parameters):
        raise UserError(f"{run.folder}: Muon keeps no running squares of gradients; give a run with --optim.name adamw")
    decay = run.config.optim.betas[1] ** run.state.values["step"]
    squares = [optimizer.state[parameter]["exp_avg_sq"] / (1 - decay) for parameter in parameters]
    return parameters, [1 / (square.sqrt() + 1e-8) for square in squares]


def objective_of(run: LoadedRun) -> Adapter:
    """The objective as it was in training: with the references of posterior-mean targets, if it had them."""
    flops = profile_sample(run.adapter, run.model, run.source.shape, run.source.classes).flops
    device = next(run.model.parameters()).device
    return with_references(run.config, run.adapter, run.source, device, flops, lambda message: None)[0]


def gradients_of(run: LoadedRun, samples: int, draws: int) -> Gradients:
    """Gradients of random training samples, one at a time, at stratified levels.

    Args:
        run: the run.
        samples: number of samples, S.
        draws: levels of each, D, evenly spaced from a random start.
    """
    parameters, scale = trained_parameters(run)
    objective = objective_of(run)
    batch = random_samples(run, samples)
    start = torch.rand(samples, generator=generator(8))
    level = ((start[:, None] + torch.arange(draws) / draws) % 1.0).double()
    loss, square = torch.empty(samples, draws).double(), torch.empty(samples, draws, 2).double()
    totals = [[[torch.zeros_like(p) for p in parameters] for _ in range(STRATA)] for _ in range(2)]
    stratum = (level * STRATA).long()
    for i in range(samples):
        one = Batch(*(field[i : i + 1] for field in batch))
        for draw in range(draws):
            item = one._replace(level=level[i, draw].float().view(1).to(one.image.device))
            value = objective(run.model, item, SampleRNG(0, draw, index=one.index)).loss
            gradient = torch.autograd.grad(value.sum(), parameters)
            loss[i, draw] = value.item()
            for kind, scaled in enumerate((gradient, [g * s for g, s in zip(gradient, scale, strict=True)])):
                square[i, draw, kind] = _squared_norm(scaled)
                torch._foreach_add_(totals[kind][int(stratum[i, draw])], list(scaled))
    mean, strata = torch.zeros(2).double(), torch.zeros(2).double()
    for kind, by_stratum in enumerate(totals):
        # |sum g|^2 - sum |g|^2 is a sum over pairs of different gradients, so this estimates |E g|^2 without bias.
        whole = _squared_norm([sum(parts) for parts in zip(*by_stratum, strict=True)])
        mean[kind] = (whole - square[..., kind].sum()) / (loss.numel() * (loss.numel() - 1))
        for number, total in enumerate(by_stratum):
            inside = square[..., kind][stratum == number]
            strata[kind] += (_squared_norm(total) - inside.sum()) / (len(inside) * (len(inside) - 1)) / STRATA
    return Gradients(batch.index, level, loss, square, mean, strata)


def _squared_norm(gradient: Iterable[Any]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in gradient]).sum()


def second_moment(gradients: Gradients, estimate: Estimate) -> Tensor:
    """K |g|^2 / (p d) of each sample, averaged over its levels: float64 [S, 2]."""
    keep, share, density, _ = estimate
    bin = (gradients.level * len(density)).long()
    return share * (gradients.square / (keep * density[bin])).mean(dim=1)


def by_rule(gradients: Gradients, rule: SamplingRule, score: Tensor) -> Estimate:
    """The estimator of a sampling rule; `score` is that of all samples, float32 [N]."""
    band = torch.bucketize(score, rule.edges, right=True)
    keep = torch.where(score.isnan(), torch.full_like(rule.keep, rule.unseen)[0], rule.keep[band])
    density = UNIFORM if rule.density is None else (rule.density / rule.density.mean())[:, None]
    return Estimate(keep[gradients.index.cpu()][:, None, None], keep.mean().item(), density)


def best_density(gradients: Gradients) -> Tensor:
    """The density of levels with the least second moment, plain and preconditioned: float64 [BINS, 2].

    It is proportional to the root of the mean squared gradient in each bin (Cauchy-Schwarz).
    """
    bin = (gradients.level * BINS).long().flatten()
    total = torch.zeros(BINS, 2, dtype=torch.float64).index_add_(0, bin, gradients.square.flatten(0, 1))
    density = (total / torch.bincount(bin, minlength=BINS)[:, None]).sqrt()
    return density / density.mean(dim=0)


def policies(run: LoadedRun, gradients: Gradients) -> dict[str, Estimate]:
    """The estimators of the policies, and of the best possible choices."""
    state = run.state.tensors["infobatch"]
    score, levels, reliability = state["score"], LevelStats(), ScoreReliability()
    levels.restore(state["levels"])
    reliability.sums = state["reliability"]
    measured = reliability.reliability  # the sampler, too, takes scores of unknown reliability as they are
    stats = ScoreStats(levels.mean / levels.mean.mean(), 1.0 if measured is None else measured)
    if stats.reliability < MIN_RELIABILITY:  # and draws samples uniformly here
        score = torch.full_like(score, torch.nan)
    found = {}
    raw = gradients.loss[:, 0].float()  # at a random level
    below = raw < raw.mean()
    p = torch.where(below, 0.5, 1.0).double()
    found["infobatch"] = Estimate(p[:, None, None], p.mean().item(), UNIFORM)
    found["infobatch rule, corrected scores"] = by_rule(gradients, POLICIES["infobatch"](score, stats), score)
    for name, settings in (("samples", {"over": "samples"}), ("levels", {"over": "levels"}), ("importance", {})):
        policy = POLICIES["importance"]
        found[name] = by_rule(gradients, policy(score, stats, share=SHARE, **settings), score)
    norms = gradients.square.mean(dim=1).sqrt()  # [S, 2]
    ideal = inclusion_probabilities(norms.T, SHARE, 0.0).T[:, None]
    found["best possible choice of samples"] = Estimate(ideal, SHARE, UNIFORM)
    found["best possible choice of levels"] = Estimate(torch.ones(1, 1, 1).double(), 1.0, best_density(gradients))
    size = gradients.loss.sqrt()
    fresh = inclusion_probabilities(size.flatten(), HALF, 0.0).reshape(*size.shape, 1)
    found["backward of half the batch, by fresh losses"] = Estimate(fresh, HALF, UNIFORM, (1 + 2 * HALF) / (3 * HALF))
    return found


def partial(run: LoadedRun, samples: int, draws: int) -> dict[str, tuple[Gradients, float]]:
    """Gradients of predicting a share of the hidden patches, and their relative cost; {} for other decoders."""
    if not getattr(run.model, "cross", False):
        return {}
    run.model.train()
    found = {}
    whole = profile_sample(run.adapter, run.model, run.source.shape, 0).flops
    for share in (0.5, 0.25):
        less = dataclasses.replace(run, adapter=dataclasses.replace(run.adapter, predict=share))  # type: ignore[type-var]
        cost = profile_sample(less.adapter, run.model, run.source.shape, 0).flops / whole
        found[f"predict {share:g} of the hidden patches"] = gradients_of(less, samples, draws), cost
    run.model.eval()
    return found


def compared(run: LoadedRun, samples: int = 160, draws: int = 16) -> dict[str, list[list[float]]]:
    """The relative variance by policy: [plain, preconditioned], each as [value, low, high].

    Args:
        run: the run.
        samples: number of training samples, S.
        draws: levels of each, D.
    """
    gradients = gradients_of(run, samples, draws)
    uniform = gradients.square.mean(dim=1)  # [S, 2]
    rng = np.random.default_rng(0)
    resampled = torch.from_numpy(rng.integers(0, samples, (2000, samples)))

    def relative(moment: Tensor, cost: float = 1.0, mean: Tensor = gradients.mean) -> list[list[float]]:
        value = cost * (moment.mean(0) - mean) / (uniform.mean(0) - gradients.mean)
        samples = cost * (moment[resampled].mean(1) - mean) / (uniform[resampled].mean(1) - gradients.mean)
        low, high = samples.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
        return torch.stack([value, low, high], dim=1).tolist()

    found = {name: relative(second_moment(gradients, e), e.cost) for name, e in policies(run, gradients).items()}
    found["levels stratified within the batch"] = relative(uniform, mean=gradients.strata)
    for name, (others, cost) in partial(run, samples, draws).items():
        found[name] = relative(others.square.mean(dim=1), cost)
    return found


def main(run: tyro.conf.Positional[Path], samples: int = 160, draws: int = 16, output: Path | None = None) -> None:
    """Measure the variance of each policy's gradient at the last checkpoint of a run.

    Args:
        run: folder of a run, preferably without pruning, whose scores are the most complete.
        samples: number of training images.
        draws: levels of each, evenly spaced.
        output: JSON file to write the numbers to.
    """
    with exit_on_user_error():
        found = compared(load_run(run), samples, draws)
    table = Table(
        "policy", "plain", "preconditioned", title=f"{run}: variance relative to uniform sampling at equal cost"
    )
    for name, both in found.items():
        table.add_row(name, *(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in both))
    Console().print(table)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
