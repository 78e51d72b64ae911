"""Comparisons on CIFAR-10 that fit into minutes on one GPU, with several runs at the same time.

    python benchmarks/gpu/comparisons.py diffusion --work FOLDER --data CIFAR10

`benchmarks/gpu/run` starts it. It starts as many worker processes as raise the throughput (measured by sharing.py).
They share the comparisons below through the folders of benchmarks/compare.py, all of one seed before the next. Started
again it continues: finished runs are kept, others continue from their checkpoints.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import compare
import quality
import torch
import tyro
import yaml
from sharing import concurrent_runs
from toy import TOY, TOY_EPOCHS, toy_data

from pretrain.config.schema import Data
from pretrain.data.sources import open_data

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SEEDS = (0, 1, 2)
IMPORTANCE = "--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5"


class Comparison(NamedTuple):
    """A comparison of benchmarks/compare.py.

    Attributes:
        name: of its folder.
        recipe: a file in benchmarks/recipes.
        flags: of all runs.
        arms: from the epochs of a full run to `--arms`.
    """

    name: str
    recipe: str
    flags: tuple[str, ...]
    arms: Callable[[int], list[str]]


def shortened(epochs: int, share: float, lr: float) -> str:
    """The arm of ordinary training with a share of the epochs and a learning rate."""
    return f"shortened@{share:g} lr {lr:g}=--epochs {max(1, round(share * epochs))} --optim.lr {lr:g}"


def diffusion_arms(epochs: int) -> list[str]:
    """The most informative arms first. Learning rates are the recipe's, 1e-3, and that times sqrt(1 / share)."""
    return [
        "full",
        f"importance@0.65={IMPORTANCE}",
        shortened(epochs, 0.65, 1.24e-3),
        f"levels@0.65={IMPORTANCE} --pruning.over levels",
        shortened(epochs, 0.65, 1e-3),
        shortened(epochs, 0.45, 1.49e-3),
        "infobatch=--pruning.policy infobatch",
    ]


def mae_arms(epochs: int) -> list[str]:
    """The same for masked autoencoders; the recipe's learning rate is 1.5e-3."""
    return [
        "full",
        "half=--model.decoder cross --adapter.predict 0.5 --optim.lr 2.25e-3",
        shortened(epochs, 0.65, 1.86e-3),
        f"samples@0.65={IMPORTANCE} --pruning.over samples",
        shortened(epochs, 0.45, 2.24e-3),
    ]


COMPARISONS = {
    "diffusion": (
        Comparison("cifar10_dit_linear", "cifar10_dit.yaml", ("--adapter.noise-schedule", "linear"), diffusion_arms),
        Comparison(
            "cifar10_dit_cosine", "cifar10_dit.yaml", ("--adapter.noise-schedule", "squaredcos_cap_v2"), diffusion_arms
        ),
        Comparison("cifar10_dit_flow", "cifar10_dit.yaml", ("--adapter", "flow"), diffusion_arms),
    ),
    "mae": (Comparison("cifar10_mae", "cifar10_mae.yaml", (), mae_arms),),
}


def lines(task: str, work: Path, data: Path, toy: bool, note: str) -> list[list[str]]:
    """The command lines of benchmarks/compare.py, in their order; see `main` for the arguments."""
    sampling = ["--images", "64", "--steps", "2"] if toy else ["--images", "5000", "--steps", "20"]
    weights = ["--features", str(work / "features.safetensors")] if task == "diffusion" else []
    commands = []
    for seed in SEEDS[: 1 if toy else None]:
        for each in COMPARISONS[task]:
            folder, arms = work / each.name, each.arms(epochs_of(each.recipe, toy))
            line = ["--config", str(RECIPES / each.recipe), "--output-dir", str(folder), "--seeds", str(seed)]
            line += ["--arms", *arms, *sampling, *weights, "--note", note, "--data", str(data), *each.flags]
            commands.append(line + (TOY[each.recipe] if toy else []))
    return commands


def epochs_of(recipe: str, toy: bool) -> int:
    """Epochs of a full run of a recipe."""
    return TOY_EPOCHS if toy else yaml.safe_load((RECIPES / recipe).read_text())["epochs"]


def work_through(commands: list[list[str]]) -> None:
    """Make the missing runs of all comparisons; if one fails, print its traceback, continue, and exit with status 1.

    Raises:
        SystemExit: always; with status 75 after a signal to stop.
    """
    failed = False
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for evaluation, which uses float32
    for line in commands:
        try:
            compare.main(line)
        except SystemExit as stopped:  # 75: stopped by a signal
            if stopped.code == 75:
                raise
            failed = failed or bool(stopped.code)
            traceback.print_exc()
        except Exception:  # one failed run must not cost the others their time
            failed = True
            traceback.print_exc()
    sys.exit(failed)


def main(
    task: Annotated[Literal["diffusion", "mae"], tyro.conf.Positional],
    work: Path,
    data: Path,
    toy: bool = False,
    worker: str | None = None,
) -> None:
    """Make the comparisons of a task.

    Args:
        task: diffusion or mae.
        work: folder for records and runs.
        data: folder of CIFAR-10's parquet files.
        toy: few images and tiny networks, for a CPU.
        worker: be one of the worker processes, with this note in the records; without it, start them.
    """
    if toy:
        data = toy_data(data, work / "data")
    if worker is not None:
        work_through(lines(task, work, data, toy, worker))
    weights = work / "features.safetensors"
    if task == "diffusion" and not weights.exists():
        accuracy = quality.train_classifier(open_data(Data(source=str(data)), 0), weights, epochs=1 if toy else 8)
        print(f"feature network: accuracy {accuracy:.1%} on the test images", flush=True)
    sharing = work / "sharing.json"
    if not sharing.exists():
        first = COMPARISONS[task][0]
        flags = [*first.flags, "--data", str(data), *(TOY[first.recipe] if toy else [])]
        sharing.write_text(json.dumps(concurrent_runs(RECIPES / first.recipe, flags, toy), indent=1) + "\n")
    count = json.loads(sharing.read_text())["runs"]
    print(f"{count} concurrent runs", flush=True)
    command = [sys.executable, __file__, task, "--work", str(work), "--data", str(data)]
    command += ["--worker", f"{count} runs share the device"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    (work / "logs").mkdir(exist_ok=True)
    workers = []
    for number in range(count):
        with (work / "logs" / f"worker-{number}.txt").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            workers.append(
                subprocess.Popen(
                    [*command, *(["--toy"] if toy else [])], stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            )
    codes = [process.wait() for process in workers]
    print(f"exit statuses of the workers: {codes}", flush=True)
    sys.exit(max(codes))


if __name__ == "__main__":
    tyro.cli(main)
