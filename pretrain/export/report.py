"""A page about runs that opens without a network.

    pretrain report RUN [RUN ...] -o report.html

has the runs' cost and quality beside each other, curves, samples over time, scores, the images used least and most, and
the settings in which the runs differ.
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jinja2 import Environment
from PIL import Image
from torch import Tensor

from pretrain import __version__
from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run
from pretrain.config.cli import read_plain_yaml
from pretrain.config.schema import flat
from pretrain.config.tyro_parser import run_command
from pretrain.core.console import Display, duration
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write
from pretrain.infobatch.policies import uses_raw_losses
from pretrain.training import plots
from pretrain.training.metrics_log import MetricsLog

MAX_PICTURES = 40  # of samples over time, of each run; of more, evenly spaced ones with the first and the last
OF_GENERATED = ("fid", "kid", "precision", "recall", "memorized", "nearest_ratio")  # metrics of generated images
HIDDEN = ("output_dir", "evaluate.", "checkpoint.")  # settings that don't change what is trained


@dataclass(frozen=True)
class Record:
    """What a run's folder says about it.

    Attributes:
        folder: of the run.
        name: in the page.
        settings: by dotted name, as text.
        epochs, evaluations: records of metrics.jsonl, oldest first.
        summary: of summary.json; empty for a run that has not finished.
        later: records of evaluation.json, which `pretrain evaluate` writes.
    """

    folder: Path
    name: str
    settings: dict[str, str]
    epochs: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    later: list[dict[str, Any]]

    @cached_property
    def checkpoint(self) -> storage.State | None:
        """The newest undamaged checkpoint."""
        found = storage.newest_whole(self.folder / "checkpoints")
        return found and found[1]

    @property
    def policy(self) -> str:
        """The policy by which samples were chosen; full: every sample in every epoch."""
        prunes = self.settings.get("infobatch", "").lower() == "true"
        return self.summary.get("policy") or (self.settings.get("pruning.policy", "full") if prunes else "full")

    @property
    def _later(self) -> list[dict[str, Any]]:
        """What `pretrain evaluate` measured on the run's data of the EMA that is measured in training, too."""
        own = (record for record in self.later if record.get("data_settings") is None)
        return [_named(record) for record in own if record.get("sigma_rel") is None]

    @property
    def quality(self) -> dict[str, float]:
        """The newest value of every metric that is one number."""
        found: dict[str, float] = {}
        for record in [*self.evaluations, self.summary.get("quality", {}), *self._later]:
            found |= {name: value for name, value in record.items() if isinstance(value, float)}
        return found

    @property
    def flops_by_epoch(self) -> list[tuple[int, float]]:
        """(epoch, training FLOPs until its end) of the epochs of a finished run."""
        total, used = self.summary.get("train_flops"), self.summary.get("samples_used")
        if not total or not used:
            return []
        return [(record["epoch"], total * record["samples_used"] / used) for record in self.epochs]


def read_record(folder: Path, name: str) -> Record:
    """Read a run's folder; the run may still be training.

    Raises:
        UserError: it is no folder of a run, or a file in it can't be read.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: it is not the folder of a run; name a run's --output-dir")
    try:
        file = folder / "metrics.jsonl"
        return Record(
            folder,
            name,
            {name: _as_typed(value) for name, value in flat(read_plain_yaml(folder / "config.yaml")).items()},
            MetricsLog(file, writes=False, log=Display(True).print).read("epoch"),
            MetricsLog(file, writes=False).read("evaluation"),  # of a damaged line was warned above
            _json(folder / "summary.json", {}),
            _json(folder / "evaluation.json", []),
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: the run's files can't be read: {error}; restore them") from None


def _named(record: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a record of evaluation.json; those of generated images, named with what they depend on."""
    settings, found = record.get("settings", {}), record.get("found", {})
    how = f"{settings.get('num_images')} images, {settings.get('steps')} steps, features {settings.get('features')}"
    how += f", {settings['sampler']}" if settings.get("sampler") else ""
    how += f", guidance {settings['guidance']:g}" if settings.get("guidance", 1) != 1 else ""
    return {f"{name} ({how})" if name.startswith(OF_GENERATED) else name: value for name, value in found.items()}


def _json(path: Path, default: Any) -> Any:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
    if not isinstance(found, type(default)):
        raise ValueError(f"{path.name} is no {type(default).__name__} in JSON")
    return found


def _as_typed(value: Any) -> str:
    """A setting's value as on a command line; "" for none."""
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- what the page shows ---------------------------------------------------------------------------


