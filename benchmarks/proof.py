"""Tables and figure of comparisons: what training costs at matched quality.

    python benchmarks/proof.py benchmarks/results/*     # from the records in each folder, one JSON a run

benchmarks/README.md defines ratio, baselines and the columns of the tables; matched_quality.py computes them.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from commands import commands
from matched_quality import (
    MEASURES,
    Arm,
    Curve,
    Setup,
    arms_of,
    base_of,
    best_of,
    by_length,
    curve_of,
    gain,
    ordinary,
    ratio,
    recipe,
    resampled,
    settings_of,
    share_of_full,
    spread,
)
from rich.console import Console

HEADLINES = ("validation_loss", "mean_log_loss", "frechet_distance", "linear_probe", "knn_accuracy")  # in this order
PREDICTED = "gradient_variance.json"  # written by gradient_variance.py
EDGE = "† The best learning rate lies at an edge of those tried: the baseline may be better than this."
OWN = """
Not listed: arms with {} and the recipe's network and objective, whose ratio is that above, and ordinary training of
other networks and objectives, which is the baseline here.
"""


class Results:
    """The arms of a comparison's records, with the draws of each metric."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        """Resample every metric.

        Args:
            records: of the runs.
        """
        self.records = records
        self.arms = arms_of(records)
        names = {metric for arm in self.arms for metric in arm.quality}
        self.metrics = sorted(names, key=lambda m: (HEADLINES.index(m) if m in HEADLINES else len(HEADLINES), m))
        self.draws = {metric: resampled(self.arms, metric) for metric in self.metrics}
        self.base = base_of(self.arms)
        name = dict(self.base)["optim"]
        self.optimizer = {"adamw": "AdamW", "sgd": "SGD"}.get(name, name)  # of the baseline
        self.baseline = ordinary(self.arms, self.base)
        self.others = [arm for arm in self.arms if arm not in self.baseline]
        full = by_length(self.baseline or self.arms, self.metrics[0])[-1]
        self.full = {measure: float(np.median([arm.cost[measure] for arm in full])) for measure in MEASURES}

    def curve(self, arms: Sequence[Arm], metric: str) -> Curve | None:
        """The curve through arms; None if none of them has the metric."""
        return curve_of(arms, self.draws[metric], metric)

    def best(self, arms: Sequence[Arm], metric: str) -> Arm:
        """The one of the arms, which all have the metric, that is best by it."""
        return best_of(arms, self.draws[metric], metric)

    def ratio(self, arms: Sequence[Arm], setup: Setup, metric: str) -> str:
        """The best arm's ratio to a setup's ordinary training; "" if there is none, or the arms belong to it."""
        return self._beside(setup, ratio, arms, metric)

    def gain(self, arms: Sequence[Arm], setup: Setup, metric: str) -> str:
        """How much better the best arm is than a setup's ordinary training at the same FLOPs; "" as for `ratio`."""
        return self._beside(setup, gain, arms, metric)

    def _beside(self, setup: Setup, measure: Callable[..., Any], arms: Sequence[Arm], metric: str) -> str:
        usual = ordinary(self.arms, setup)
        arms = [arm for arm in arms if arm not in usual and metric in arm.quality]
        curve = self.curve(usual, metric) if arms else None
        return str(measure(arms, self.draws[metric], curve, metric)) if curve else ""

    def share(self, arm: Arm, measure: str) -> str:
        """An arm's cost as a share of full training's."""
        return f"{arm.cost[measure] / self.full[measure]:.3f}"


def plain(metric: str) -> str:
    """A metric's name in the tables."""
    return metric.replace("_", " ").replace("knn", "k-NN").replace("frechet", "Fréchet").replace("iou", "IoU")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def described(found: Results) -> str:
    """The recipe with the settings of its objective; of an example its file in place of both."""
    settings = settings_of(found.records[0])
    if example := re.search(r"examples/\w+\.py", found.records[0].get("command", "")):
        return f"{example[0]}, recipe {settings.get('config', 'none')}"
    schedule = settings.get("adapter.noise-schedule", "")
    objective = settings.get("adapter", "not stated") + f", {schedule} noise schedule" * bool(schedule)
    for key, value in recipe(settings.get("config", "")).items():
        if key.startswith("adapter.") and key != "adapter.noise-schedule":
            objective += f", {key.removeprefix('adapter.')} {value}"
    return f"Recipe {settings.get('config', 'not stated')}, objective {objective}"


