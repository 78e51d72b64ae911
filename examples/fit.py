"""The training loop of classification.py, segmentation.py, language.py, group_policy.py and restoration.py.

It joins adapter, InfoBatch and model, and has what all of them do around it.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from other_methods import METHODS, OtherMethod
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pretrain import InfoBatch
from pretrain.adapters import Batch
from pretrain.config.cli import read_plain_yaml
from pretrain.config.schema import Blocking, flat
from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.files import atomic_write
from pretrain.core.rng import SampleRNG
from pretrain.data.images import Images, on_device
from pretrain.data.loader import EpochSampler, make_loader
from pretrain.training.blocking import PartialForwardBlocking, blocked_flops

COUNTED = 8  # FLOPs are counted in every eighth step; with Partial Forward Blocking in the first one, which has none
ATTENTION = {  # on a CPU; torch's counter does not know it. Functions of the shapes of its arguments
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: 2 * sdpa_flop_count(q, k, v)
    ),
}


@dataclass(frozen=True)
class Training:
    """Settings of the training.

    Attributes:
        epochs: passes over the data.
        batch_size: samples per step.
        optimizer: a name of timm's, for example adamw, sgd (with Nesterov's momentum) or lars.
        lr: largest learning rate.
        schedule: of the learning rate over the training's progress. linear: from the largest to 0; one-cycle: up in
            the first 30 % and down again, see `one_cycle`.
        weight_decay: of all parameters.
        bf16: compute in bfloat16 by torch.autocast.
        policy: how samples are selected: full, infobatch, quantile, or with a budget random, importance; or a method of
            other_methods.py: seta, ies, or with a budget orderdp, selective-backprop.
        budget: samples used in the whole training as a share of epochs * data set, in (0, 1].
        settings: of the policy, by name, for example prune_ratio 0.7.
        seed: of the parameters and of InfoBatch.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3
    schedule: Literal["linear", "one-cycle"] = "linear"
    weight_decay: float = 0.01
    bf16: bool = False
    policy: str = "infobatch"
    budget: float | None = None
    settings: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
        ):
            if not good:
                raise ValueError(f"training.{name} must be {allowed}, got {getattr(self, name)}")


class Fitted(NamedTuple):
    """What a training was.

    Attributes:
        infobatch: at the end of the training.
        cost: samples_used, those that had a backward pass; flops, of matrix products and convolutions; seconds.
    """

    infobatch: InfoBatch | OtherMethod
    cost: dict[str, float]

    @property
    def skipped(self) -> float:
        """Share of epochs * data set that had no backward pass."""
        return 1 - self.cost["samples_used"] / (self.infobatch.size * self.infobatch.total_epochs)


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def one_cycle(progress: float, rise: float = 0.3, start: float = 25, end: float = 1e4) -> float:
    """The learning rate at a progress in [0, 1], as a share of the largest: that of torch's OneCycleLR.

    From 1 / start to 1 in the first `rise` of the training, then to 1 / (start * end), by half cosines (Smith and
    Topin, 2017). A pruned training has fewer steps in some epochs, and ends like any other. The momentum is constant.
    """
    low, high, share = (
        (1 / start, 1.0, progress / rise) if progress < rise else (1 / (start * end), 1.0, (1 - progress) / (1 - rise))
    )
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def epoch_batches(images: Images, batch_size: int, infobatch: InfoBatch) -> Iterator[Batch]:
    """The batches of InfoBatch's current epoch, on the device, augmented."""
    for batch, problems in make_loader(images, EpochSampler(infobatch), batch_size):
        images.handle(problems)
        yield images.augmented(on_device(batch, device()), infobatch.epoch)


def _optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    decay = {"weight_decay": training.weight_decay, "filter_bias_and_bn": False}
    try:
        return create_optimizer_v2(model, training.optimizer, training.lr, **decay)
    except (ValueError, AssertionError) as error:
        raise UserError(f"--training.optimizer {training.optimizer}: {error}; give a name of timm's, as sgd") from None


def _selection(
    training: Training, size: int, blocking: Blocking, weights: Tensor | None, over: str
) -> InfoBatch | OtherMethod:
    if blocking.share and training.policy != "full":
        raise UserError(
            "--blocking.share excludes pruning, because a blocked sample has no score; add --training.policy full"
        )
    settings: dict[str, Any] = {"epochs": training.epochs, "budget": training.budget, "seed": training.seed}
    try:
        if training.policy not in METHODS:
            own = ({"over": over} if training.policy == "importance" else {}) | training.settings
            return InfoBatch(size, policy=training.policy, weights=weights, warn=print, **settings, **own)
        if weights is not None:
            raise ValueError(f"--training.policy {training.policy} ignores the weights of a subset; use another policy")
        return METHODS[training.policy](size, **settings, **training.settings)
    except ValueError as error:
        more = f" (beside them {', '.join(METHODS)})" if str(error).startswith("there is no policy") else ""
        raise UserError(f"{error}{more}") from None
    except TypeError:
        raise UserError(
            f"--training.settings: {training.policy} has no setting {' or '.join(training.settings)}"
        ) from None


class Flops:
    """FLOPs of matrix products and convolutions in some of the steps: forward, backward, and their samples."""

    def __init__(self) -> None:
        self.forward = self.backward = self.samples = 0

    @contextmanager
    def count(self, part: Literal["forward", "backward"], samples: int) -> Iterator[None]:
        """A context whose FLOPs are counted unless `samples`, those of the step, is 0."""
        if not samples:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            yield
        setattr(self, part, getattr(self, part) + counter.get_total_flops())
        self.samples += samples * (part == "forward")

    def total(self, samples: int, no_backward: int) -> float:
        """FLOPs of samples of which some have no backward pass."""
        return (samples * (self.forward + self.backward) - no_backward * self.backward) / self.samples