def picture(pixels: Tensor) -> str:
    """A picture, uint8 [H, W, 3], as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def data_uri(content: bytes) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def overview(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each run: its cost, and its quality."""
    rows = []
    for record in records:
        summary = record.summary
        row: dict[str, Any] = {"run": record.name, "objective": record.settings.get("adapter.name", "")}
        row |= {"samples chosen by": record.policy}
        if summary:
            flops, full = summary["train_flops"], summary["full_train_flops"]
            row |= {
                "samples used": f"{summary['samples_used']:,}",
                "of all": f"{1 - summary['saved_fraction']:.1%}",
                "training FLOPs": f"{flops:.3g}",
                "of the full data set's": f"{flops / full:.1%}" if full else "",
                "time": duration(summary["seconds"]),
                "saved": savings(summary),
                "parameters": f"{summary['parameters']:,}",
            }
        else:
            last = record.epochs[-1] if record.epochs else {"epoch": 0, "samples_used": 0, "seconds": 0}
            row |= {"samples used": f"{last['samples_used']:,} in {last['epoch']} epochs; the run has not finished"}
        rows.append(row | {name.replace("_", " "): f"{value:.4g}" for name, value in record.quality.items()})
    return rows


def savings(summary: dict[str, Any]) -> str:
    """What every sample of every epoch would have cost more, at the run's own FLOP/s; empty: nothing."""
    flops, full = summary["train_flops"], summary["full_train_flops"]
    if not 0 < flops < 0.999 * full:  # a step more or less is rounding
        return ""
    return f"{full - flops:.3g} FLOPs, about {duration(summary['seconds'] * (full / flops - 1))}"


def beside_ordinary(records: Sequence[Record]) -> list[dict[str, str]]:
    """Pruned runs beside runs with the same objective, network and data that used every sample, for any time."""

    def group(record: Record) -> dict[str, str]:
        names = [name for name in record.settings if name.startswith(("adapter", "model", "data"))]
        return {name: record.settings[name] for name in names if name != "data.workers"}  # which changes no batch

    def ordinary(record: Record) -> bool:
        blocks = float(record.settings.get("blocking.share") or 0) > 0
        return record.policy == "full" and not blocks and not savings(record.summary)

    finished = [r for r in records if r.summary and "validation_loss" in r.quality]
    rows = []
    for record in finished:
        same = [other for other in finished if group(other) == group(record) and ordinary(other)]
        if ordinary(record) or not same:
            continue
        flops, loss = record.summary["train_flops"], record.quality["validation_loss"]
        same.sort(key=lambda other: other.summary["train_flops"])
        costs = [other.summary["train_flops"] for other in same]
        losses = [other.quality["validation_loss"] for other in same]
        cost, beyond = ordinary_flops(loss, [*zip(costs, losses, strict=True)])
        seconds = float(np.interp(cost, costs, [other.summary["seconds"] for other in same]))
        needs, ratio = {-1: ("less than ", "above "), 0: ("", ""), 1: ("more than ", "below ")}[beyond]
        longest = same[-1]
        rows.append(
            {
                "run": record.name,
                "validation loss": f"{loss:.4g}",
                "training FLOPs": f"{flops:.3g}",
                "time": duration(record.summary["seconds"]),
                "ordinary training needs": f"{needs}{cost:.3g} in {duration(seconds)}",
                "ratio of FLOPs": f"{ratio}{flops / cost:.2f}",
                "of time": f"{ratio}{record.summary['seconds'] / seconds:.2f}" if seconds else "",
                "longest ordinary run": f"{longest.name}: {longest.quality['validation_loss']:.4g}",
            }
        )
    return rows


def ordinary_flops(loss: float, ordinary: Sequence[tuple[float, float]]) -> tuple[float, int]:
    """FLOPs at which ordinary training reaches a validation loss, between its runs on a line of log FLOPs.

    Args:
        loss: the validation loss.
        ordinary: (training FLOPs, validation loss) of one run or more.

    Returns:
        The FLOPs, and 0; or those of the longest run and 1 if none is as good; or those of the shortest, and -1 if all
        are better.
    """
    flops, losses = np.array(sorted(ordinary)).T
    losses = np.minimum.accumulate(losses)
    if loss < losses[-1]:
        return float(flops[-1]), 1
    if loss > losses[0]:
        return float(flops[0]), -1
    return float(np.exp(np.interp(-loss, -losses, np.log(flops)))), 0


