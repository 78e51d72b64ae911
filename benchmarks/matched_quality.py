"""Cost at matched quality: arms from records, the curve of a baseline, ratios and their intervals.

The quality of a run is modelled as a sum of its arm, its seed and a residual (a two-way additive model, by least
squares). An arm's quality is what the model expects over all seeds, so that arms with different seeds compare.
Intervals are 95 % of a bootstrap: in each draw every seed gets one of the estimated seed effects, the same for all
arms, and every run one of the residuals of all runs; both are scaled by their degrees of freedom, and the model is
fitted again. So a seed that is good for all arms alike cancels, and the residuals are known from the runs of all
arms, where one arm has three or five. In each draw the best learning rates are selected anew; where several are
equally good, that flatters the baseline, and intervals err upwards.
"""

import math
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

MEASURES = {"samples_used": "samples", "flops": "training FLOPs"}  # not seconds: runs shared machines
NOT_SETUP = ("epochs", "batch-size", "optim.lr", "optim.compensation", "infobatch")  # nor settings of pruning
LEVELS = "validation_loss_by_level"
NAMES = {  # of the settings of the examples, in this project's programs
    "lr": "optim.lr",
    "training.epochs": "epochs",
    "training.lr": "optim.lr",
    "training.optimizer": "optim",
    "training.policy": "pruning.policy",
    "training.budget": "pruning.budget",
    "training.settings": "pruning.settings",
}
DRAWS = 4000  # of the bootstrap
SAME_LENGTH = 1.03  # ratio of the numbers of samples
Setup = frozenset[tuple[str, str]]  # a run's optimizer, and its flags but for pruning and `NOT_SETUP`
ADAMW: Setup = frozenset({("optim", "adamw")})  # and the recipe's network and objective


class Arm(NamedTuple):
    """The runs of one arm."""

    name: str
    family: str
    setup: Setup
    pruned: bool
    lr: float
    batch_size: str
    cost: dict[str, float]  # by measure; mean over seeds
    quality: dict[str, dict[int, float]]  # by metric and seed
    levels: dict[int, list[float]]  # diffusion: validation loss in equal ranges of the noise level, by seed


class Curve(NamedTuple):
    """Quality against FLOPs, at each length with the learning rate and batch size that are best in each draw."""

    cost: np.ndarray  # [P], ascending
    quality: np.ndarray  # [1 + DRAWS, P]


class Ratio(NamedTuple):
    """An estimate with its 95 % interval (NaN: none); a side is -1 where the true value may be lower, 1 if higher."""

    value: float
    low: float
    high: float
    sides: tuple[int, int, int]
    one_length: bool

    def __str__(self) -> str:
        """0.67 [≤0.65, 0.73]; only ≤0.65 if the whole interval lies beyond the curve."""
        value, low, high = (
            {-1: "≤", 0: "", 1: "≥"}[side] + f"{number:.2f}" for number, side in zip(self[:3], self.sides, strict=True)
        )
        if self.one_length:
            return f"{value} (one length)"
        if math.isnan(self.low) or abs(sum(self.sides)) == 3:
            return value
        return f"{value} [{low}, {high}]"


# -- records ------------------------------------------------------------------------------------


def better_is_lower(metric: str) -> bool:
    """Whether low values of a metric are good: True for losses and distances, False for accuracies."""
    return not metric.endswith(("accuracy", "probe", "iou", "reward", "match", "psnr"))


def prunes(setting: str, value: str) -> bool:
    """Whether a setting means that samples are skipped, or leave the network early."""
    return setting == "infobatch" or (
        setting.startswith(("pruning.", "blocking.")) and (setting, value) != ("pruning.policy", "full")
    )


def common_name(setting: str) -> str:
    """The name by which a setting is known here: `optim.name` is `optim`, `training.lr` of an example `optim.lr`."""
    setting = setting.replace("_", "-").removesuffix(".name")
    return NAMES.get(setting, setting)