def rates(arms: Sequence[Arm]) -> str:
    """The learning rates of arms: 0.008, 0.012; in batches of 16: 0.0056; of one batch size 0.008, 0.012."""
    of_size: dict[str, list[str]] = {}
    for arm in sorted(arms, key=lambda arm: -float(arm.batch_size or 0)):
        of_size.setdefault(arm.batch_size, []).append(f"{arm.lr:.2g}")
    several = len(of_size) > 1
    return "; ".join(f"in batches of {size}: " * several + ", ".join(found) for size, found in of_size.items())


def scan_table(found: Results) -> str:
    """Ordinary training: each length with its learning rates and batch sizes, and the best by each metric."""
    rows = []
    setups = {arm.setup for arm in found.arms if not arm.pruned}
    for setup in sorted(setups, key=lambda setup: (setup != found.base, sorted(setup))):
        flags = sorted(f"{key} {value}" for key, value in setup if key != "optim")
        for group in reversed(by_length(ordinary(found.arms, setup), found.metrics[0])):
            row = [", ".join([dict(setup)["optim"], *flags]), found.share(group[0], "flops")]
            row.append(rates(group))
            sizes = {arm.batch_size for arm in group}
            for metric in found.metrics:
                measured = [arm for arm in group if metric in arm.quality]
                best = found.best(measured, metric) if measured else None
                alike = [arm for arm in measured if best and arm.batch_size == best.batch_size]
                edge = "†" if best in (alike[:1] + alike[-1:]) else ""
                of = f" of {rates(measured)}" if len(measured) < len(group) else ""
                size = f" in batches of {best.batch_size}" if best and len(sizes) > 1 else ""
                row.append(f"{spread(best, metric)} at {best.lr:.2g}{edge}{size}{of}" if best else "")
            rows.append(row)
    return markdown(["training", "FLOPs", "learning rates", *map(plain, found.metrics)], rows) + f"\n{EDGE}\n"


def seeds(arms: Sequence[Arm]) -> str:
    """The numbers of seeds of arms, the smallest and the largest over metrics: 3, or 2 to 5."""
    counts = sorted({len(values) for arm in arms for values in arm.quality.values()})
    return " to ".join(map(str, counts if len(counts) == 1 else (counts[0], counts[-1])))


def ratio_table(found: Results) -> str:
    """Cost, quality and ratio to shortened training with the recipe's optimizer, network and objective."""
    rows = []
    for arm in found.others:
        row = [arm.name, seeds([arm]), found.share(arm, "flops")]
        for metric in found.metrics:
            row += [spread(arm, metric) if metric in arm.quality else "", found.ratio([arm], found.base, metric)]
        rows.append(row)
    both = [name for metric in found.metrics for name in (plain(metric), f"{plain(metric)}: ratio")]
    return markdown(["arm", "seeds", "FLOPs", *both], rows)


def own_table(found: Results) -> str:
    """Ratio to shortened training with the arm's own optimizer, network and objective."""
    arms = [arm for arm in found.others if arm.setup != found.base]
    rows = [[arm.name, *(found.ratio([arm], arm.setup, metric) for metric in found.metrics)] for arm in arms]
    rows = [row for row in rows if any(row[1:])]
    return (markdown(["arm", *map(plain, found.metrics)], rows) if rows else "") + OWN.format(found.optimizer)


def optimizer_table(found: Results) -> str:
    """Ratio to shortened training with the arm's optimizer, and the recipe's network and objective."""
    rows = []
    for arm in found.others:
        usual = frozenset({("optim", dict(arm.setup)["optim"])})
        if usual not in (arm.setup, found.base):
            rows.append([arm.name, *(found.ratio([arm], usual, metric) for metric in found.metrics)])
    rows = [row for row in rows if any(row[1:])]
    return markdown(["arm", *map(plain, found.metrics)], rows) if rows else ""


def by_rate(found: Results, family: str) -> dict[str, list[Arm]]:
    """A family's arms: all, by its name; and, if it has several, those of each learning rate, by name and rate."""
    arms = [arm for arm in found.others if arm.family == family]
    rates = sorted({arm.lr for arm in arms})
    groups = {f"{family}, learning rate {rate:g}": [arm for arm in arms if arm.lr == rate] for rate in rates}
    return {family: arms} | (groups if len(rates) > 1 else {})


