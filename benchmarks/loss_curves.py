"""The curves and tables of docs/normal_losses.md.

    python benchmarks/loss_curves.py                        # from the records in benchmarks/losses
    python benchmarks/loss_curves.py --runs runs/losses     # from runs in it; missing ones are trained

A record holds a run's command, machine and versions, and the training and validation loss of each epoch.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "losses"
DOCUMENT = ROOT / "docs" / "normal_losses.md"
FIGURES = ROOT / "docs" / "losses"
EVERY_EPOCH = "--evaluate.every 1 --evaluate.at-start --evaluate.images 16"
DIT = "train_diffusion.py --config benchmarks/recipes/dit.yaml"
RUNS = {
    "ddpm": "train_diffusion.py --config configs/fashion_mnist_ddpm.yaml --epochs 3",
    "mae": "train_mae.py",
    "dit": DIT,
    "dit-infobatch": f"{DIT} --infobatch",
    "flow": f"{DIT} --adapter flow",
    "edm": f"{DIT} --adapter edm",
    "dit-lr": f"{DIT} --optim.lr 0.4",
}
SHOWN = 6  # epochs in a table, at most


@dataclass(frozen=True)
class Curve:
    """Losses of a run.

    Attributes:
        command: that trains it.
        environment: machine and versions.
        seconds: of training.
        samples_used: in the whole run.
        training: mean loss of each epoch.
        validation: loss before training, then after each epoch.
    """

    command: str
    environment: dict[str, str]
    seconds: float
    samples_used: int
    training: list[float]
    validation: list[float]


def read_run(folder: Path, command: str) -> Curve:
    """A run's losses, from its metrics.jsonl and summary.json."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Curve(
        f"python {command}",
        summary["environment"],
        summary["seconds"],
        summary["samples_used"],
        [round(line["loss"], 5) for line in lines if line["kind"] == "epoch"],
        [round(line["validation_loss"], 5) for line in lines if line["kind"] == "evaluation"],
    )


def draw(curve: Curve, path: Path) -> None:
    """Write a figure of the losses by epoch."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    with mpl.rc_context({"svg.hashsalt": "losses", "font.size": 8}):
        figure = Figure(figsize=(4.4, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(curve.training) + 1), curve.training, "o-", ms=2.5, color="#b0611c", label="training")
        axes.plot(range(len(curve.validation)), curve.validation, "s-", ms=2.5, color="#1b4f8a", label="validation")
        axes.set(xlabel="epoch (0: before training)", ylabel="loss", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def section(name: str, curve: Curve) -> str:
    """The Markdown of a run: figure, command, table, machine."""
    last = len(curve.training)
    epochs = sorted({round(last * k / (SHOWN - 1)) for k in range(SHOWN)} | {1})
    rows = [
        ("epoch", [str(epoch) for epoch in epochs]),
        ("training loss", [f"{curve.training[epoch - 1]:.3f}" if epoch else "" for epoch in epochs]),
        ("validation loss", [f"{curve.validation[epoch]:.3f}" for epoch in epochs]),
    ]
    head, *body = ("| " + " | ".join([title, *cells]) + " |" for title, cells in rows)
    versions = ", ".join(
        f"{key} {value}" for key, value in curve.environment.items() if key not in ("device", "processes")
    )
    return "\n".join(
        [
            f"![Training and validation loss by epoch](losses/{name}.svg)",
            "",
            f"`{curve.command}`",
            "",
            head,
            "|---" * (len(epochs) + 1) + "|",
            *body,
            "",
            f"{curve.samples_used:,} samples; {curve.environment['device']}, one of them used and shared; {versions}.",
        ]
    )


def written(document: str, curves: dict[str, Curve]) -> str:
    """The document with the sections of the curves between their comments, `<!-- curve NAME -->` and `<!-- end -->`."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}\n{section(found[2], curves[found[2]])}\n{found[3]}"

    return re.sub(r"(<!-- curve ([\w-]+) -->)\n.*?(<!-- end -->)", replace, document, flags=re.S)


def records() -> dict[str, Curve]:
    """The records of benchmarks/losses."""
    return {path.stem: Curve(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RECORDS.glob("*.json"))}


def main(runs: Path | None = None) -> None:
    """Draw the curves and write the tables of docs/normal_losses.md.

    Args:
        runs: folder of the runs; those that are missing are trained; default: draw the records.
    """
    for name, command in RUNS.items() if runs else ():
        if not (runs / name / "summary.json").is_file():
            arguments = f"{command} {EVERY_EPOCH} --overwrite --output-dir".split()
            subprocess.run([sys.executable, *arguments, str((runs / name).resolve())], check=True, cwd=ROOT)
        record = asdict(read_run(runs / name, f"{command} {EVERY_EPOCH}"))
        (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    curves = records()
    for name, curve in curves.items():
        draw(curve, FIGURES / f"{name}.svg")
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), curves), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
