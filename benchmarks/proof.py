"""The table and the figure of a comparison: cost at matched quality.

    python benchmarks/proof.py runs/compare          # make both from the records, one JSON per run

An arm's **cost ratio** is its cost divided by the cost at which ordinary training, shortened, reaches the same
quality, interpolated on the curve of shortened runs; below 1 the arm is cheaper. The curve has, at each length, the
learning rate with the best quality, and is made monotone by isotonic regression. If an arm is better or worse than the
whole curve, the ratio is a bound and is marked < or >.

Intervals are 95 % of a bootstrap over seeds. Three seeds say little about the variance of one arm, so the residuals of
all arms (a run minus the mean of its arm, times sqrt(n / (n - 1))) are pooled, and the mean of each arm and of each
point of the curve is resampled from them. An arm's seconds are those of its median run, because runs may have shared
the machine.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console

MEASURES = {"samples_used": "samples", "flops": "training FLOPs", "seconds": "seconds of training"}
BASELINE = ("full", "shortened")  # families of ordinary training
LEVELS = "validation_loss_by_level"
PREDICTED = "gradient_variance.json"  # what gradient_variance.py wrote, if it is there
DRAWS = 4000  # of the bootstrap


class Arm(NamedTuple):
    """The runs of one arm."""

    name: str
    family: str
    cost: dict[str, float]  # by measure; mean over seeds
    quality: dict[str, np.ndarray]  # by metric; [seeds]
    levels: np.ndarray | None  # [seeds, levels]


class Ratio(NamedTuple):
    """A cost ratio and its interval; `bound` is "<" or ">" beyond the range of the curve, else ""."""

    value: float
    low: float
    high: float
    bound: str

    def __str__(self) -> str:
        """1.02 [0.97, 1.08]."""
        if math.isnan(self.value):
            return "–"
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.bound}{self.value:.2f}{interval}"


def better_is_lower(metric: str) -> bool:
    """Whether low values of a metric are good: True for losses and distances, False for accuracies."""
    return not metric.endswith(("accuracy", "probe"))


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a comparison."""
    return [json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))]


def with_log_loss(record: dict[str, Any]) -> dict[str, Any]:
    """A diffusion run's record with its mean log loss, in which all noise levels count equally.

    The plain mean is dominated by the lowest noise levels, at which the loss of predicted noise is largest.
    """
    levels = record["quality"].get(LEVELS)
    if "train_diffusion" not in record.get("command", "") or not levels or None in levels:
        return record
    return record | {"quality": record["quality"] | {"mean_log_loss": sum(map(math.log, levels)) / len(levels)}}


def arms_of(records: Sequence[dict[str, Any]]) -> list[Arm]:
    """The arms of records, most expensive first."""
    names = {record["arm"]: record["family"] for record in records}
    arms = []
    for name, family in names.items():
        runs = [with_log_loss(record) for record in records if record["arm"] == name]
        metrics = {key for run in runs for key in run["quality"] if not isinstance(run["quality"][key], list)}
        levels = [run["quality"][LEVELS] for run in runs if LEVELS in run["quality"]]
        arms.append(
            Arm(
                name,
                family,
                {measure: _usual(measure, [run["cost"][measure] for run in runs]) for measure in MEASURES},
                {m: np.array([run["quality"][m] for run in runs if m in run["quality"]]) for m in sorted(metrics)},
                np.array(levels) if levels else None,
            )
        )
    return sorted(arms, key=lambda arm: -arm.cost["samples_used"])


def _usual(measure: str, costs: Sequence[float]) -> float:
    """An arm's cost: the median of seconds, the mean of other measures."""
    return float(np.median(costs) if measure == "seconds" else np.mean(costs))


def curve_of(arms: Sequence[Arm], metric: str, measure: str) -> list[Arm]:
    """The curve of ordinary training: at each length the arm with the best learning rate, cheapest first."""
    best: dict[float, Arm] = {}
    sign = 1 if better_is_lower(metric) else -1
    for arm in arms:
        if arm.family in BASELINE and metric in arm.quality:
            length = arm.cost["samples_used"]
            if length not in best or sign * arm.quality[metric].mean() < sign * best[length].quality[metric].mean():
                best[length] = arm
    return sorted(best.values(), key=lambda arm: arm.cost[measure])


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


def cost_for(quality: np.ndarray, cost: np.ndarray, curve: np.ndarray, lower: bool) -> tuple[np.ndarray, np.ndarray]:
    """The cost at which a curve reaches a quality, by linear interpolation.

    Args:
        quality: to reach, [D].
        cost: of the curve's points, ascending, [P].
        curve: their qualities, [D, P].
        lower: whether low is good.

    Returns:
        The costs, [D], clamped to the curve's range; and [D]: -1 where the quality is better than the whole curve, 1
        where it is worse, else 0.
    """
    sign = -1.0 if lower else 1.0
    wanted, points = sign * quality, rising(sign * curve)
    outside = np.where(wanted > points[:, -1], -1, np.where(wanted < points[:, 0], 1, 0))
    after = (points < wanted[:, None]).sum(axis=1).clip(1, max(len(cost) - 1, 1))  # the first point that is as good
    if len(cost) == 1:
        return np.full(len(wanted), cost[0]), outside
    each = np.arange(len(wanted))
    step = points[each, after] - points[each, after - 1]
    share = np.divide(wanted - points[each, after - 1], step, out=np.zeros(len(wanted)), where=step > 0).clip(0, 1)
    return cost[after - 1] + share * (cost[after] - cost[after - 1]), outside