def full_table(found: Results) -> str:
    """FLOPs at which each family reaches the quality of full training: at its best learning rates, and at each.

    Families with one length at each learning rate have a single row.
    """
    rows = []
    for family in dict.fromkeys(arm.family for arm in found.others):
        groups = by_rate(found, family)
        if all(len(by_length(arms, found.metrics[0])) == 1 for name, arms in groups.items() if name != family):
            groups = {family: groups[family]}
        for name, arms in groups.items():
            row = [name]
            for metric in found.metrics:
                full, own = found.curve(found.baseline, metric), found.curve(arms, metric)
                row.append(str(share_of_full(full, own, metric)) if full and own else "")
            rows.append(row)
    return markdown(["family", *map(plain, found.metrics)], rows)


def of_one_batch_size(found: Results) -> tuple[str, Results] | None:
    """The batch size of full training, and the results of the arms that have it; None if none has another."""
    size = next((arm.batch_size for arm in found.baseline if arm.family == "full"), None)
    names = {arm.name for arm in found.arms if arm.batch_size == size}
    if size is None or len(names) == len(found.arms):
        return None
    return size, Results([record for record in found.records if record["arm"] in names])


def batch_size_table(found: Results, size: str) -> str:
    """FLOPs at which ordinary training in other batches is as good as full training in batches of `size`."""
    of_size: dict[str, list[Arm]] = {}
    for arm in found.baseline:
        of_size.setdefault(arm.batch_size, []).append(arm)
    usual, rows = of_size.pop(size), []
    for other, arms in sorted(of_size.items(), key=lambda item: -float(item[0] or 0)):
        curves = [(found.curve(usual, metric), found.curve(arms, metric), metric) for metric in found.metrics]
        rows.append([f"in batches of {other}", *(str(share_of_full(a, b, m)) if a and b else "" for a, b, m in curves)])
    return markdown(["ordinary training", *map(plain, found.metrics)], rows)


def short_ratio_table(found: Results) -> str:
    """Ratio to shortened training with the recipe's optimizer, network and objective, and nothing else."""
    rows = [[arm.name, *(found.ratio([arm], found.base, m) for m in found.metrics)] for arm in found.others]
    return markdown(["arm", *map(plain, found.metrics)], rows)


def prediction_table(found: Results, variance: dict[str, list[list[float]]]) -> str:
    """The variance of each policy's gradient, which predicts the ratio, and the ratio."""
    rows, metric = [], found.metrics[0]
    curve = found.curve(found.baseline, metric)
    for arm in found.others:
        if curve and metric in arm.quality and (figures := variance.get(arm.family)):
            measured = ratio([arm], found.draws[metric], curve, metric)
            _, low, high = figures[1]
            verdict = "too low" if high < measured.low else "too high" if low > measured.high else "agrees"
            if (verdict, measured.sides[1]) == ("too low", -1) or (verdict, measured.sides[2]) == ("too high", 1):
                verdict = "open: the interval ends where the curve does"
            predicted = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in figures]
            rows.append([arm.name, *predicted, str(measured), verdict])
    return markdown(["arm", "variance", "preconditioned", f"{plain(metric)}: ratio", "prediction"], rows)


def level_table(found: Results) -> str:
    """Each arm's validation loss by level relative to ordinary training with as many samples, over common seeds."""
    metric = HEADLINES[0]
    curve = [found.best(group, metric) for group in by_length(found.baseline, metric)]
    curve = [arm for arm in curve if arm.levels]
    cost, rows, bins = [arm.cost["samples_used"] for arm in curve], [], 0
    for arm in found.others:
        seeds = set(arm.levels).intersection(*(other.levels for other in curve))
        if not seeds or not curve or arm.cost["samples_used"] <= 0.98 * min(cost):
            continue
        own, *usual = (np.mean([each.levels[seed] for seed in seeds], axis=0) for each in (arm, *curve))
        expected = [np.interp(arm.cost["samples_used"], cost, column) for column in np.array(usual).T]
        rows.append([arm.name, *(f"{value:+.1%}" for value in own / expected - 1)])
        bins = len(own)
    return markdown(["arm", *(f"{n / bins:.2f}–{(n + 1) / bins:.2f}" for n in range(bins))], rows) if rows else ""


