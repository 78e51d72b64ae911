"""A step that went wrong, once more and watched: which losses are not finite, and where that begins.

    pretrain replay RUN

A run that stops because of losses or gradients that are not finite leaves RUN/bad-step.safetensors: the parameters, and
the index and level of the visits. Images, noise and masks are functions of seed, epoch and index, so this is the same
step again.
"""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.padding import sample_of
from pretrain.core.rng import SampleRNG
from pretrain.data.images import on_device
from pretrain.training.references import with_references

FILE = "bad-step.safetensors"


class Replayed(NamedTuple):
    """What a step came to."""

    index: list[int]
    loss: list[float]
    gradients: list[str]  # parameters whose gradient is not finite
    module: str  # the first whose output is not finite, or ""


def record(run: Path, model: nn.Module, visits: Sequence[tuple[int, float]], **about: Any) -> Path:
    """Write down a step.

    Args:
        run: its folder.
        model: the bare network.
        visits: index and level of each.
        about: their epoch.
    """
    index, level = zip(*visits, strict=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {"index": torch.tensor(index), "level": torch.tensor(level)}
    storage.write(run / FILE, tensors, {"about": json.dumps(about)})
    return run / FILE


def how(run: Path) -> str:
    """What a person does with it."""
    return f"look at the step: pretrain replay {quote(str(run))}"


def replay(run: Path, micro_batch: int = 32) -> Replayed:
    """Make the step again, on the CPU.

    Raises:
        UserError: there is none, or its file can't be read.
    """
    if not (run / FILE).is_file():
        raise UserError(f"{run}: it holds no {FILE}; only a run that stopped because of bad numbers leaves one")
    trained = load_run(run)
    try:
        with safe_open(run / FILE, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{run / FILE}: it can't be read: {error}") from None
    index, level = tensors.pop("index"), tensors.pop("level")
    model = trained.model.train().requires_grad_(True)
    storage.fill(model, {name.removeprefix("model."): value for name, value in tensors.items()}, run / FILE)
    first: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, given: object, output: object) -> None:
            if not first and any(not value.isfinite().all() for value in _tensors(output)):
                first.append(f"{name} ({type(module).__name__})")

        return hook

    for name, module in model.named_modules():
        if not [*module.children()]:
            module.register_forward_hook(watch(name))
    losses: list[float] = []
    images = trained.source.train
    cpu = torch.device("cpu")
    objective = with_references(trained.config, trained.adapter, trained.source, cpu, lambda message: None)
    for part in torch.arange(len(index)).split(micro_batch):
        plain, _ = images.__getitems__([(about["epoch"], number) for number in index[part].tolist()])
        batch = images.augmented(on_device(plain._replace(level=level[part]), cpu), about["epoch"])
        loss = objective(model, batch, SampleRNG(trained.config.seed, about["epoch"], index=batch.index)).loss
        loss.sum().backward()
        losses += loss.tolist()
    bad = [
        name for name, value in model.named_parameters() if value.grad is not None and not value.grad.isfinite().all()
    ]
    return Replayed(index.tolist(), losses, bad, first[0] if first else "")


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, (tuple, list)) else []


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser("pretrain replay", description="Make a step that went wrong again, and watch it.")
    parser.add_argument("run", type=Path, help="the run's --output-dir")
    given = parser.parse_args(arguments)
    found = replay(given.run)
    images, display = load_run(given.run).source.train, Display(True)
    bad = [number for number, loss in zip(found.index, found.loss, strict=True) if not abs(loss) < float("inf")]
    display.print(f"{len(found.index)} visits, the losses of {len(bad)} are not finite")
    for number in bad[:10]:
        display.print(f"  sample {number}: {images.name_of(sample_of(number))}")
    display.print(f"first output that is not finite: {found.module or 'none; it is the loss itself, or a gradient'}")
    display.print(
        f"gradients that are not finite: {len(found.gradients)}{', the first: ' * bool(found.gradients)}"
        f"{found.gradients[0] if found.gradients else ''}"
    )


def run() -> None:
    """The command."""
    main()
