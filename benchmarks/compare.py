"""Compare kinds of training: arms x seeds; one record per run, one table, one figure.

    python benchmarks/compare.py --config benchmarks/recipes/dit.yaml --output-dir runs/compare/dit
    python benchmarks/compare.py --config ... --output-dir ... --seeds 0 1 2 3 4 --arms full shortened levels
    python benchmarks/compare.py --config ... --output-dir ... --arms full "mine=--pruning.policy mine.py"

An arm is a set of settings of a run: a family of this file (full, shortened, random, infobatch, samples, levels,
importance), or NAME=FLAGS of your own; its family is the name up to the first "@" or space. Settings that this program
does not have, such as `--data`, are passed to the runs.

A comparison that was killed continues when it is started again. Two processes with the same folder share the runs.
Under `accelerate launch` or torchrun all processes train each run together. proof.py explains the table and makes it
from the records.
"""

import dataclasses
import fcntl
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import proof
import torch
import tyro
from accelerate import PartialState
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # the programs and the package of this checkout

import quality

import train_diffusion
import train_mae
from pretrain.adapters import Generative
from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run
from pretrain.config import registry, trusted_code
from pretrain.config.cli import parse
from pretrain.config.schema import Config
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.files import atomic_write
from pretrain.data.sources import open_data
from pretrain.evaluation.feature_extractors import load
from pretrain.evaluation.knn import KNN

FAMILIES = ("full", "shortened", "random", "infobatch", "samples", "levels", "importance")


@dataclass(frozen=True)
class Comparison:
    """Compare kinds of training; settings that are not listed here are passed to the runs, such as `--data`.

    Attributes:
        config: recipe of the runs, a YAML file.
        output_dir: folder for records, runs, table and figure.
        arms: families, or NAME=FLAGS of your own; "FAMILY@LENGTH lr*RATE=FLAGS" for several points of one family.
        seeds: of the runs: of parameters, order, pruning and noise.
        shares: lengths of the shortened runs, as shares of the recipe's epochs.
        rates: exponents x of the shortened runs' learning rate: the recipe's times (1 / share) ** x.
        budgets: `--pruning.budget` of the policies that have one.
        compensations: `--optim.compensation` of the policies.
        images: number of generated images for the Fréchet distance; 0: none.
        steps: sampling steps of these images.
        features: feature network of the Fréchet distance, as in `pretrain evaluate --features`; default: a small
            classifier that is trained on the same data.
        note: a comment that is stored in each record, for example how many runs shared a GPU.
    """

    config: Path
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    arms: tuple[str, ...] = FAMILIES
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.85, 0.75, 0.65, 0.55, 0.45)
    rates: tuple[float, ...] = (0.0, 0.5, 1.0)
    budgets: tuple[float, ...] = (0.65,)
    compensations: tuple[float, ...] = (0.0, 0.5)
    images: int = 1000
    steps: int = 20
    features: str | None = None
    note: str = ""


class Arm(NamedTuple):
    """A set of settings; arms of the same family are points of one curve."""

    name: str
    family: str
    flags: list[str]


def of_own(named: str, families: Sequence[str]) -> Arm | None:
    """The arm that NAME=FLAGS means; None for the name of a family.

    Raises:
        UserError: it is neither.
    """
    name, own, flags = named.partition("=")
    if not own and name not in families:
        raise UserError(f"--arms {name}: there are {', '.join(families)}, or NAME=FLAGS of your own")
    return Arm(name, re.split("[@ ]", name)[0], shlex.split(flags)) if own else None


def expanded(comparison: Comparison, base: Config) -> Iterator[Arm]:
    """The arms of a comparison.

    Args:
        comparison: its settings.
        base: settings of the full run.

    Raises:
        UserError: there is no family of a name.
    """
    for named in comparison.arms:
        if arm := of_own(named, FAMILIES):
            yield arm
        elif named == "full":
            yield Arm("full", "full", [])
        elif named == "shortened":
            yield from _shortened(comparison, base)
        else:
            yield from _pruned(comparison, named)


def _shortened(comparison: Comparison, base: Config) -> Iterator[Arm]:
    for share in comparison.shares:
        epochs = max(1, round(share * base.epochs))
        for power in comparison.rates:
            rate = base.optim.lr * (base.epochs / epochs) ** power
            flags = ["--epochs", str(epochs), "--optim.lr", repr(rate)]
            yield Arm(f"shortened@{share:g} lr*{rate / base.optim.lr:.2f}", "shortened", flags)


def _pruned(comparison: Comparison, family: str) -> Iterator[Arm]:
    policy = {
        "samples": ["--pruning.policy", "importance", "--pruning.over", "samples"],
        "levels": ["--pruning.policy", "importance", "--pruning.over", "levels"],
    }.get(family, ["--pruning.policy", family])
    budgets: Sequence[float | None] = [None] if policy[1] == "infobatch" else comparison.budgets
    for budget in budgets:
        for power in comparison.compensations:
            name = family + (f"@{budget:g}" if budget else "") + (f" lr^{power:g}" if power else "")
            flags = [*policy, *(["--pruning.budget", str(budget)] if budget else [])]
            yield Arm(name, family, [*flags, *(["--optim.compensation", str(power)] if power else [])])