def differences(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, and their values; of a single run, all its settings."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    rows = [(name, [record.settings.get(name, "") for record in records]) for name in names]
    return [(n, v) for n, v in rows if not n.startswith(HIDDEN) and (len(records) == 1 or len(set(v)) > 1)]


def curves(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Titles and pictures of curves over the epochs, and of the validation loss over the training FLOPs."""
    wanted = {"loss": "training loss", "score": "training score", "lr": "learning rate"}
    wanted |= {"used": "share of samples used", "reliability": "reliability of the scores"}
    found = []
    for key, title in wanted.items():
        epochs = [(r.name, [e | {"used": 1 - e["skipped"]} for e in r.epochs]) for r in records]
        lines = [(name, [(e["epoch"], e[key]) for e in given if e.get(key) is not None]) for name, given in epochs]
        found.append((title, plots.lines(lines, "epoch", title, log=key in ("loss", "score"))))
    metrics = dict.fromkeys(n for r in records for e in r.evaluations for n, v in e.items() if isinstance(v, float))
    for key in metrics:
        lines = [(r.name, [(e["epoch"], e[key]) for e in r.evaluations if key in e]) for r in records]
        title = key.replace("_", " ")
        found.append((title, plots.lines(lines, "epoch", title, log="loss" in key)))
    by_cost = []
    for record in records:
        cost = dict(record.flops_by_epoch)
        points = [(cost[e["epoch"]], e["validation_loss"]) for e in record.evaluations if e["epoch"] in cost]
        by_cost.append((record.name, points))
    title = "validation loss by training FLOPs"
    found.append((title, plots.lines(by_cost, "training FLOPs", "validation loss", log=True)))
    return [(title, picture(pixels)) for title, pixels in found if pixels is not None]


def samples(record: Record) -> tuple[list[tuple[str, str]], str]:
    """Captions and pictures that the run made after epochs, oldest first; and a note if some are left out."""
    paths = sorted((record.folder / "pictures").glob("epoch-*.png"))
    count = len(paths)
    if count > MAX_PICTURES:
        paths = [paths[round(k * (count - 1) / (MAX_PICTURES - 1))] for k in range(MAX_PICTURES)]
    shown = []
    for path in paths:
        with suppress(OSError):  # the run removed it meanwhile
            shown.append((re.sub("-0*", " ", path.stem), data_uri(path.read_bytes())))
    note = f"{len(shown)} of {count} pictures, evenly spaced; all of them are in {record.folder / 'pictures'}"
    return shown, note if len(shown) < count else ""


def scores(record: Record) -> list[str]:
    """Pictures of the scores' distribution and of the images used least and most; or sentences that say why not."""
    state = record.checkpoint
    if state is None:
        return ["The run has no checkpoint yet, so it has no scores."]
    score, count = state.tensors["infobatch"]["score"], state.tensors["times_used"]["times_used"]
    known = score[~score.isnan()]
    if not len(known):
        return ["No sample has a score yet: they come at the end of the first epoch."]
    name = "score: the last loss" if uses_raw_losses(record.policy) else "score: 1 is usual, larger is learned worse"
    shown = [picture(plots.histogram(known, name))]
    if int(count.min()) == int(count.max()):
        return [*shown, f"All {len(count):,} images were used equally often: {int(count.min())} times."]
    try:
        pixels = plots.sample_counts(count, score, load_run(record.folder).source)
    except UserError as error:
        return [*shown, f"The images can't be shown: {error}"]
    return [*shown, picture(pixels) if pixels is not None else "None of the images can be read."]


def sections(record: Record) -> dict[str, Any]:
    """What the page shows of one run alone."""
    evaluations = [e for e in record.evaluations if "validation_loss_by_level" in e]
    shown, note = samples(record)
    return {
        "name": record.name,
        "folder": str(record.folder),
        "levels": picture(plots.loss_by_level(evaluations)) if evaluations else "",
        "samples": shown,
        "note": note,
        "scores": scores(record),
        "environment": record.summary.get("environment", {}),
    }


def page(records: Sequence[Record]) -> str:
    """The HTML page about runs."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("pretrain.export").joinpath("report.html.j2").read_text("utf-8"))
    rows = overview(records)
    return template.render(
        version=__version__,
        columns=[*dict.fromkeys(name for row in rows for name in row)],
        rows=rows,
        ordinary=beside_ordinary(records),
        curves=curves(records),
        runs=[sections(record) for record in records],
        names=[record.name for record in records],
        settings=differences(records),
    )


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
) -> None:
    """Write one HTML file about runs, finished or still training, that opens without a network.

    Args:
        runs: folders of runs; several are compared.
        output: the file to write.
    """
    if not runs:
        raise UserError("pretrain report needs at least one run: name a run's --output-dir")
    names = [folder.name or str(folder) for folder in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in runs]
    html = page([read_record(folder, name) for folder, name in zip(runs, names, strict=True)])
    with _writing(output), atomic_write(output) as part:
        part.write_text(html, encoding="utf-8")
    Display(True).print(f"{output}: {len(html) / 1e6:.1f} MB")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name a file that can be written") from None


def run() -> None:
    """The command `pretrain report`."""
    run_command(main, "pretrain report")
