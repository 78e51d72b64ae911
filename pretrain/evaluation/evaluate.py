"""Measure a trained run.

    pretrain evaluate RUN --metrics loss,knn

The metrics depend on the run's objective; docs/evaluation.md describes them. Under torchrun or `accelerate launch` the
processes share the work, and the values are those of one process.
"""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from pretrain.config import trusted_code
from pretrain.config.tyro_parser import call_with_options
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write, read_json, require_plain
from pretrain.core.text import printable


@dataclass(frozen=True)
class Command:
    """Measure the EMA model of a run: print a table, and append a record to RUN/evaluation.json.

    The default of a setting is that of the run (its --evaluate.* in training).

    Attributes:
        run: folder of a run.
        metrics: names, separated by commas or spaces; default: those measured in training.
        steps: sampling steps of generated images.
        guidance: scale of classifier-free guidance for generation with labels; 1: none.
        guidance_interval: noise levels sigma, low and high, between which guidance is used; default: all.
        sampler: ddim, euler, heun or dpm++; not every objective allows all of them.
        num_images: number of generated images for fid, kid and precision-recall.
        features: network whose features these compare: small (that of this package), inception or another network of
            torch-fidelity (NAME=PATH: with the weights of a file), or the path of a TorchScript file.
        reference: images that generated ones are compared with, in the form of --data of the training programs;
            default: the training images (latents are decoded).
        max_reference: largest number of these, evenly spaced.
        probe_epochs: epochs of linear-probe, attentive-probe and finetune.
        seeds: number of seeds of random metrics, which then have a mean and a standard deviation.
        sigma_rel: measure the power-function EMA of this length, reconstructed from the run's snapshots; default: the
            plain EMA.
    """

    run: tyro.conf.Positional[Path]
    metrics: Annotated[tuple[str, ...] | None, tyro.conf.arg(aliases=["-m"])] = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    num_images: int | None = None
    features: str | None = None
    reference: str | None = None
    max_reference: int | None = None
    probe_epochs: int | None = None
    seeds: int | None = None
    sigma_rel: float | None = None


def main(arguments: list[str]) -> None:
    """Measure a run, print the values and append them to its record.

    Raises:
        UserError: the run can't be opened or measured, or the record can't be written.
    """
    command = call_with_options(Command, "pretrain evaluate", arguments)
    if command.features:
        trusted_code.trust_features(command.features)
    from pretrain.checkpoint.load_run import load_run
    from pretrain.distributed import launch
    from pretrain.evaluation import evaluators
    from pretrain.evaluation.context import EvalContext

    state = launch.join()
    trained = load_run(command.run, command.sigma_rel)
    given = {
        name: value for name, value in vars(command).items() if value is not None and name not in ("run", "sigma_rel")
    }
    try:
        settings = dataclasses.replace(trained.config.evaluate, **given)
    except ValueError as error:
        name, _, message = str(error).removeprefix("evaluate.").partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {message}") from None
    has_encoder = hasattr(trained.model, "encoder")
    context = EvalContext(trained.adapter, trained.source, trained.classes, has_encoder, settings)
    names = settings.metrics if command.metrics else [name for name in settings.metrics if name != "online-probe"]
    found: dict[str, Any] = {}
    model, start, chosen = trained.model.to(state.device), time.monotonic(), evaluators(names, context)
    for evaluator in chosen:
        found |= evaluator(model)
    record = {
        "command": shlex.join(["pretrain", "evaluate", *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": trained.state.values["step"],
        "sigma_rel": command.sigma_rel,
        "processes": state.num_processes,
        "seconds": round(time.monotonic() - start, 2),
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "every"},
        "found": found,
        "notes": [note for evaluator in chosen if (note := getattr(evaluator, "note", None))],
    }
    if state.is_main_process:
        _print(command.run, record)  # before writing, which may fail after hours of measuring
        _append(command.run / "evaluation.json", record)


def _append(path: Path, record: dict[str, Any]) -> None:
    """Append a record to the list in a file."""
    try:
        require_plain(path)
        records = read_json(path) if path.exists() else []
        if not isinstance(records, list):
            raise ValueError("it holds no list")
        with atomic_write(path) as part:
            part.write_text(json.dumps([*records, record], indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be added to: {error}; repair it or move it away") from None


def _print(run: Path, record: dict[str, Any]) -> None:
    """Print the values as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = record["found"]
    table = Table("metric", "value", title=Text(printable(f"{run}, step {record['step']}")), title_justify="left")
    for name, value in found.items():
        spread = found.get(f"{name}_std")
        if isinstance(value, list):
            table.add_row(name, " ".join("-" if item is None else f"{item:.3g}" for item in value))
        elif not name.endswith("_std"):
            table.add_row(name, f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
    console = Console(highlight=False)
    console.print(table)
    for note in record["notes"]:
        console.print(printable(note), markup=False)
    processes = f"{record['processes']} process" + ("" if record["processes"] == 1 else "es")
    where = printable(str(run / "evaluation.json"))
    console.print(f"{record['seconds']} s on {processes}; appended to {where}", markup=False)


def run() -> None:
    """The command `pretrain evaluate`."""
    main(sys.argv[1:])