def fit(
    training: Training,
    model: nn.Module,
    adapter: Callable[..., Any],
    size: int,
    batches: Callable[[Any], Iterable[Any]],
    blocking: Blocking = Blocking(),
    weights: Tensor | None = None,
    over: str = "samples",
) -> Fitted:
    """Train a model and print a line per epoch.

    Args:
        training: the settings.
        model: the network, on its device.
        adapter: the objective; returns one loss per sample for (model, batch, rng).
        size: samples in the data set.
        batches: returns the batches of an epoch, on the device, in the order of the sampler that it is given; each has
            an `index`.
        blocking: settings of Partial Forward Blocking, for networks with a keyword `choose`.
        weights: [N]; of each sample, see `InfoBatch`.
        over: what the policy importance chooses: samples, or both if the objective uses InfoBatch's levels.

    Raises:
        UserError: there is no such optimizer or policy, or a setting does not fit it.
    """
    infobatch = _selection(training, size, blocking, weights, over)
    optimizer = _optimizer(training, model)
    blocked = PartialForwardBlocking(adapter, blocking, lambda: infobatch.progress) if blocking.share else None
    objective = blocked or adapter
    schedule = one_cycle if training.schedule == "one-cycle" else lambda progress: 1 - progress
    flops, step, one = Flops(), 0, None
    began = time.monotonic()
    for epoch in infobatch.epochs():
        model.train()
        for batch in batches(infobatch):
            for group in optimizer.param_groups:
                group["lr"] = training.lr * schedule(infobatch.progress)
            counted = 0 if step % COUNTED or (blocked and step) else len(batch.index)
            with flops.count("forward", counted), torch.autocast(device().type, torch.bfloat16, enabled=training.bf16):
                losses = objective(model, batch, SampleRNG(training.seed, epoch, index=batch.index))
            optimizer.zero_grad()
            with flops.count("backward", counted):
                infobatch(losses.loss, batch.index, losses.score).backward()
            optimizer.step()
            step += 1
            if blocked and one is None:
                one = type(batch)(*(field[:1].to("meta") for field in batch))
        known = infobatch.reliability
        reliability = "" if known is None else f"  reliability of scores {known:.2f}"
        print(
            f"epoch {epoch + 1}/{training.epochs}  loss {infobatch.mean():.4f}  {infobatch.seen:,} samples{reliability}"
        )
    if device().type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    model.eval()
    no_backward = infobatch.forward_only if isinstance(infobatch, OtherMethod) else 0
    used, total = infobatch.samples_used, flops.total(infobatch.samples_used, no_backward)
    if blocked and one:
        used -= blocked.blocked
        total = flops.total(used, 0) + blocked.blocked * blocked_flops(adapter, model, one)
    fitted = Fitted(infobatch, {"samples_used": used - no_backward, "flops": total, "seconds": seconds})
    print(
        f"{used - no_backward:,} samples used instead of {size * training.epochs:,}: {fitted.skipped:.1%} skipped; "
        f"{total:.3g} training FLOPs"
    )
    return fitted


def write_record(
    output: Path | None, training: Training, model: nn.Module, fitted: Fitted, quality: dict[str, float], **more: Any
) -> None:
    """Write what a run cost and what it reached to a JSON file, as benchmarks/compare_examples.py reads it.

    Args:
        output: the file; None: nothing is written.
        training: the settings.
        model: the network.
        fitted: what `fit` returned.
        quality: by metric.
        more: further entries.

    Raises:
        UserError: the file can't be written.
    """
    record = {
        "cost": fitted.cost,
        "quality": quality,
        "skipped": fitted.skipped,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "samples": fitted.infobatch.size,
        "epochs": training.epochs,
        "training": asdict(training),
        **more,
    }
    write_json(output, record)


def write_json(output: Path | None, values: Any) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        output: the file, in a folder that need not exist; None: nothing is written.
        values: plain JSON.

    Raises:
        UserError: it can't be written.
    """
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as part:
            part.write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {output}: it can't be written ({error}); name another file") from None


def run(main: Callable[..., Any]) -> None:
    """Call a program's main function with the settings of the command line; an error is one sentence, status 2.

    `--config FILE` starts from a recipe (YAML); settings on the command line take precedence.
    """
    with exit_on_user_error():
        try:
            run_command(main, Path(sys.argv[0]).name, with_recipe(sys.argv[1:]))
        except FloatingPointError as error:
            raise UserError(f"{error}; try a smaller --training.lr") from None


def with_recipe(arguments: list[str]) -> list[str]:
    """The arguments with those of the recipe, `--config FILE`, before them.

    Raises:
        UserError: the file can't be read, or is no recipe.
    """
    position = next((n for n, word in enumerate(arguments) if word.partition("=")[0] == "--config"), None)
    if position is None:
        return arguments
    before, (word, *rest) = arguments[:position], arguments[position:]
    _, equals, path = word.partition("=")
    if not equals:
        path, *rest = rest or [""]
    try:
        tree = read_plain_yaml(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}; name the YAML file of a recipe") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: a recipe has settings, `name: value`; name another file")
    found: list[str] = []
    for name, value in flat(tree).items():
        head, dot, leaf = name.rpartition(".")
        if value in ("true", "false"):
            found.append(f"--{head}{dot}{'' if value == 'true' else 'no-'}{leaf}")
        else:
            found += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return [*found, *before, *rest]
