"""Compare kinds of training of an example: arms x seeds; one record per run, one table, one figure.

    python benchmarks/compare_examples.py --program examples/classification.py --output-dir runs/compare/cifar10 \\
        --config examples/recipes/cifar10_resnet18.yaml --seeds 0 1 2 --arms full shortened random infobatch quantile
    python benchmarks/compare_examples.py ... --arms full "topk@0.6=--training.policy full --blocking.share 0.4"

The example must write a record by `--output FILE`, as `write_record` of examples/fit.py does. An arm is NAME=FLAGS of
your own, whose family is the name up to the first "@" or space; or a family: full, shortened, or a policy of the
examples that train by fit.py. Settings that this program does not have, such as `--data`, are passed to the runs.

A comparison that was killed continues with the run that it was at, from that run's start. Two processes with the same
folder share the runs. proof.py explains the table and makes it from the records.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import proof
import torch
import tyro
from compare import Arm, claimed, machine, of_own, run_name, save
from matched_quality import parsed, recipe
from rich.console import Console

from pretrain.core.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parents[1]
BUDGETED = ("random", "importance", "orderdp", "selective-backprop")
FAMILIES = ("full", "shortened", *BUDGETED, "infobatch", "quantile", "seta", "ies")


@dataclass(frozen=True)
class Comparison:
    """Compare kinds of training; settings that are not listed here are passed to the runs, such as `--data`.

    Attributes:
        program: the example, a .py file.
        output_dir: folder for records, the runs' output, table and figure.
        config: recipe of the runs, a YAML file.
        arms: families, or NAME=FLAGS of your own; "FAMILY@LENGTH lr*RATE=FLAGS" for several points of one family.
        seeds: of the runs.
        seed_flag: setting of the example that takes the seed.
        shares: lengths of the shortened runs, as shares of the full run's epochs.
        rates: exponents x of the shortened runs' learning rate: the full run's times (1 / share) ** x.
        budgets: of the policies that have one.
        pruned_rates: learning rates of the policies, as multiples of the full run's.
        note: a comment that is stored in each record, for example how many runs shared a machine.
    """

    program: Path
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    config: Path | None = None
    arms: tuple[str, ...] = ("full", "shortened", "random", "infobatch")
    seeds: tuple[int, ...] = (0, 1, 2)
    seed_flag: str = "training.seed"
    shares: tuple[float, ...] = (0.7, 0.5)
    rates: tuple[float, ...] = (0.0, 0.5, 1.0)
    budgets: tuple[float, ...] = (0.7,)
    pruned_rates: tuple[float, ...] = (1.0,)
    note: str = ""


def expanded(comparison: Comparison, common: Sequence[str]) -> Iterator[Arm]:
    """The arms of a comparison.

    Args:
        comparison: its settings.
        common: flags of all runs.

    Raises:
        UserError: there is no family of a name, or the full run's epochs or learning rate are not known.
    """
    for named in comparison.arms:
        if arm := of_own(named, FAMILIES):
            yield arm
        elif named == "full":
            yield Arm("full", "full", ["--training.policy", "full"])
        elif named == "shortened":
            yield from _shortened(comparison, common)
        else:
            yield from _pruned(comparison, named, common)


def _full_run(comparison: Comparison, common: Sequence[str]) -> tuple[int, float]:
    """Epochs and learning rate of the full run."""
    known = (recipe(str(comparison.config.resolve())) if comparison.config else {}) | parsed(common)
    if not {"epochs", "optim.lr"} <= known.keys():
        raise UserError(
            "--arms shortened, and --pruned-rates, need the full run's --training.epochs and --training.lr; add both"
        )
    return int(known["epochs"]), float(known["optim.lr"])


def _pruned(comparison: Comparison, policy: str, common: Sequence[str]) -> Iterator[Arm]:
    budgets: Sequence[float | None] = comparison.budgets if policy in BUDGETED else [None]
    for budget in budgets:
        for rate in comparison.pruned_rates:
            name = policy + (f"@{budget:g}" if budget else "") + (f" lr*{rate:.2f}" if rate != 1 else "")
            flags = ["--training.policy", policy, *(["--training.budget", str(budget)] if budget else [])]
            if rate != 1:
                flags += ["--training.lr", repr(rate * _full_run(comparison, common)[1])]
            yield Arm(name, policy, flags)


def _shortened(comparison: Comparison, common: Sequence[str]) -> Iterator[Arm]:
    epochs, lr = _full_run(comparison, common)
    for share in comparison.shares:
        length = max(1, round(share * epochs))
        for power in comparison.rates:
            rate = lr * (epochs / length) ** power
            flags = ["--training.policy", "full", "--training.epochs", str(length), "--training.lr", repr(rate)]
            yield Arm(f"shortened@{share:g} lr*{rate / lr:.2f}", "shortened", flags)


def one_run(comparison: Comparison, arm: Arm, seed: int, flags: Sequence[str], console: Console) -> None:
    """Train, and write the record of the run.

    Args:
        comparison: the comparison.
        arm, seed: of the run.
        flags: of all runs.
        console: to report on.

    Raises:
        UserError: the run failed, or its record has no cost and quality.
    """
    name = run_name(arm, seed)
    output, log = (comparison.output_dir / "runs" / f"{name}.{kind}" for kind in ("json", "log"))
    words = [*flags, *arm.flags, f"--{comparison.seed_flag}", str(seed), "--output", str(output)]
    output.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        command = [sys.executable, str(comparison.program), *words]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise UserError(f"{arm.name}, seed {seed}, ended with status {done.returncode}; {log} has its output")
    record: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    if not {"cost", "quality"} <= record.keys():
        raise UserError(f"{comparison.program} wrote no record with cost and quality; it needs a setting --output FILE")
    console.print(", ".join(f"{metric} {value:.4g}" for metric, value in record["quality"].items()))
    record = {
        "arm": arm.name,
        "family": arm.family,
        "seed": seed,
        "flags": arm.flags,
        "command": shlex.join(["python", str(comparison.program), *words]),
        **record,
        "load_when_started": load,
        "torch": torch.__version__,
        "machine": machine(),
        "note": comparison.note,
    }
    save(record, comparison.output_dir / "records" / f"{name}.json")


def main(line: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, then write the table and the figure.

    Args:
        line: the command line; default: this process's.
    """
    comparison, rest = tyro.cli(Comparison, args=line, return_unknown_args=True, description=__doc__)
    for path, flag in ((comparison.program, "program"), (comparison.config, "config")):
        if path is not None and not path.is_file():
            raise UserError(f"--{flag} {path}: there is no such file; give its path")
    flags = [*(["--config", str(comparison.config)] if comparison.config else []), *rest]
    arms = list(expanded(comparison, rest))
    folder, console = comparison.output_dir, Console(soft_wrap=True, highlight=False)
    for name in ("records", "runs", "locks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    runs = [(arm, seed) for seed in comparison.seeds for arm in arms]
    for number, (arm, seed) in enumerate(runs, 1):
        name = run_name(arm, seed)
        with claimed(folder / "locks" / name, folder / "records" / f"{name}.json") as mine:
            if mine:
                console.rule(f"{number} of {len(runs)}: {arm.name}, seed {seed}")
                one_run(comparison, arm, seed, flags, console)
                proof.report(folder)
    if any((folder / "records").glob("*.json")):
        console.print(proof.report(folder), markup=False)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
