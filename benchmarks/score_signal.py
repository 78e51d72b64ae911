"""How much a loss says about its sample: the shares of its variance due to sample, level and random draw.

    python benchmarks/score_signal.py RUN            # a run's folder; a minute for a small network

The losses of random samples are computed by the trained network at several levels, several times each. Raw losses are
used as they are; corrected ones are divided by the run's expected loss at their level, like its scores. The results:

- the shares of the variance (random-effects analysis of variance; unbiased, so a share can be below 0) of the level, of
  the sample, of their interaction ("sample at its level"), and of the random draw (noise or mask);
- the correlation of the mean of k losses at random levels with the sample's true mean over all levels and draws;
- the share of the variance of "below the mean" (which the published policy may skip) that the level explains.
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
from pretrain.infobatch.level_stats import LevelStats, bins_of


def random_samples(run: LoadedRun, count: int) -> Batch:
    """Random training images of a run, on the model's device; always the same ones."""
    size = len(run.source.train)
    chosen = torch.randperm(size, generator=generator(7))[:count].sort().values
    plain = next(run.source.train.batches(chosen.tolist(), count))
    return on_device(plain, next(run.model.parameters()).device)


@torch.no_grad()
def losses_of(run: LoadedRun, batch: Batch, levels: int, draws: int) -> Tensor:
    """Losses of a batch of S samples at the centers of equal bins of the level axis: float64 [S, levels, draws]."""
    losses = []
    for number in range(levels):
        level = torch.full_like(batch.level, (number + 0.5) / levels)
        results = [
            run.adapter(run.model, batch._replace(level=level), SampleRNG(0, number, draw, index=batch.index))
            for draw in range(draws)
        ]
        losses.append(torch.stack([(r.loss if r.score is None else r.score).double().cpu() for r in results], dim=1))
    return torch.stack(losses, dim=1)


def shares(x: np.ndarray) -> dict[str, float]:
    """Shares of the variance of x, [S, levels, draws], from the expected mean squares of the two-way random model."""
    s, u, r = x.shape
    cell, row, column, all = x.mean(2), x.mean((1, 2)), x.mean((0, 2)), x.mean()
    draw = ((x - cell[..., None]) ** 2).sum() / (s * u * (r - 1))
    both = r * ((cell - row[:, None] - column + all) ** 2).sum() / ((s - 1) * (u - 1))
    sample = u * r * ((row - all) ** 2).sum() / (s - 1)
    level = s * r * ((column - all) ** 2).sum() / (u - 1)
    components = {
        "level": (level - both) / (s * r),
        "sample": (sample - both) / (u * r),
        "sample at its level": (both - draw) / r,
        "draw": draw,
    }
    total = sum(components.values())
    return {name: float(component / total) for name, component in components.items()}


def correlations(x: np.ndarray, counts: tuple[int, ...], times: int = 200) -> dict[str, float]:
    """Correlation of the mean of k losses with the samples' true means.

    Half of the draws estimate the true means, the k losses are from the other half; the error of the estimate is
    corrected for by its split-half reliability (Spearman and Brown).

    Args:
        x: losses, [S, levels, draws].
        counts: values of k.
        times: random selections that the correlation is averaged over.
    """
    s, _, r = x.shape
    rng = np.random.default_rng(0)
    truth, other = x[:, :, : r // 2].mean((1, 2)), x[:, :, r // 2 :].reshape(s, -1)
    halves = x[:, :, 0 : r // 2 : 2].mean((1, 2)), x[:, :, 1 : r // 2 : 2].mean((1, 2))
    half = np.corrcoef(*halves)[0, 1]
    reliability = (2 * half / (1 + half)) ** 0.5 if half > 0 else np.nan
    found = {}
    for k in counts:
        means = [
            np.take_along_axis(other, rng.integers(0, other.shape[1], (s, k)), axis=1).mean(1) for _ in range(times)
        ]
        found[f"{k} visits"] = float(np.mean([np.corrcoef(mean, truth)[0, 1] for mean in means]) / reliability)
    return found


def decided_by_level(x: np.ndarray) -> float:
    """Share of the variance of "below the mean" that the level explains, of losses x [S, levels, draws]."""
    below = (x < x.mean()).astype(float)
    chance = below.var() / (
        x.shape[0] * x.shape[2]
    )  # expected variance of the means by level if the level has no effect
    return float(max(below.mean((0, 2)).var() - chance, 0) / below.var())


def signal(run: LoadedRun, samples: int = 200, levels: int = 16, draws: int = 8) -> dict[str, dict[str, float]]:
    """All results, of raw and of corrected losses, by name; see `main` for the arguments."""
    raw = losses_of(run, random_samples(run, samples), levels, draws)
    stats = LevelStats()
    stats.restore(run.state.tensors["infobatch"]["levels"])
    level = ((torch.arange(levels) + 0.5) / levels).view(1, -1, 1).expand_as(raw)
    corrected = stats.scores_of(raw.flatten(), bins_of(level.flatten()), torch.zeros(raw.numel(), dtype=torch.int64))
    found = {}
    for name, x in (("raw", raw.numpy()), ("corrected", corrected.view(raw.shape).numpy())):
        results = {f"share of {component}": share for component, share in shares(x).items()}
        results |= {f"correlation, {k}": value for k, value in correlations(x, (1, 4, 10)).items()}
        found[name] = results | {"decided by level": decided_by_level(x)}
    return found


def main(
    run: tyro.conf.Positional[Path], samples: int = 200, levels: int = 16, draws: int = 8, output: Path | None = None
) -> None:
    """Measure how much a run's losses say about its samples.

    Args:
        run: folder of a run.
        samples: number of training images.
        levels: number of levels, evenly spaced.
        draws: random draws at each level, at least 4.
        output: JSON file to write the numbers to.
    """
    with exit_on_user_error():
        found = signal(load_run(run), samples, levels, draws)
    table = Table("", *found, title=f"{run}: how much a loss says about its sample")
    for name in found["raw"]:
        table.add_row(name, *(f"{column[name]:.3f}" for column in found.values()))
    Console().print(table)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