def parsed(words: Iterable[str]) -> dict[str, str]:
    """The settings in the words of a command line; `--optim.name` is `optim`."""
    settings: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].replace("_", "-").partition("=")
            settings[name := common_name(name)] = value
        elif name:
            settings[name] = f"{settings[name]} {word}".strip()
    return settings


@cache
def recipe(path: str) -> dict[str, str]:
    """The settings of a recipe, named as on the command line; {} if there is no such file."""
    file = Path(__file__).parents[1] / path
    settings: dict[str, str] = {}

    def flatten(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, common_name(f"{name}.{key}".lstrip(".")))
        else:
            settings[name] = str(value)

    flatten(yaml.safe_load(file.read_text()) if file.is_file() else {}, "")
    return settings


def settings_of(record: dict[str, Any]) -> dict[str, str]:
    """All settings of a run that its recipe or its command states."""
    stated = parsed(shlex.split(record.get("command", "")))
    return recipe(stated.get("config", "")) | stated | parsed(record.get("flags", []))


def quality_of(record: dict[str, Any]) -> dict[str, float]:
    """A run's quality by metric; for diffusion with the mean log loss, in which all noise levels count equally."""
    levels = record["quality"].get(LEVELS)
    found = {name: value for name, value in record["quality"].items() if not isinstance(value, list)}
    if "train_diffusion" in record.get("command", "") and levels and None not in levels:
        found["mean_log_loss"] = sum(map(math.log, levels)) / len(levels)
    return found


def arms_of(records: Sequence[dict[str, Any]]) -> list[Arm]:
    """The arms of records, most expensive first."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault(record["arm"], []).append(record)
    arms = []
    for name, runs in grouped.items():
        settings, flags = settings_of(runs[0]), parsed(runs[0].get("flags", []))
        own = {
            (key, value)
            for key, value in flags.items()
            if key not in NOT_SETUP and not key.startswith(("pruning.", "blocking."))
        }
        quality: dict[str, dict[int, float]] = {}
        for run in runs:
            for metric, value in quality_of(run).items():
                quality.setdefault(metric, {})[run["seed"]] = value
        levels = {run["seed"]: run["quality"][LEVELS] for run in runs if "mean_log_loss" in quality_of(run)}
        costs = {measure: [run["cost"][measure] for run in runs] for measure in MEASURES}
        arms.append(
            Arm(
                name,
                runs[0]["family"],
                frozenset({*own, ("optim", settings.get("optim", "adamw"))}),
                any(prunes(key, value) for key, value in flags.items()),
                float(settings.get("optim.lr", "nan")),
                settings.get("batch-size", ""),
                {m: float(np.mean(cost)) for m, cost in costs.items()},
                quality,
                levels,
            )
        )
    return sorted(arms, key=lambda arm: -arm.cost["samples_used"])


def base_of(arms: Sequence[Arm]) -> Setup:
    """The setup of the arm called full: the recipe's optimizer, network and objective; `ADAMW` without that arm."""
    return next((arm.setup for arm in arms if arm.name == "full"), ADAMW)


def ordinary(arms: Sequence[Arm], setup: Setup) -> list[Arm]:
    """The arms of ordinary training (every sample, every level alike) of a setup."""
    return [arm for arm in arms if arm.setup == setup and not arm.pruned]


def by_length(arms: Sequence[Arm], metric: str) -> list[list[Arm]]:
    """The arms that have a metric, grouped by length, shortest first; in a group by learning rate.

    Arms are of one length if each uses less than `SAME_LENGTH` times the samples of the group's first: how many samples
    some policies use depends on the losses, and so a little on the learning rate.
    """
    groups: list[list[Arm]] = []
    for arm in sorted(arms, key=lambda arm: arm.cost["samples_used"]):
        if metric in arm.quality:
            if not groups or arm.cost["samples_used"] >= SAME_LENGTH * groups[-1][0].cost["samples_used"]:
                groups.append([])
            groups[-1].append(arm)
    return [sorted(group, key=lambda arm: arm.lr) for group in groups]


