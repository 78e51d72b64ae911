"""Repeating the optimizer step at which a run stopped because of losses or gradients that are not finite.

    pretrain replay RUN

Such a run leaves RUN/bad-step.safetensors with the parameters, and the index and level of the samples. Images, noise
and masks are functions of (seed, epoch, index), so the step can be repeated; here on the CPU and in float32. Dropout,
routed tokens and blocked samples are not repeated.
"""

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import flat
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.padding import sample_of
from pretrain.core.rng import SampleRNG
from pretrain.data.images import on_device
from pretrain.training.flops import profile_sample
from pretrain.training.references import with_references

FILE = "bad-step.safetensors"
NOT_REPEATED = ("model.route", "model.dropout", "blocking.share")  # settings that leave out parts of the network


class Replayed(NamedTuple):
    """A repeated step.

    Attributes:
        index: of its S samples, or padding.
        loss: of each sample.
        gradients: names of parameters whose gradient is not finite.
        module: name and class of the first module whose output is not finite, or "".
        name: of each sample's image.
        differs: settings with which the repeated step is not the one that was made, or "".
    """

    index: list[int]
    loss: list[float]
    gradients: list[str]
    module: str
    name: list[str]
    differs: str


def record(run: Path, parameters: Mapping[str, Tensor], samples: Sequence[tuple[int, float]], **about: Any) -> Path:
    """Write the file from which a step is repeated.

    Args:
        run: folder of the run.
        parameters: of the bare network, and its buffers, by name.
        samples: index and level of each sample.
        about: further values; `epoch` is needed.

    Returns:
        The file.

    Raises:
        OSError: it can't be written.
    """
    index, level = zip(*samples, strict=True)
    tensors = {f"model.{name}": value for name, value in parameters.items()}
    tensors |= {"index": torch.tensor(index), "level": torch.tensor(level)}
    storage.write(run / FILE, tensors, {"about": json.dumps(about)})
    return run / FILE


def hint(run: Path) -> str:
    """What the user can do with the file of `record`, as the end of an error message."""
    return f"repeat the step to see where it starts: pretrain replay {quote(str(run))}"


def replay(run: Path, micro_batch: int = 32) -> Replayed:
    """Repeat a step, on the CPU.

    Args:
        run: folder of the run.
        micro_batch: images per forward pass.

    Raises:
        UserError: the run has no file of a bad step, or it can't be read.
    """
    if not (run / FILE).is_file():
        raise UserError(f"{run}: it has no {FILE}; only a run that stopped because of numbers that are not finite has")
    trained = load_run(run)
    try:
        with safe_open(run / FILE, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{run / FILE}: it can't be read: {error}") from None
    index, level = tensors.pop("index"), tensors.pop("level")
    model = trained.model.train().requires_grad_(True)
    parameters = {name.removeprefix("model."): value for name, value in tensors.items()}
    storage.load_parameters(model, parameters, run / FILE)
    images, cpu = trained.source.train, torch.device("cpu")
    flops = profile_sample(trained.adapter, model, trained.source.shape, trained.classes).flops
    objective, _ = with_references(trained.config, trained.adapter, trained.source, cpu, flops, lambda message: None)
    first: list[str] = []

    def check_output(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not first and any(not value.isfinite().all() for value in _tensors(output)):
                first.append(f"{name} ({type(module).__name__})")

        return hook

    for name, module in model.named_modules():
        if not [*module.children()]:
            module.register_forward_hook(check_output(name))
    losses: list[float] = []
    for part in torch.arange(len(index)).split(micro_batch):
        plain, _ = images.__getitems__([(about["epoch"], number) for number in index[part].tolist()])
        batch = images.augmented(on_device(plain._replace(level=level[part]), cpu), about["epoch"])
        loss = objective(model, batch, SampleRNG(trained.config.seed, about["epoch"], index=batch.index)).loss
        loss.sum().backward()
        losses += loss.tolist()
    bad = [
        name for name, value in model.named_parameters() if value.grad is not None and not value.grad.isfinite().all()
    ]
    names = [images.name_of(sample_of(number)) for number in index.tolist()]
    given = flat(trained.config.to_dict())
    differs = ", ".join(f"{name} {given[name]}" for name in NOT_REPEATED if given.get(name))
    return Replayed(index.tolist(), losses, bad, first[0] if first else "", names, differs)


def _tensors(output: object) -> list[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, (tuple, list)) else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line, by default this process's.

    Raises:
        UserError: see `replay`.
    """
    parser = ArgumentParser(
        "pretrain replay",
        description="Repeat the optimizer step at which a run stopped because losses or gradients were not finite, and "
        "report which samples, modules and parameters are affected.",
    )
    parser.add_argument("run", type=Path, help="folder of the run (its --output-dir)")
    given = parser.parse_args(arguments)
    found = replay(given.run)
    display = Display(True)
    bad = [place for place, loss in enumerate(found.loss) if not abs(loss) < float("inf")]
    if found.differs:
        display.print(
            f"the repeated step leaves out other parts of the network than the one that was made: {found.differs}"
        )
    display.print(f"{len(found.index)} samples, the losses of {len(bad)} are not finite")
    for place in bad[:10]:
        display.print(f"  sample {sample_of(found.index[place])}: {found.name[place]}")
    display.print(f"first output that is not finite: {found.module or 'none, so it is the loss itself or a gradient'}")
    first = f", the first: {found.gradients[0]}" if found.gradients else ""
    display.print(f"gradients that are not finite: {len(found.gradients)}{first}")


def run() -> None:
    """Run the command `pretrain replay`."""
    main()
