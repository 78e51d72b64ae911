"""How the saving moves with the size of the training: the best known combination at several sizes, from the records.

python benchmarks/scale.py      # writes benchmarks/results/scale.md
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import proof
from matched_quality import Arm, ordinary, recipe, share_of_full
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
HEAD = """# The saving at several sizes

Made by `python benchmarks/scale.py` from the records of `results/NAME/commands.sh`;
[benchmarks/README.md](../README.md) defines metrics and intervals. A row is one learning rate and batch size of the
combination, the same for all metrics; pruned runs divide the learning rate by the root of the share of the samples that
they use. *Seeds* are those of the row's arms, the fewest and the most. *Against AdamW*: the FLOPs at which the
combination reaches the quality of full training with AdamW at its best learning rate and batch size by the metric in
question, as a share of that training's; those tried are in `results/NAME/table.md`. *Of pruning alone*: the same
against full training with the combination's own optimizer, network and objective; empty where the combination leaves no
sample or level out, or where that full training was not run. `flow_x33` trained on plain targets, as posterior means
over 50,000 images cost too much: there it is Muon and levels alone.
"""


class Objective(NamedTuple):
    """An objective at several sizes.

    Attributes:
        name: of the objective.
        combination: what is compared with full training, in words.
        family: of its arms.
        folders: of the comparisons in `RESULTS`, which are the names of their recipes, smallest first.
    """

    name: str
    combination: str
    family: str
    folders: tuple[str, ...]


SECONDS = """
## Seconds

Training time of the combination beside full training with AdamW, one thread on a core of its own with the other core
idle; seconds are a share of those of the same seed, the mean with the smallest and the largest. The two are not matched
in quality: what is measured is the time of a FLOP. Full training has the recipe's learning rate.

"""
OBJECTIVES = (
    Objective(
        "Noise prediction, linear noise schedule",
        "Muon, levels and samples by importance",
        "muon-importance",
        ("dit", "dit_x8", "unet", "dit_x64"),
    ),
    Objective(
        "Flow matching",
        "Muon, posterior-mean targets, levels by importance",
        "muon-posterior-importance",
        ("flow", "flow_x5", "flow_x33"),
    ),
    Objective(
        "Masked autoencoder",
        "Muon, cross-attention decoder, half of the hidden patches",
        "muon-half",
        ("mae", "mae_x13", "mae_x124"),
    ),
)


def described(name: str) -> str:
    """The images of a recipe, and how often they are used."""
    found = recipe(f"benchmarks/recipes/{name}.yaml")
    source = found.get("data.source", found.get("data", ""))
    images = {"fashion-mnist": "Fashion-MNIST", "uoft-cs/cifar10": "CIFAR-10"}[source]
    count = int(found.get("data.limit", {"Fashion-MNIST": 6_000, "CIFAR-10": 50_000}[images]))
    return f"`{name}`: {count:,} images of {images}, {found['epochs']} epochs"


def cells_of(found: proof.Results, arms: Sequence[Arm], metric: str) -> list[str]:
    """The FLOPs of arms for the quality of full training with AdamW, and with their own setup; "" where unknown."""
    own = found.curve(arms, metric)
    same = ordinary(found.arms, arms[0].setup) if arms and all(arm.pruned for arm in arms) else []
    longest = max((arm.cost["samples_used"] for arm in same), default=0)
    cells = []
    for baseline in (found.baseline, same if longest >= 0.99 * found.full["samples_used"] else []):
        full = found.curve(baseline, metric)
        cells.append(str(share_of_full(full, own, metric)) if full and own else "")
    return cells


def rows_of(objective: Objective) -> tuple[list[str], list[list[str]]]:
    """Head and rows of an objective's table, a row for each learning rate; a size without records says so."""
    measured = [name for name in objective.folders if (RESULTS / name / "records").is_dir()]
    results = {name: proof.read(RESULTS / name)[0] for name in measured}
    metrics = [metric for metric in proof.HEADLINES if any(metric in found.metrics for found in results.values())]
    both = [f"{proof.plain(metric)}: {what}" for metric in metrics for what in ("against AdamW", "of pruning alone")]
    head, rows = ["training", "full training, FLOPs", "batch", "learning rate", "seeds", *both], []
    for name in objective.folders:
        if not (found := results.get(name)):
            rows.append([described(name), "not measured yet"] + [""] * (len(head) - 2))
            continue
        groups: defaultdict[tuple[int, float], list[Arm]] = defaultdict(list)
        for arm in found.others:
            if re.fullmatch(rf"{objective.family}(-b\d+)?", arm.family):
                groups[int(arm.batch_size), arm.lr].append(arm)
        for (size, rate), arms in sorted(groups.items()):
            row = [described(name), f"{found.full['flops']:.2g}", str(size), f"{rate:g}", proof.seeds(arms)]
            for metric in metrics:
                row += cells_of(found, arms, metric) if metric in found.metrics else ["", ""]
            rows.append(row)
    return head, rows


def seconds() -> str:
    """The table of seconds, from the comparisons `seconds_NAME`, of which each has `full` and one other arm."""
    rows = []
    for folder in sorted(RESULTS.glob("seconds_*")):
        found, _ = proof.read(folder)
        spent = {(record["arm"], record["seed"]): record["cost"]["seconds"] for record in found.records}
        for arm in found.others:
            shares = [spent[arm.name, seed] / spent["full", seed] for name, seed in spent if name == arm.name]
            share = f"{sum(shares) / len(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
            full = [value for (name, _), value in spent.items() if name == "full"]
            name = described(folder.name.removeprefix("seconds_"))
            whole = f"{sum(full) / len(full):.0f}"
            loss = " and ".join(proof.spread(each, "validation_loss") for each in (*found.baseline, arm))
            rows.append([name, whole, f"`{arm.name}`", str(len(shares)), found.share(arm, "flops"), share, loss])
    head = ["training", "full training, seconds", "arm", "seeds", "share of the FLOPs", "share of the seconds"]
    head.append("validation loss, full and arm")
    return SECONDS + proof.markdown(head, rows)


def table() -> str:
    """The whole document."""
    parts = [HEAD]
    for objective in OBJECTIVES:
        head, rows = rows_of(objective)
        parts.append(f"## {objective.name}: {objective.combination}\n\n{proof.markdown(head, rows)}")
    return "\n".join(parts) + seconds()


if __name__ == "__main__":
    (RESULTS / "scale.md").write_text(table())
    Console().print(f"wrote {RESULTS / 'scale.md'}", soft_wrap=True)