def best_of(group: Sequence[Arm], draws: dict[str, np.ndarray], metric: str) -> Arm:
    """The arm with the best quality; `draws` are those of `resampled`."""
    return (min if better_is_lower(metric) else max)(group, key=lambda arm: draws[arm.name][0])


def spread(arm: Arm, metric: str) -> str:
    """The mean of an arm's runs with their standard deviation."""
    values = list(arm.quality[metric].values())
    digits = 4 - (abs(values[0]) >= 1) - (abs(values[0]) >= 10)
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


# -- cost at matched quality --------------------------------------------------------------------


def resampled(arms: Sequence[Arm], metric: str) -> dict[str, np.ndarray]:
    """Each arm's quality, [1 + DRAWS]: the measured one, then bootstrap draws; [1] if nothing was repeated.

    Where no seeds connect the arms, an arm's quality is the mean of its own runs.
    """
    arms = [arm for arm in arms if metric in arm.quality]
    runs = [(arm.name, seed, value) for arm in arms for seed, value in arm.quality[metric].items()]
    seeds = sorted({seed for _, seed, _ in runs})
    columns = {key: n for n, key in enumerate([*(arm.name for arm in arms), *seeds])}
    design = np.zeros((len(runs), len(columns)))
    for row, (name, seed, _) in zip(design, runs, strict=True):
        row[[columns[name], columns[seed]]] = 1
    values = np.array([value for *_, value in runs])
    fit, rank = np.linalg.pinv(design), np.linalg.matrix_rank(design)
    if rank == len(columns) - 1:  # all arms are connected by seeds
        estimate = fit[: len(arms)] + fit[len(arms) :].mean(axis=0)  # [arms, runs]
    else:
        estimate = (design[:, : len(arms)] / design[:, : len(arms)].sum(axis=0)).T
    quality = estimate @ values
    if len(runs) == rank:
        return {arm.name: quality[n : n + 1] for n, arm in enumerate(arms)}
    residual = (values - design @ (fit @ values)) * (len(runs) / (len(runs) - rank)) ** 0.5
    common = (fit @ values)[len(arms) :]
    common = (common - common.mean()) * (len(seeds) / (len(seeds) - 1)) ** 0.5
    of_seed = {seed: np.random.default_rng(seed).choice(common, DRAWS) for seed in seeds}
    errors = [
        np.random.default_rng([*arm.name.encode()]).choice(residual, (len(arm.quality[metric]), DRAWS))
        + np.stack([of_seed[seed] for seed in arm.quality[metric]])
        for arm in arms
    ]
    drawn = quality[:, None] + estimate @ np.concatenate(errors)
    return {arm.name: np.append(quality[n], drawn[n]) for n, arm in enumerate(arms)}


def curve_of(arms: Sequence[Arm], draws: dict[str, np.ndarray], metric: str) -> Curve | None:
    """The curve through arms; None if none of them has the metric."""
    points = []
    for group in by_length(arms, metric):
        quality, flops = best_in_each_draw(group, draws, metric)
        points.append((flops[0], quality))  # an optimizer's own FLOPs depend on the batch size
    points.sort(key=lambda point: point[0])
    return Curve(np.array([p[0] for p in points]), np.stack([p[1] for p in points], axis=1)) if points else None


def rising(points: np.ndarray) -> np.ndarray:
    """The closest non-decreasing curves, [D, P], to `points`, [D, P]: isotonic regression, by its max-min formula."""
    total = np.concatenate([np.zeros((len(points), 1)), points.cumsum(axis=1)], axis=1)
    count = points.shape[1]
    columns = []
    for j in range(count):
        lower_bounds = [
            np.min([(total[:, k + 1] - total[:, i]) / (k + 1 - i) for k in range(j, count)], axis=0)
            for i in range(j + 1)
        ]
        columns.append(np.max(lower_bounds, axis=0))
    return np.stack(columns, axis=1)


