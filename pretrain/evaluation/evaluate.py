"""Measure a trained run.

    pretrain evaluate RUN --metrics loss,knn
    pretrain evaluate RUN --metrics linear-probe --data OTHER

The metrics depend on the run's objective; docs/evaluation.md describes them. Under torchrun or `accelerate launch` the
processes share the work, and the values are those of one process.
"""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pretrain.config import trusted_code
from pretrain.config.tyro_parser import call_with_options
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write, read_json, require_plain
from pretrain.core.text import printable


@dataclass(frozen=True)
class OtherData:
    """Another data set; its images are brought to the size and the channels of the run's.

    Attributes:
        source: as --data of the training programs; default: the run's data set.
        train_split: folder, file or split that probes are trained on, or that generated images are compared with.
        test_split: the one to evaluate on; "none" holds out training images.
        image: column of the images.
        label: column of the labels.
        range: values that become black and white.
        pages: first: use the first page or frame of images that have several.
        limit: largest number of training images.
        held_out: images held out for evaluation if there is no test split; default: as in the run.
        on_bad_image: what to do with an image that can't be read; default: as in the run.
        workers: processes that decode images; default: as in the run.
    """

    source: Annotated[str | None, tyro.conf.arg(aliases=["--data"])] = None
    train_split: str | None = None
    test_split: str | None = None
    image: str | None = None
    label: str | None = None
    range: tuple[float, float] | None = None
    pages: Literal["first"] | None = None
    limit: int | None = None
    held_out: int | None = None
    on_bad_image: Annotated[Literal["stop", "skip"] | None, tyro.conf.arg(aliases=["--on-bad-image"])] = None
    workers: int | None = None

    def given(self) -> dict[str, Any] | None:
        """The settings that are given; None: none.

        Raises:
            UserError: there are some, and no data set.
        """
        found = {name: value for name, value in vars(self).items() if value is not None}
        if found and self.source is None:
            name = next(iter(found)).replace("_", "-")
            raise UserError(f"--data.{name}: it belongs to another data set; give its name, too (--data)")
        return found or None


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
        num_images: number of generated images for fid, kid, precision-recall and memorization.
        features: network whose features these compare: small (that of this package), inception or another network of
            torch-fidelity (NAME=PATH: with the weights of a file), or the path of a TorchScript file.
        reference: images that generated ones are compared with, in the form of --data of the training programs;
            default: the training images (latents are decoded).
        max_reference: largest number of these; of more, a random subset, always the same one.
        probe_epochs: epochs of linear-probe, attentive-probe and finetune.
        seeds: number of seeds of random metrics, which then have a mean and a standard deviation.
        sigma_rel: measure the power-function EMA of this relative width, made of the run's snapshots; default: the
            plain EMA.
        data: measure on another data set.
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
    data: OtherData = field(default_factory=OtherData)


def main(arguments: list[str]) -> None:
    """Measure a run, print the values and append them to its record.

    Raises:
        UserError: the run can't be opened or measured, or the record can't be written.
    """
    command = call_with_options(Command, "pretrain evaluate", arguments)
    if command.features:
        trusted_code.trust_features(command.features)
    from pretrain.checkpoint.load_run import load_run
    from pretrain.core.console import Display
    from pretrain.distributed import launch
    from pretrain.evaluation import evaluators
    from pretrain.evaluation.context import EvalContext

    other = command.data.given()
    state = launch.join()
    trained = load_run(command.run, command.sigma_rel)
    apart = ("run", "sigma_rel", "data")
    given = {name: value for name, value in vars(command).items() if value is not None and name not in apart}
    try:
        settings = dataclasses.replace(trained.config.evaluate, **given)
    except ValueError as error:
        name, _, message = str(error).removeprefix("evaluate.").partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {message}") from None
    has_encoder = hasattr(trained.model, "encoder")
    source = trained.source if other is None else trained.other_source(other)
    if other is not None:
        Display(state.is_main_process).print(str(source.report))
    context = EvalContext(
        trained.adapter, source, trained.classes, has_encoder, settings, is_other_data=other is not None
    )
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
        "data": source.train.data.source,
        "data_settings": other,
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
    title = f"{run}, step {record['step']}" + (f", on {record['data']}" if record["data_settings"] else "")
    table = Table("metric", "value", title=Text(printable(title)), title_justify="left")
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
