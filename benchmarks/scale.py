"""How the saving moves with the size of the training: the best known combination at several sizes, from the records.

python benchmarks/scale.py      # writes benchmarks/results/scale.md
"""

from pathlib import Path
from typing import NamedTuple

import proof
from matched_quality import ordinary, recipe, share_of_full
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
HEAD = """# The saving at several sizes

Made by `python benchmarks/scale.py` from the records; [benchmarks/README.md](../README.md) has the commands and
defines metrics and intervals. *Against AdamW*: the FLOPs at which the combination reaches the quality of full
training with AdamW at its best learning rate, as a share of that training's. *Of pruning alone*: the same against
full training with the combination's own optimizer, network and objective; empty where the combination leaves no
sample or level out.
"""


class Ladder(NamedTuple):
    """An objective at several sizes.

    Attributes:
        objective: its name.
        combination: what is compared with full training, in words.
        family: of its arms.
        folders: of the comparisons in `RESULTS`, which are the names of their recipes, smallest first.
    """

    objective: str
    combination: str
    family: str
    folders: tuple[str, ...]


LADDERS = (
    Ladder(
        "Noise prediction, linear noise schedule",
        "Muon, levels and samples by importance",
        "muon-importance",
        ("dit", "dit_x8", "dit_x64"),
    ),
    Ladder(
        "Flow matching",
        "Muon, posterior-mean targets, levels by importance",
        "muon-posterior-importance",
        ("flow", "flow_x5", "flow_x33"),
    ),
    Ladder(
        "Masked autoencoder",
        "Muon, cross-attention decoder, half of the hidden patches",
        "muon-half",
        ("mae", "mae_x13", "mae_x124"),
    ),
)


def described(name: str) -> str:
    """The images of a recipe, and how often they are used."""
    found = recipe(f"benchmarks/recipes/{name}.yaml")
    images = {"fashion-mnist": "Fashion-MNIST", "uoft-cs/cifar10": "CIFAR-10"}[found["data.source"]]
    count = int(found.get("data.limit", 50_000))
    return f"`{name}`: {count:,} images of {images}, {found['epochs']} epochs"


def rows_of(ladder: Ladder) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a ladder's table; a size without records says so."""
    head, rows = ["training", "full training, FLOPs", "seeds"], []
    for name in ladder.folders:
        if not (RESULTS / name / "records").is_dir():
            rows.append([described(name), "not measured yet"])
            continue
        found, _ = proof.read(RESULTS / name)
        arms = [arm for arm in found.others if arm.family == ladder.family]
        seeds = str(max((len(values) for arm in arms for values in arm.quality.values()), default=0))
        row = [described(name), f"{found.full['flops']:.2g}", seeds]
        metrics = [metric for metric in proof.HEADLINES if metric in found.metrics]
        head = [
            *head[:3],
            *(f"{proof.plain(metric)}: {what}" for metric in metrics for what in ("against AdamW", "of pruning alone")),
        ]
        for metric in metrics:
            own = found.curve(arms, metric) if arms else None
            setup = next((arm.setup for arm in arms), found.base)
            same = [arm for arm in ordinary(found.arms, setup) if arm not in arms]
            for baseline in (found.baseline, same if arms and all(arm.pruned for arm in arms) else []):
                full = found.curve(baseline, metric) if baseline else None
                row.append(str(share_of_full(full, own, metric)) if full and own else "")
        rows.append(row)
    return head, [row + [""] * (len(head) - len(row)) for row in rows]


def table() -> str:
    """The whole document."""
    parts = [HEAD]
    for ladder in LADDERS:
        head, rows = rows_of(ladder)
        parts.append(f"## {ladder.objective}: {ladder.combination}\n\n{proof.markdown(head, rows)}")
    return "\n".join(parts)


if __name__ == "__main__":
    (RESULTS / "scale.md").write_text(table())
    Console().print(f"wrote {RESULTS / 'scale.md'}", soft_wrap=True)