def cost_for(quality: np.ndarray, curve: Curve, lower: bool) -> tuple[np.ndarray, np.ndarray]:
    """The cost at which a curve, made monotone, reaches a quality, by linear interpolation.

    Args:
        quality: to reach, [D].
        curve: with D draws.
        lower: whether low is good.

    Returns:
        The costs, [D], clamped to the curve's range; and [D]: 1 where the quality is better than the whole curve, so
        that the cost is higher, -1 where it is worse, else 0.
    """
    sign, cost = (-1.0 if lower else 1.0), curve.cost
    wanted, points = sign * quality, rising(sign * curve.quality)
    outside = np.where(wanted > points[:, -1], 1, np.where(wanted < points[:, 0], -1, 0))
    if len(cost) == 1:
        return np.full(len(wanted), cost[0]), outside
    after = (points < wanted[:, None]).sum(axis=1).clip(1, len(cost) - 1)  # the first point that is as good
    each = np.arange(len(wanted))
    step = points[each, after] - points[each, after - 1]
    share = np.divide(wanted - points[each, after - 1], step, out=np.zeros(len(wanted)), where=step > 0).clip(0, 1)
    inside = cost[after - 1] + share * (cost[after] - cost[after - 1])
    return np.where(outside == 0, inside, np.where(outside > 0, cost[-1], cost[0])), outside


def estimate(values: np.ndarray, sides: np.ndarray, one_length: bool) -> Ratio:
    """The first value with the interval of the others; an end is marked if enough draws lie beyond the curve."""
    if len(values) == 1 or one_length:
        return Ratio(values[0], math.nan, math.nan, (int(sides[0]), 0, 0), one_length)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    lower, higher = (sides[1:] < 0).mean(), (sides[1:] > 0).mean()
    at_low = -1 if lower > 0.025 else int(higher > 0.975)
    at_high = 1 if higher > 0.025 else -int(lower > 0.975)
    return Ratio(values[0], low, high, (int(sides[0]), at_low, at_high), False)


def best_in_each_draw(arms: Sequence[Arm], draws: dict[str, np.ndarray], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Quality and FLOPs, [1 + DRAWS] each, of that one of the arms that is best in each draw."""
    quality = np.stack([draws[arm.name] for arm in arms])
    best = (np.argmin if better_is_lower(metric) else np.argmax)(quality, axis=0)
    return quality[best, np.arange(quality.shape[1])], np.array([arm.cost["flops"] for arm in arms])[best]


def ratio(arms: Sequence[Arm], draws: dict[str, np.ndarray], curve: Curve, metric: str) -> Ratio:
    """FLOPs of the best of the arms divided by the curve's at the same quality."""
    quality, flops = best_in_each_draw(arms, draws, metric)
    needed, outside = cost_for(quality, curve, better_is_lower(metric))
    return estimate(flops / needed, -outside, len(curve.cost) == 1)


def gain(arms: Sequence[Arm], draws: dict[str, np.ndarray], curve: Curve, metric: str) -> str:
    """How much better than the curve at the same FLOPs the best of the arms is, with its interval: 0.01 [-0.02, 0.04].

    Beyond its ends the curve is taken to be constant.
    """
    sign = -1 if better_is_lower(metric) else 1
    quality, flops = best_in_each_draw(arms, draws, metric)
    points = rising(sign * curve.quality)  # [1 + DRAWS, P]
    usual = [np.interp(cost, curve.cost, row) for cost, row in zip(flops, points, strict=True)]
    value, *resampled = sign * quality - usual
    if not resampled:
        return f"{value:+.3f}"
    low, high = np.quantile(resampled, [0.025, 0.975])
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def share_of_full(full: Curve, family: Curve, metric: str) -> Ratio:
    """The FLOPs at which a family reaches the quality of a curve's longest training, as a share of its FLOPs."""
    needed, outside = cost_for(full.quality[:, -1], family, better_is_lower(metric))
    return estimate(needed / full.cost[-1], outside, len(family.cost) == 1)