def run_name(arm: Arm, seed: int) -> str:
    """The name of a run's folder and record."""
    return "".join(letter if letter.isalnum() or letter in ".@^" else "-" for letter in arm.name) + f"-seed{seed}"


def from_rank_0(value: bool) -> bool:
    """Rank 0's value, on all ranks."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def claimed(lock: Path, made: Path) -> Iterator[bool]:
    """A context that yields whether this launch has to make a file; it is False if another one does or has.

    Args:
        lock: file that is locked meanwhile; the lock ends with the process.
        made: the file to make.
    """
    with lock.open("w") as file:
        mine = False
        if not int(os.environ.get("RANK", 0)):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = not made.exists()
        yield from_rank_0(mine)


def record_of(comparison: Comparison, config: Config) -> Path:
    """The file of a run's record."""
    return comparison.output_dir / "records" / f"{config.output_dir.name}.json"


def machine() -> str:
    """The machine, for the record."""
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {', '.join(cards) or 'no GPU'}"


def one_run(comparison: Comparison, arm: Arm, config: Config, command: str) -> None:
    """Train, or continue a run that was interrupted, and write its record.

    Args:
        comparison: the comparison.
        arm: of the run.
        config: settings of the run.
        command: that makes the same run, for the record.
    """
    if storage.newest(config.output_dir / "checkpoints"):
        config = dataclasses.replace(config, resume="newest")
    else:
        config = dataclasses.replace(config, overwrite=config.output_dir.exists())
    load_average = os.getloadavg()[0]
    generative = isinstance(config.component("adapter"), Generative)
    if not (config.output_dir / "summary.json").is_file():
        (train_diffusion if generative else train_mae).main(config)
    run = load_run(config.output_dir)
    if torch.cuda.is_available():
        run.model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    summary = json.loads((config.output_dir / "summary.json").read_text())
    measured = dict(summary["quality"])
    if not generative:
        if run.source.classes:
            measured["linear_probe"] = quality.linear_probe(run)
            if config.data.subset is not None:  # neighbours among all training images, as in the other arms
                whole = run.whole_source
                measured |= KNN(whole.train, whole.test, whole.classes)(run.model)
    elif comparison.images:
        weights = comparison.features or comparison.output_dir / "features.safetensors"
        measured["frechet_distance"] = quality.frechet_distance(run, str(weights), comparison.images, comparison.steps)
    if int(os.environ.get("RANK", 0)):  # all ranks generate images, rank 0 writes
        return
    record: dict[str, Any] = {
        "arm": arm.name,
        "family": arm.family,
        "seed": config.seed,
        "flags": arm.flags,
        "command": command,
        "cost": {
            "samples_used": summary["samples_used"],
            "flops": summary["train_flops"],
            "seconds": summary["seconds"],
        },
        "quality": measured,
        "parameters": summary["parameters"],
        "images": summary["dataset_size"],
        "epochs": summary["epochs"],
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "load_when_started": load_average,
        "torch": torch.__version__,
        "machine": machine(),
        "note": comparison.note,
    }
    save(record, record_of(comparison, config))


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record; the file is complete or not there."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")


def main(line: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, then write the table and the figure.

    Args:
        line: the command line; default: this process's.
    """
    comparison, rest = tyro.cli(Comparison, args=line, return_unknown_args=True, description=__doc__)
    folder, rank = comparison.output_dir, int(os.environ.get("RANK", 0))
    console = Console(soft_wrap=True, highlight=False, quiet=rank > 0)

    def config_of(arm: Arm, seed: int) -> tuple[Config, list[str]]:
        run = folder / "runs" / run_name(arm, seed)
        flags = [*rest, *arm.flags, "--seed", str(seed), "--output-dir", str(run)]
        arguments = ["--config", str(comparison.config), *flags]
        config = parse(arguments, adapter="flow", model="unet", recipe=comparison.config, output_dir="", help="")
        return config, arguments

    base, _ = config_of(Arm("full", "full", []), 0)
    arms = list(expanded(comparison, base))
    every = [(arm, *config_of(arm, seed)) for seed in comparison.seeds for arm in arms]
    for _, config, _ in every:  # report errors before the first run
        registry.load_policy(config.policy)
    if comparison.features:
        trusted_code.trust_features(comparison.features)
        load(comparison.features)
    if "WORLD_SIZE" in os.environ:  # initializes the process group, which `from_rank_0` needs
        PartialState(cpu=not torch.cuda.is_available())
    for name in ("records", "runs", "locks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    program = "train_diffusion.py" if isinstance(base.component("adapter"), Generative) else "train_mae.py"
    weights = folder / "features.safetensors"
    if program == "train_diffusion.py" and comparison.images and not comparison.features:
        with claimed(folder / "locks" / "features", weights) as mine:
            if mine and not rank:
                accuracy = quality.train_classifier(open_data(base.data, 0), weights)
                console.print(f"trained the feature network: accuracy {accuracy:.1%} on held-out images")
    for number, (arm, config, arguments) in enumerate(every, 1):
        with claimed(folder / "locks" / config.output_dir.name, record_of(comparison, config)) as mine:
            if not mine:
                continue
            console.rule(f"{number} of {len(every)}: {arm.name}, seed {config.seed}")
            one_run(comparison, arm, config, shlex.join(["python", program, *arguments]))
            if not rank:
                proof.report(folder)
    if not rank:
        console.print(proof.report(folder), markup=False)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