def redrawn(arms: Sequence[Arm], metric: str) -> Callable[[Arm], np.ndarray]:
    """A function from an arm to the mean of its runs, [1 + DRAWS]: the measured one, then bootstrap samples."""
    residual = [
        (arm.quality[metric] - arm.quality[metric].mean()) * (n / (n - 1)) ** 0.5
        for arm in arms
        if metric in arm.quality and (n := len(arm.quality[metric])) > 1
    ]
    pooled = np.concatenate(residual) if residual else np.array([np.nan])

    def draw(arm: Arm) -> np.ndarray:
        values = arm.quality[metric]
        rng = np.random.default_rng([*arm.name.encode()])
        error = rng.choice(pooled, (DRAWS, len(values))).mean(axis=1)
        return values.mean() + np.concatenate([[0.0], error])

    return draw


def ratio(draw: Callable[[Arm], np.ndarray], arm: Arm, curve: Sequence[Arm], metric: str, measure: str) -> Ratio:
    """The arm's cost divided by the curve's at the same quality."""
    cost = np.array([point.cost[measure] for point in curve])
    qualities = np.stack([draw(point) for point in curve], axis=1)
    own = draw(arm)
    spread = own[1:].std() > 0  # False without repeated runs
    count = len(own) if spread else 1
    needed, outside = cost_for(own[:count], cost, qualities[:count], better_is_lower(metric))
    ratios = arm.cost[measure] / needed
    low, high = np.quantile(ratios[1:], [0.025, 0.975]) if spread else (math.nan, math.nan)
    return Ratio(ratios[0], low, high, {-1: "<", 0: "", 1: ">"}[int(outside[0])])


def cost_of_full(draw: Callable[[Arm], np.ndarray], arms: Sequence[Arm], family: str, metric: str, measure: str) -> Any:
    """The cost at which a family reaches full training's quality at its best learning rate, as a share of its cost.

    None if there are no runs of one of them.
    """
    whole = curve_of(arms, metric, measure)[-1:]
    points = sorted((a for a in arms if a.family == family and metric in a.quality), key=lambda a: a.cost[measure])
    if not whole or not points:
        return None
    own, qualities = draw(whole[0]), np.stack([draw(point) for point in points], axis=1)
    count = len(own) if own[1:].std() > 0 else 1
    cost = np.array([point.cost[measure] for point in points])
    needed, outside = cost_for(own[:count], cost, qualities[:count], better_is_lower(metric))
    shares = needed / whole[0].cost[measure]
    low, high = np.quantile(shares[1:], [0.025, 0.975]) if count > 1 else (math.nan, math.nan)
    return Ratio(shares[0], low, high, {-1: ">", 0: "", 1: "<"}[int(outside[0])])


def by_level(arms: Sequence[Arm]) -> list[list[str]]:
    """Rows of each arm's loss by level relative to ordinary training with the same number of samples, in percent."""
    curve = [arm for arm in curve_of(arms, "validation_loss", "samples_used") if arm.levels is not None]
    if not curve:
        return []
    cost = [point.cost["samples_used"] for point in curve]
    table = np.stack([point.levels.mean(axis=0) for point in curve if point.levels is not None])  # [P, levels]
    rows = []
    for arm in arms:
        if arm.levels is not None and arm.family not in BASELINE:
            usual = [np.interp(arm.cost["samples_used"], cost, column) for column in table.T]
            more = arm.levels.mean(axis=0) / usual - 1
            rows.append([arm.name, *(f"{value:+.1%}" for value in more)])
    return rows


