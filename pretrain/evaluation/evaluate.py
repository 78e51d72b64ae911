"""Measure a trained run.

    pretrain evaluate RUN --metrics heldout,knn

What may be measured follows from the run's objective; docs/evaluation.md says how each metric is. Under torchrun or
`accelerate launch` the processes share the work and come to the same numbers.
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

from pretrain.config.tyro_parser import call_with_options
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write


@dataclass(frozen=True)
class Command:
    """Measure the averaged model of a run: a table, and a record more in RUN/evaluation.json.

    What is not given is as in the run's own settings (--evaluate.* when it was trained).

    Attributes:
        run: folder of a run.
        metrics: names, with commas or spaces between them; where not given, those that were measured in training.
        steps: network calls to generate an image.
        guidance: classifier-free guidance scale when generating with labels; 1 is none.
        sampler: ddim, euler, heun or dpm++, as far as the objective knows them.
        num_images: images generated for fid, kid and precision-recall.
        features: network whose features they compare: small (the one of this package), inception or any other of
            torch-fidelity's (NAME=PATH: with the weights of that file), or the path of a TorchScript file.
        reference: images that generated ones are compared with, as --data of the training programs names them; where
            not given the training images, and of latents what the autoencoder makes of them.
        max_reference: how many of them at most, evenly apart.
        probe_epochs: passes over the labelled images of linear-probe, attentive-probe and finetune.
        seeds: that a metric with chance in it is measured with; its mean and standard deviation are given.
        sigma_rel: of the power-function EMA that is measured, from the run's snapshots; the plain average where
            not given.
    """

    run: tyro.conf.Positional[Path]
    metrics: Annotated[tuple[str, ...] | None, tyro.conf.arg(aliases=["-m"])] = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    num_images: int | None = None
    features: str | None = None
    reference: str | None = None
    max_reference: int | None = None
    probe_epochs: int | None = None
    seeds: int | None = None
    sigma_rel: float | None = None


def main(arguments: list[str]) -> None:
    """Measure, show and write down."""
    command = call_with_options(Command, "pretrain evaluate", arguments)
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
        name, _, said = str(error).removeprefix("evaluate.").partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {said}") from None
    has_encoder = hasattr(trained.model, "encoder")
    subject = EvalContext(trained.adapter, trained.source, trained.classes, has_encoder, settings)
    names = settings.metrics if command.metrics else [name for name in settings.metrics if name != "online-probe"]
    found: dict[str, Any] = {}
    model, began, chosen = trained.model.to(state.device), time.monotonic(), evaluators(names, subject)
    for evaluator in chosen:
        found |= evaluator(model)
    record = {
        "command": shlex.join(["pretrain", "evaluate", *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": trained.state.values["step"],
        "sigma_rel": command.sigma_rel,
        "processes": state.num_processes,
        "seconds": round(time.monotonic() - began, 2),
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "every"},
        "found": found,
        "notes": [note for evaluator in chosen if (note := getattr(evaluator, "note", None))],
    }
    if state.is_main_process:
        _show(command.run, record)  # first: it may have taken hours
        _write(command.run / "evaluation.json", record)


def _write(path: Path, record: dict[str, Any]) -> None:
    """Add a record to the file's list."""
    try:
        records = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(records, list):
            raise ValueError("it is no list")
        with atomic_write(path) as part:
            part.write_text(json.dumps([*records, record], indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be added to: {error}; move it away") from None


def _show(run: Path, record: dict[str, Any]) -> None:
    """The numbers as a table."""
    from rich.console import Console
    from rich.table import Table

    found = record["found"]
    table = Table("metric", "value", title=f"{run}, step {record['step']}", title_justify="left")
    for name, value in found.items():
        spread = found.get(f"{name}_std")
        if isinstance(value, list):
            table.add_row(name, " ".join("-" if item is None else f"{item:.3g}" for item in value))
        elif not name.endswith("_std"):
            table.add_row(name, f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
    console = Console(highlight=False)
    console.print(table)
    for note in record["notes"]:
        console.print(note, markup=False)
    console.print(
        f"{record['seconds']} s on {record['processes']} processes; in {run / 'evaluation.json'}", markup=False
    )


def run() -> None:
    """The command."""
    main(sys.argv[1:])
