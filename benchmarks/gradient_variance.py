"""How noisy each policy's gradient is, at equal cost, over that of uniform training: below 1 is a win.

    python benchmarks/gradient_variance.py RUN            # a run's folder; minutes for a small network

At a run's last parameters, some samples are visited at levels all over the axis, and the gradient of every visit is
taken by itself. A policy keeps sample i with probability p_i and visits levels with density d; such a visit counts
for 1 / (p_i d), so of the gradients g its estimate, per visit, has the variance

    V = K E[|g|^2 / (p d)] - |E g|^2,    K the share that is kept, E over samples, levels and draws,

and V over the same for p = d = 1 is what is told: how much more, or less, a visit is worth. Preconditioned: |g|^2 is
measured in units of Adam's running squares. The intervals (95 %) are a bootstrap over samples.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from score_signal import some_samples
from torch import Tensor

from pretrain import checkpoint
from pretrain.adapter import Batch
from pretrain.cost import first_visit
from pretrain.errors import one_sentence
from pretrain.levels import Levels
from pretrain.memory import Repeats
from pretrain.policies import POLICIES, Known, Rule
from pretrain.rng import Draws, generator
from pretrain.trained import Trained, open_run
from pretrain.training import adamw

BINS = 32  # of the ideal density of levels
SHARE = 0.65  # of the visits that policies with a budget are given


class Visits(NamedTuple):
    """Visits of S samples, D each, and their gradients."""

    index: Tensor  # int64 [S]
    level: Tensor  # float64 [S, D]
    loss: Tensor  # float64 [S, D]
    square: Tensor  # float64 [S, D, 2]; squared norm of the gradient, plain and preconditioned
    mean: Tensor  # float64 [2]; the same of the mean gradient, an unbiased estimate


def trained_parameters(run: Trained) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that the run trains, and for each 1 / (sqrt of Adam's running squares + epsilon)."""
    for parameter in first_visit(run.adapter, run.model, run.source.shape, run.source.classes).unreached:
        parameter.requires_grad_(False)
    optimizer = adamw(run.model, run.config.optim)
    packed = run.state.tensors["optimizer"], run.state.values["optimizer"]
    optimizer.load_state_dict(checkpoint.unpack_optimizer(*packed))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fade = run.config.optim.betas[1] ** run.state.values["step"]
    squares = [optimizer.state[parameter]["exp_avg_sq"] / (1 - fade) for parameter in parameters]
    return parameters, [1 / (square.sqrt() + 1e-8) for square in squares]


def visited(run: Trained, samples: int, draws: int) -> Visits:
    """Visit samples at stratified levels, one by one."""
    parameters, scale = trained_parameters(run)
    batch = some_samples(run, samples)
    start = torch.rand(samples, generator=generator(8))
    level = ((start[:, None] + torch.arange(draws) / draws) % 1.0).double()
    loss, square = torch.empty(samples, draws).double(), torch.empty(samples, draws, 2).double()
    totals = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for i in range(samples):
        one = Batch(*(field[i : i + 1] for field in batch))
        for draw in range(draws):
            at = one._replace(level=level[i, draw].float().view(1).to(one.image.device))
            value = run.adapter(run.model, at, Draws(0, draw, index=one.index)).loss
            gradient = torch.autograd.grad(value.sum(), parameters)
            both = gradient, [g * s for g, s in zip(gradient, scale, strict=True)]
            loss[i, draw] = value.item()
            for kind, parts in enumerate(both):
                square[i, draw, kind] = sum(part.double().square().sum() for part in parts)
                torch._foreach_add_(totals[kind], list(parts))
    n = samples * draws
    whole = torch.stack([sum((t.double().square().sum() for t in total), torch.zeros(())) for total in totals])
    return Visits(batch.index, level, loss, square, (whole - square.sum((0, 1))) / (n * (n - 1)))


def second_moment(visits: Visits, keep: Tensor, share: float, density: Tensor) -> Tensor:
    """float64 [S, 2]; each sample's part of K E[|g|^2 / (p d)].

    Args:
        visits: of S samples.
        keep: float64 [S] or [S, D]; p.
        share: K.
        density: float64 [bins], 1 on average; d.
    """
    at = (visits.level * len(density)).long()
    p = keep if keep.ndim == 2 else keep[:, None]
    return share * (visits.square / (p * density[at])[..., None]).mean(dim=1)


