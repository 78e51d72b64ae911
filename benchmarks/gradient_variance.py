"""How noisy each policy's gradient is, at equal cost, over that of uniform training: below 1 is a win.

    python benchmarks/gradient_variance.py RUN            # a run's folder; minutes for a small network
    python benchmarks/gradient_variance.py runs/compare/runs/full-seed0 --output runs/compare/gradient_variance.json

The second writes the figures where proof.py sets them beside what the comparison found.

At a run's last parameters, some samples are visited at levels all over the axis, and the gradient of every visit is
taken by itself. A policy keeps sample i with probability p_i and visits levels with density d; such a visit counts
for 1 / (p_i d), so of the gradients g its estimate, per visit, has the variance

    V = K E[|g|^2 / (p d)] - |E g|^2,    K the share that is kept, E over samples, levels and draws,

and V over the same for p = d = 1 is what is told, times what a visit costs: below 1, as much is learned for less.
Preconditioned: |g|^2 is measured in units of Adam's running squares. The intervals (95 %) are a bootstrap over samples.

Beside the policies stand what might be had: the best choice of samples and of levels that could be known, levels
stratified within the batch, backward passes of half the batch alone, chosen by the losses of a forward pass for all
(which is a third of a visit's cost), and, of a masked autoencoder whose hidden patches don't know of each other,
predicting a share of them.
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
from score_signal import some_samples
from torch import Tensor

from pretrain.adapters import Batch
from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import LoadedRun, load_run
from pretrain.core.errors import exit_on_user_error
from pretrain.core.rng import SampleRNG, generator
from pretrain.infobatch.level_stats import LevelStats
from pretrain.infobatch.policies import POLICIES, SamplingRule, ScoreStats
from pretrain.infobatch.scores import ScoreReliability
from pretrain.training.flops import profile_sample
from pretrain.training.optim import build_optimizer

BINS = 32  # of the ideal density of levels
STRATA = 8  # of levels stratified within the batch
HALF = 0.5  # of the batch that fresh losses choose
SHARE = 0.65  # of the visits that policies with a budget are given


class Visits(NamedTuple):
    """Visits of S samples, D each, and their gradients."""

    index: Tensor  # int64 [S]
    level: Tensor  # float64 [S, D]
    loss: Tensor  # float64 [S, D]
    square: Tensor  # float64 [S, D, 2]; squared norm of the gradient, plain and preconditioned
    mean: Tensor  # float64 [2]; the same of the mean gradient, an unbiased estimate
    strata: Tensor  # float64 [2]; the same of the mean gradients of `STRATA` parts of the level axis, on average


class Estimate(NamedTuple):
    """How a policy visits: p of S samples, [S] or [S, D], the share K, d [bins], and a visit's cost over the usual."""

    keep: Tensor
    share: float
    density: Tensor
    price: float = 1.0


def trained_parameters(run: LoadedRun) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that the run trains, and for each 1 / (sqrt of Adam's running squares + epsilon)."""
    for parameter in profile_sample(run.adapter, run.model, run.source.shape, run.source.classes).unused:
        parameter.requires_grad_(False)
    optimizer = build_optimizer(run.model, run.config.optim)
    packed = run.state.tensors["optimizer"], run.state.values["optimizer"]
    optimizer.load_state_dict(storage.unpack_optimizer(*packed))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fade = run.config.optim.betas[1] ** run.state.values["step"]
    squares = [optimizer.state[parameter]["exp_avg_sq"] / (1 - fade) for parameter in parameters]
    return parameters, [1 / (square.sqrt() + 1e-8) for square in squares]


def visited(run: LoadedRun, samples: int, draws: int) -> Visits:
    """Visit samples at stratified levels, one by one."""
    parameters, scale = trained_parameters(run)
    batch = some_samples(run, samples)
    start = torch.rand(samples, generator=generator(8))
    level = ((start[:, None] + torch.arange(draws) / draws) % 1.0).double()
    loss, square = torch.empty(samples, draws).double(), torch.empty(samples, draws, 2).double()
    totals = [[[torch.zeros_like(p) for p in parameters] for _ in range(STRATA)] for _ in range(2)]
    stratum = (level * STRATA).long()
    for i in range(samples):
        one = Batch(*(field[i : i + 1] for field in batch))
        for draw in range(draws):
            at = one._replace(level=level[i, draw].float().view(1).to(one.image.device))
            value = run.adapter(run.model, at, SampleRNG(0, draw, index=one.index)).loss
            gradient = torch.autograd.grad(value.sum(), parameters)
            loss[i, draw] = value.item()
            for kind, parts in enumerate((gradient, [g * s for g, s in zip(gradient, scale, strict=True)])):
                square[i, draw, kind] = _squared(parts)
                torch._foreach_add_(totals[kind][int(stratum[i, draw])], list(parts))
    mean, strata = torch.zeros(2).double(), torch.zeros(2).double()
    for kind, by_stratum in enumerate(totals):
        # |sum g|^2 less the sum of |g|^2 is a sum over pairs of different visits: the mean's square, without bias.
        whole = _squared([sum(parts) for parts in zip(*by_stratum, strict=True)])
        mean[kind] = (whole - square[..., kind].sum()) / (loss.numel() * (loss.numel() - 1))
        for number, total in enumerate(by_stratum):
            inside = square[..., kind][stratum == number]
            strata[kind] += (_squared(total) - inside.sum()) / (len(inside) * (len(inside) - 1)) / STRATA
    return Visits(batch.index, level, loss, square, mean, strata)


def _squared(parts: Iterable[Any]) -> Tensor:
    return torch.stack([part.double().square().sum() for part in parts]).sum()


def second_moment(visits: Visits, estimate: Estimate) -> Tensor:
    """float64 [S, 2]; each sample's part of K E[|g|^2 / (p d)]."""
    keep, share, density, _ = estimate
    at = (visits.level * len(density)).long()
    p = keep if keep.ndim == 2 else keep[:, None]
    return share * (visits.square / (p * density[at])[..., None]).mean(dim=1)


def ruled(visits: Visits, rule: SamplingRule, score: Tensor) -> Estimate:
    """How a rule visits, `score` being those of all samples."""
    band = torch.bucketize(score, rule.edges, right=True)
    keep = torch.where(score.isnan(), torch.full_like(rule.keep, rule.unseen)[0], rule.keep[band])
    density = torch.ones(1, dtype=torch.float64) if rule.density is None else rule.density / rule.density.mean()
    return Estimate(keep[visits.index.cpu()], keep.mean().item(), density)


def filled(size: Tensor, share: float) -> Tensor:
    """P in proportion to `size`, at most 1, and `share` on average."""
    low, high = 0.0, (1 / size.min()).item()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * size).clamp(max=1).mean() < share else (low, middle)
    return (high * size).clamp(max=1)


