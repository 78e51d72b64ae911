"""What a loss tells of its sample: how much of its variance is the sample, the level and the luck of the draw.

    python benchmarks/score_signal.py RUN            # a run's folder; a minute for a small network

Some samples are visited at every one of some levels, several times, by the trained network. Raw losses are taken as
they are; corrected ones are compared with what the run found usual at their level, as its scores are. Then:

- the shares of the variance (a random-effects analysis of variance, unbiased, so a share can come out below 0): of
  the level, of the sample, of the sample at that level, and of the draw: noise, mask;
- the correlation of the mean of k visits, at random levels, with the sample's true mean over all levels and draws;
- the share of the decision "below the mean, so it may be skipped" that the level of the last visit makes: how much
  of that decision's variance the means by level explain.
"""

import json
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pretrain.adapters import Batch
from pretrain.checkpoint.load_run import LoadedRun, load_run
from pretrain.core.errors import exit_on_user_error
from pretrain.core.rng import SampleRNG, generator
from pretrain.data.images import on_device
from pretrain.infobatch.level_stats import LevelStats


def some_samples(run: LoadedRun, count: int) -> Batch:
    """A random choice of the training images, on the model's device."""
    size = len(run.source.train)
    chosen = torch.randperm(size, generator=generator(7))[:count].sort().values
    plain = next(run.source.train.batches(chosen.tolist(), count))
    return on_device(plain, next(run.model.parameters()).device)


@torch.no_grad()
def visited(run: LoadedRun, batch: Batch, levels: int, draws: int) -> Tensor:
    """float64 [S, levels, draws]; losses at the middles of equal parts of the level axis."""
    losses = []
    for number in range(levels):
        level = torch.full_like(batch.level, (number + 0.5) / levels)
        at = [
            run.adapter(run.model, batch._replace(level=level), SampleRNG(0, number, draw, index=batch.index))
            for draw in range(draws)
        ]
        losses.append(torch.stack([(a.loss if a.score is None else a.score).double().cpu() for a in at], dim=1))
    return torch.stack(losses, dim=1)


def shares(x: np.ndarray) -> dict[str, float]:
    """Shares of the variance of x, [S, levels, draws], by the expected mean squares of the two-way random model."""
    s, u, r = x.shape
    cell, row, column, all = x.mean(2), x.mean((1, 2)), x.mean((0, 2)), x.mean()
    draw = ((x - cell[..., None]) ** 2).sum() / (s * u * (r - 1))
    both = r * ((cell - row[:, None] - column + all) ** 2).sum() / ((s - 1) * (u - 1))
    sample = u * r * ((row - all) ** 2).sum() / (s - 1)
    level = s * r * ((column - all) ** 2).sum() / (u - 1)
    parts = {
        "level": (level - both) / (s * r),
        "sample": (sample - both) / (u * r),
        "sample at its level": (both - draw) / r,
        "draw": draw,
    }
    total = sum(parts.values())
    return {name: float(part / total) for name, part in parts.items()}


def correlations(x: np.ndarray, visits: tuple[int, ...], times: int = 200) -> dict[str, float]:
    """Correlation of the mean of k visits with the samples' true means.

    Half of the draws tell the truth, the visits come from the other half; the truth's own error is taken out by the
    reliability of its means.
    """
    s, _, r = x.shape
    rng = np.random.default_rng(0)
    truth, other = x[:, :, : r // 2].mean((1, 2)), x[:, :, r // 2 :].reshape(s, -1)
    halves = x[:, :, 0 : r // 2 : 2].mean((1, 2)), x[:, :, 1 : r // 2 : 2].mean((1, 2))
    half = np.corrcoef(*halves)[0, 1]
    reliable = (2 * half / (1 + half)) ** 0.5 if half > 0 else np.nan  # Spearman and Brown
    found = {}
    for k in visits:
        means = [
            np.take_along_axis(other, rng.integers(0, other.shape[1], (s, k)), axis=1).mean(1) for _ in range(times)
        ]
        found[f"{k} visits"] = float(np.mean([np.corrcoef(mean, truth)[0, 1] for mean in means]) / reliable)
    return found


def decided_by_level(x: np.ndarray) -> float:
    """Share of the variance of "below the mean" that the level explains."""
    below = (x < x.mean()).astype(float)
    chance = below.var() / (x.shape[0] * x.shape[2])  # what the means by level differ by without any cause
    return float(max(below.mean((0, 2)).var() - chance, 0) / below.var())


def signal(run: LoadedRun, samples: int = 200, levels: int = 16, draws: int = 8) -> dict[str, dict[str, float]]:
    """Everything above, of raw and of corrected losses."""
    raw = visited(run, some_samples(run, samples), levels, draws)
    usual = LevelStats()
    usual.restore(run.state.tensors["infobatch"]["levels"])
    level = ((torch.arange(levels) + 0.5) / levels).view(1, -1, 1).expand_as(raw)
    corrected = usual.scores_of(raw.flatten(), level.flatten().double(), torch.zeros(raw.numel(), dtype=torch.float64))
    found = {}
    for name, x in (("raw", raw.numpy()), ("corrected", corrected.view(raw.shape).numpy())):
        told = {f"share of {part}": share for part, share in shares(x).items()}
        told |= {f"correlation, {k}": value for k, value in correlations(x, (1, 4, 10)).items()}
        found[name] = told | {"decided by level": decided_by_level(x)}
    return found


def main(
    run: tyro.conf.Positional[Path], samples: int = 200, levels: int = 16, draws: int = 8, output: Path | None = None
) -> None:
    """Tell what a run's losses say of its samples.

    Args:
        run: folder of a run.
        samples: training images that are looked at.
        levels: at which each is visited.
        draws: visits at each level, 4 or more.
        output: JSON file for the figures.
    """
    with exit_on_user_error():
        found = signal(load_run(run), samples, levels, draws)
    table = Table("", *found, title=f"{run}: what a loss tells of its sample")
    for name in found["raw"]:
        table.add_row(name, *(f"{column[name]:.3f}" for column in found.values()))
    Console().print(table)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