def _predicted(
    variance: dict[str, list[list[float]]],
    arms: Sequence[Arm],
    draws: dict[str, Callable[[Arm], np.ndarray]],
    metrics: Sequence[str],
) -> str:
    """A table of the variance of each policy's gradient, which predicts the cost ratio, and of the cost ratio."""
    rows = []
    for arm in arms:
        if figures := variance.get(arm.family.partition(" ")[0]):
            predicted = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in figures]
            measured = [
                str(ratio(draws[metric], arm, curve, metric, "flops"))
                for metric in metrics
                if metric in arm.quality and (curve := curve_of(arms, metric, "flops"))
            ]
            rows.append([arm.name, *predicted, *measured])
    head = ["arm", "variance, plain", "preconditioned", *(f"{metric}: cost ratio" for metric in metrics)]
    return "\n## Variance of the gradient relative to uniform sampling, and the cost ratio\n\n" + markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def report(folder: Path) -> str:
    """Write `table.md`, `table.csv` and `figure.png` from the records in a folder; return the text of the first."""
    records = read(folder)
    arms = arms_of(records)
    metrics = sorted({metric for arm in arms for metric in arm.quality}, key=lambda m: (m != "validation_loss", m))
    full = next((arm for arm in arms if arm.name == "full"), arms[0])
    rows: list[dict[str, str]] = []
    draws = {metric: redrawn(arms, metric) for metric in metrics}
    for arm in arms:
        row = {"arm": arm.name, "runs": str(max(len(values) for values in arm.quality.values()))}
        row |= {measure: f"{arm.cost[measure] / full.cost[measure]:.3f}" for measure in MEASURES}
        for metric in metrics:
            if metric in arm.quality:
                values = arm.quality[metric]
                row[metric] = f"{values.mean():.4f} ± {values.std(ddof=1) if len(values) > 1 else math.nan:.4f}"
                for measure in MEASURES:
                    curve = curve_of(arms, metric, measure)
                    if curve and arm.name not in {point.name for point in curve}:
                        row[f"{metric}: ratio in {measure}"] = str(ratio(draws[metric], arm, curve, metric, measure))
        rows.append(row)
    head = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, head, restval="")
        writer.writeheader()
        writer.writerows(rows)

    shown = [name for name in head if "ratio in" not in name or name.endswith("in flops")]
    renamed = [name.replace("ratio in flops", "cost ratio") for name in shown]
    text = f"# {folder.name}\n\n{(__doc__ or '').split(chr(10) * 2, 2)[2]}\n"
    text += markdown(renamed, [[row.get(name, "") for name in shown] for row in rows])
    whole = ", ".join(f"{full.cost[measure]:.4g} {unit}" for measure, unit in MEASURES.items())
    text += f"\nCosts are shares of those of `{full.name}` ({whole}).\n"
    families = list(dict.fromkeys(arm.family for arm in arms if arm.name != "full"))
    reached = [
        [family, *(str(cost_of_full(draws[m], arms, family, m, "flops") or "–") for m in metrics)]
        for family in families
    ]
    text += "\n## FLOPs for the quality of full training at its best learning rate, as a share of its FLOPs\n\n"
    text += markdown(["policy", *metrics], reached)
    if (folder / PREDICTED).is_file():
        text += _predicted(json.loads((folder / PREDICTED).read_text()), arms, draws, metrics)
    if levels := by_level(arms):
        count = len(levels[0]) - 1
        bins = [f"{n / count:.2f}–{(n + 1) / count:.2f}" for n in range(count)]
        text += "\n## Validation loss by level, relative to ordinary training with the same number of samples\n\n"
        text += markdown(["arm", *bins], levels)
    (folder / "table.md").write_text(text)
    figure(arms, metrics, folder / "figure.png")
    return text


def figure(arms: Sequence[Arm], metrics: Sequence[str], path: Path) -> None:
    """Plot quality against cost: a curve per family with its standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(1, len(metrics), figsize=(6.5 * len(metrics), 4.8), squeeze=False)
    families = [family for family in dict.fromkeys(arm.family for arm in arms) if family not in BASELINE]
    colours = dict(zip(families, pyplot.get_cmap("tab20").colors * 2, strict=False))  # type: ignore[attr-defined]
    for axis, metric in zip(axes[0], metrics, strict=True):
        whole = next((arm.cost["flops"] for arm in arms if arm.name == "full"), 1.0)

        def draw(
            points: Sequence[Arm], axis: Any = axis, metric: str = metric, whole: float = whole, **style: Any
        ) -> None:
            axis.errorbar(
                [point.cost["flops"] / whole for point in points],
                [point.quality[metric].mean() for point in points],
                [point.quality[metric].std(ddof=1) if len(point.quality[metric]) > 1 else 0 for point in points],
                capsize=2,
                **style,
            )

        if curve := curve_of(arms, metric, "flops"):
            draw(curve, color="black", marker="o", label="full and shortened, best learning rate", linewidth=2)
        for family in families:
            points = sorted(
                (arm for arm in arms if arm.family == family and metric in arm.quality), key=lambda a: a.cost["flops"]
            )
            if points:
                draw(points, color=colours[family], marker="s", label=family, linewidth=1)
        axis.set_xlabel("training FLOPs relative to full")
        axis.set_ylabel(metric.replace("_", " "))
        axis.grid(alpha=0.3)
    chart.tight_layout()
    chart.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    chart.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(chart)


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Make the table and the figure of a comparison from its records.

    Args:
        folder: of the comparison (its --output-dir).
    """
    Console(soft_wrap=True).print(report(folder), markup=False, highlight=False)


if __name__ == "__main__":
    tyro.cli(main)