def policies(run: LoadedRun, visits: Visits) -> dict[str, Estimate]:
    """How each policy visits, and what might be had."""
    memory = run.state.tensors["infobatch"]
    score, levels, repeats = memory["score"], LevelStats(), ScoreReliability()
    levels.restore(memory["levels"])
    repeats.sums = memory["reliability"]
    known = ScoreStats(levels.mean / levels.mean.mean(), repeats.reliability or 0.0)
    uniform = torch.ones(1, dtype=torch.float64)
    found = {}
    raw = visits.loss[:, 0].float()  # one visit's loss, at a level by chance
    below = raw < raw.mean()
    p = torch.where(below, 0.5, 1.0).double()
    found["infobatch"] = Estimate(p, p.mean().item(), uniform)
    found["infobatch rule, corrected scores"] = ruled(visits, POLICIES["infobatch"](score, known), score)
    for name, settings in (("samples", {"over": "samples"}), ("levels", {"over": "levels"}), ("importance", {})):
        policy = POLICIES["importance"]
        found[name] = ruled(visits, policy(score, known, share=SHARE, **settings), score)
    by_sample = visits.square[..., 0].mean(dim=1)
    density = torch.zeros(BINS, dtype=torch.float64).index_add_(
        0, (visits.level * BINS).long().flatten(), visits.square[..., 0].flatten()
    )
    density = (density / torch.bincount((visits.level * BINS).long().flatten(), minlength=BINS)).sqrt()
    density = density / density.mean()
    ideal = filled(by_sample.sqrt(), SHARE)
    found["best possible choice of samples"] = Estimate(ideal, SHARE, uniform)
    found["best possible choice of levels"] = Estimate(torch.full_like(ideal, SHARE), SHARE, density)
    fresh = filled(visits.loss.sqrt(), HALF)
    found["backward of half the batch, by fresh losses"] = Estimate(fresh, HALF, uniform, (1 + 2 * HALF) / (3 * HALF))
    return found


def partial(run: LoadedRun, samples: int, draws: int) -> dict[str, tuple[Visits, float]]:
    """Visits that predict a share of the hidden patches, and what they cost over usual ones."""
    if not getattr(run.model, "cross", False):
        return {}
    run.model.train()
    found = {}
    whole = profile_sample(run.adapter, run.model, run.source.shape, 0).flops
    for share in (0.5, 0.25):
        less = dataclasses.replace(run, adapter=dataclasses.replace(run.adapter, predict=share))  # type: ignore[type-var]
        price = profile_sample(less.adapter, run.model, run.source.shape, 0).flops / whole
        found[f"predict {share:g} of the hidden patches"] = visited(less, samples, draws), price
    run.model.eval()
    return found


def compared(run: LoadedRun, samples: int = 160, draws: int = 16) -> dict[str, list[list[float]]]:
    """V over uniform's by policy: [plain, preconditioned], each as the figure and its interval."""
    visits = visited(run, samples, draws)
    usual = visits.square.mean(dim=1)  # [S, 2]
    rng = np.random.default_rng(0)
    again = torch.from_numpy(rng.integers(0, samples, (2000, samples)))

    def over(theirs: Tensor, price: float = 1.0, less: Tensor = visits.mean) -> list[list[float]]:
        """[plain, preconditioned]: the figure and its interval."""
        value = price * (theirs.mean(0) - less) / (usual.mean(0) - visits.mean)
        others = price * (theirs[again].mean(1) - less) / (usual[again].mean(1) - visits.mean)
        low, high = others.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
        return torch.stack([value, low, high], dim=1).tolist()

    found = {name: over(second_moment(visits, how), how.price) for name, how in policies(run, visits).items()}
    found["levels stratified within the batch"] = over(usual, less=visits.strata)
    for name, (theirs, price) in partial(run, samples, draws).items():
        found[name] = over(theirs.square.mean(dim=1), price)
    return found


def main(run: tyro.conf.Positional[Path], samples: int = 160, draws: int = 16, output: Path | None = None) -> None:
    """Tell how noisy each policy's gradient is at a run's last checkpoint.

    Args:
        run: folder of a run; one without pruning has the fairest scores.
        samples: training images that are looked at.
        draws: visits of each, evenly apart on the level axis.
        output: JSON file for the figures.
    """
    with exit_on_user_error():
        found = compared(load_run(run), samples, draws)
    table = Table("policy", "plain", "preconditioned", title=f"{run}: variance over uniform's at equal cost")
    for name, both in found.items():
        table.add_row(name, *(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in both))
    Console().print(table)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