def tables(found: Results, predicted: dict[str, list[list[float]]]) -> str:
    """All tables, in Markdown.

    Args:
        found: results of a comparison.
        predicted: variance of the gradient by policy, as gradient_variance.py writes it; {}: not measured.
    """
    sections = {
        "Ordinary training: the best learning rate at each length": scan_table(found),
        f"Ratio to shortened training with {found.optimizer}": ratio_table(found),
        "Ratio to shortened training with the same optimizer, network and objective": own_table(found),
        "Ratio to shortened training with the same optimizer, and the recipe's network and objective": optimizer_table(
            found
        ),
        f"FLOPs for the quality of full training with {found.optimizer}, as a share of its FLOPs": full_table(found),
    }
    if alone := of_one_batch_size(found):
        size, same = alone
        title = f"FLOPs for the quality of full training in batches of {size} with {found.optimizer}"
        sections[title] = batch_size_table(found, size)
        title = f"In batches of {size} alone: ratio to shortened training with {found.optimizer}"
        sections[title] = short_ratio_table(same)
        title = f"In batches of {size} alone: FLOPs for the quality of full training with {found.optimizer}"
        sections[title] = full_table(same)
    if predicted:
        title = "Variance of the gradient relative to uniform sampling, which predicts the ratio, and the ratio"
        sections[title] = prediction_table(found, predicted)
    if any(arm.levels for arm in found.arms):
        title = "Validation loss by level, relative to ordinary training with as many samples, where there is any"
        sections[title] = level_table(found)
    whole = ", ".join(f"{found.full[measure]:.4g} {unit}" for measure, unit in MEASURES.items())
    head = f"{described(found)}. `benchmarks/README.md` defines the columns.\n"
    head += f"FLOPs are shares of those of full training with {found.optimizer} ({whole}).\n"
    return head + "".join(f"\n## {title}\n\n{text.lstrip()}" for title, text in sections.items() if text)


def read(folder: Path) -> tuple[Results, dict[str, list[list[float]]]]:
    """The results of a comparison, and the predictions if they were made."""
    records = [json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))]
    predicted = folder / PREDICTED
    return Results(records), json.loads(predicted.read_text()) if predicted.is_file() else {}


def report(folder: Path) -> str:
    """Write `table.md`, `figure.png` and `commands.sh` from a folder's records; return the text of the first."""
    found, predicted = read(folder)
    text = f"# {folder.name}\n\n" + tables(found, predicted)
    (folder / "table.md").write_text(text)
    (folder / "commands.sh").write_text(commands(folder.name, found.records))
    figure(found, folder / "figure.png")
    return text


def figure(found: Results, path: Path) -> None:
    """Plot quality against FLOPs: a curve per family, at the best learning rates, with its spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {f"full and shortened, {found.optimizer}": found.baseline}
    for arm in found.others:
        curves.setdefault(arm.family, []).append(arm)
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    looks = [("black", "o"), *((colour, marker) for marker in "s^Dv" for colour in colours)]
    chart, axes = pyplot.subplots(1, len(found.metrics), figsize=(5 * len(found.metrics), 4.2), squeeze=False)
    for axis, metric in zip(axes[0], found.metrics, strict=True):
        for (name, arms), (colour, marker) in zip(curves.items(), looks, strict=False):
            points = [found.best(group, metric) for group in by_length(arms, metric)]
            values = [list(point.quality[metric].values()) for point in points]
            axis.errorbar(
                [point.cost["flops"] / found.full["flops"] for point in points],
                [found.draws[metric][point.name][0] for point in points],  # expected over all seeds, as in the tables
                [np.std(each, ddof=1) if len(each) > 1 else 0 for each in values],
                color=colour,
                label=name,
                marker=marker,
                linewidth=2 if arms is found.baseline else 1,
                capsize=2,
            )
        axis.set_xlabel("training FLOPs relative to full")
        axis.set_ylabel(plain(metric))
        axis.grid(alpha=0.3)
    chart.suptitle(described(found), fontsize="medium")
    chart.tight_layout()
    chart.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    chart.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(chart)


def main(folders: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Make the tables and the figure of comparisons from their records.

    Args:
        folders: of the comparisons (each the --output-dir of compare.py).
    """
    for folder in folders:
        text = report(folder) if any((folder / "records").glob("*.json")) else f"{folder} has no records.\n"
        Console(soft_wrap=True).print(text, markup=False, highlight=False)


if __name__ == "__main__":
    tyro.cli(main)