def ruled(visits: Visits, rule: Rule, score: Tensor) -> tuple[Tensor, float, Tensor]:
    """What `second_moment` needs of a rule, `score` being those of all samples."""
    band = torch.bucketize(score, rule.edges, right=True)
    keep = torch.where(score.isnan(), torch.full_like(rule.keep, rule.unseen)[0], rule.keep[band])
    density = torch.ones(1, dtype=torch.float64) if rule.density is None else rule.density / rule.density.mean()
    return keep[visits.index.cpu()], keep.mean().item(), density


def filled(size: Tensor, share: float) -> Tensor:
    """P in proportion to `size`, at most 1, and `share` on average."""
    low, high = 0.0, (1 / size.min()).item()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * size).clamp(max=1).mean() < share else (low, middle)
    return (high * size).clamp(max=1)


def policies(run: Trained, visits: Visits) -> dict[str, tuple[Tensor, float, Tensor]]:
    """Keep probabilities, share and density of each policy, and of the best that could be known."""
    memory = run.state.tensors["infobatch"]
    score, levels, repeats = memory["score"], Levels(), Repeats()
    levels.restore(memory["levels"])
    repeats.sums = memory["repeats"]
    known = Known(levels.usual / levels.usual.mean(), repeats.reliability or 0.0)
    uniform = torch.ones(1, dtype=torch.float64)
    found = {}
    raw = visits.loss[:, 0].float()  # one visit's loss, at a level by chance
    below = raw < raw.mean()
    p = torch.where(below, 0.5, 1.0).double()
    found["published: infobatch, raw losses"] = p, p.mean().item(), uniform
    found["infobatch"] = ruled(visits, POLICIES["infobatch"](score, known), score)
    for name, settings in (("budget", {}), ("levels", {"over": "levels"}), ("joint", {})):
        policy = POLICIES["joint" if name == "levels" else name]
        found[name] = ruled(visits, policy(score, known, share=SHARE, **settings), score)
    by_sample = visits.square[..., 0].mean(dim=1)
    density = torch.zeros(BINS, dtype=torch.float64).index_add_(
        0, (visits.level * BINS).long().flatten(), visits.square[..., 0].flatten()
    )
    density = (density / torch.bincount((visits.level * BINS).long().flatten(), minlength=BINS)).sqrt()
    density = density / density.mean()
    ideal = filled(by_sample.sqrt(), SHARE)
    found["best possible choice of samples"] = ideal, SHARE, uniform
    found["best possible choice of levels"] = torch.full_like(ideal, SHARE), SHARE, density
    return found


def compared(run: Trained, samples: int = 160, draws: int = 16) -> dict[str, list[list[float]]]:
    """V over uniform's by policy: [plain, preconditioned], each as the figure and its interval."""
    visits = visited(run, samples, draws)
    uniform = visits.square.mean(dim=1)  # [S, 2]
    rng = np.random.default_rng(0)
    again = torch.from_numpy(rng.integers(0, samples, (2000, samples)))
    found = {}
    for name, (keep, share, density) in policies(run, visits).items():
        theirs = second_moment(visits, keep, share, density)
        over = (theirs.mean(0) - visits.mean) / (uniform.mean(0) - visits.mean)
        others = (theirs[again].mean(1) - visits.mean) / (uniform[again].mean(1) - visits.mean)
        low, high = others.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
        found[name] = torch.stack([over, low, high], dim=1).tolist()
    return found


def main(run: tyro.conf.Positional[Path], samples: int = 160, draws: int = 16, output: Path | None = None) -> None:
    """Tell how noisy each policy's gradient is at a run's last checkpoint.

    Args:
        run: folder of a run; one without pruning has the fairest scores.
        samples: training images that are looked at.
        draws: visits of each, evenly apart on the level axis.
        output: JSON file for the figures.
    """
    with one_sentence():
        found = compared(open_run(run), samples, draws)
    table = Table("policy", "plain", "preconditioned", title=f"{run}: variance over uniform's at equal cost")
    for name, both in found.items():
        table.add_row(name, *(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in both))
    Console().print(table)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
