"""All that a run changes as it goes, as one thing that is saved and restored."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from pretrain import checkpoint, parts
from pretrain.adapter import Adapter, Prepares
from pretrain.average import Averages
from pretrain.config import Config, Optim, Pruning, flat
from pretrain.cost import Visit, first_visit
from pretrain.errors import Refused
from pretrain.infobatch import InfoBatch
from pretrain.ledger import UNSEEN
from pretrain.rng import key
from pretrain.sources import Source

BACKEND = "inductor"  # of torch.compile


def build(config: Config, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The config's network with the parameters that its seed gives, and those of the adapter, if it has some.

    Raises:
        Refused: it doesn't fit the images.
    """
    torch.manual_seed(key(config.seed))
    try:
        model = config.part("model").build(shape, classes)
    except ValueError as error:
        raise Refused(str(error)) from None
    adapter = config.part("adapter")
    return adapter.prepare(model) if isinstance(adapter, Prepares) else model


def visit_of(config: Config, adapter: Adapter, model: nn.Module, source: Source) -> Visit:
    """What a visit costs. Adapter and model meet here for the first time.

    Parameters that the loss does not reach are frozen: several processes would wait for their gradients.
    """
    try:
        visit = first_visit(adapter, model, source.shape, source.classes)
    except ValueError as error:
        raise Refused(f"--adapter {config.adapter.name}: {error}") from None
    except (TypeError, AttributeError) as error:
        if {config.adapter.name, config.model.name} - {*parts.names("adapter"), *parts.names("model")}:
            raise  # the user's own code: the traceback says where
        raise Refused(f"--adapter {config.adapter.name} has no use for --model {config.model.name}: {error}") from None
    for parameter in visit.unreached:
        parameter.requires_grad_(False)
    return visit


def recompute(model: nn.Module) -> None:
    """Have a network compute activations again in the backward pass (gradient checkpointing, Chen et al. 2016).

    Raises:
        Refused: it has no switch for that.
    """
    switch = getattr(model, "enable_gradient_checkpointing", None)
    if switch is None:
        raise Refused(
            f"--recompute: the network, a {type(model).__name__}, has no method enable_gradient_checkpointing(); "
            "leave it out, or give the network one"
        )
    switch()


def compiled(model: nn.Module, device: torch.device) -> None:
    """Have a network compiled as it is called; its parameters keep their names, and copies of it are as they were.

    Every shape of a batch is compiled for itself, the last ones of the epochs too, up to `torch._dynamo`'s limit of
    eight; what is beyond runs uncompiled.

    Raises:
        Refused: nothing can be compiled here, for want of a C++ compiler or of Triton.
    """
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is wrong with the compilers
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refused(f"--compile: torch can't compile on this machine ({said}); leave it out") from None
    model.compile(dynamic=False, backend=BACKEND)


def adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """The optimizer of the parameters that are trained; vectors, such as biases, do not decay."""
    vectors = [name for name, parameter in model.named_parameters() if parameter.squeeze().ndim <= 1]
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=vectors)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)


@dataclass
class Training:
    """What a checkpoint holds.

    Attributes:
        model: the bare network.
        averages: of its parameters.
        optimizer: the bare optimizer.
        infobatch: scores and position.
        scaler: of the gradients under fp16, else None.
        step: optimizer steps made.
        seconds: spent on them.
        visits: int32 [N]; of each sample, in the epochs that are over.
    """

    model: nn.Module
    averages: Averages
    optimizer: torch.optim.Optimizer
    infobatch: InfoBatch
    scaler: Any
    step: int = 0
    seconds: float = 0.0
    visits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.visits = torch.zeros(self.infobatch.size, dtype=torch.int32)

    def count_visits(self) -> None:
        """Count those of the epoch that ends: a plan is the same on all ranks."""
        kept = self.infobatch.plan.kept
        self.visits[slice(None) if kept is None else torch.from_numpy(kept)] += 1

    def state(self, config: Config, journal: int, bad_images: list[str]) -> checkpoint.State:
        """Everything, not copied, and beside it config, journal position and bad images; call it on all ranks."""
        memory = self.infobatch.state_dict()
        moments, groups = checkpoint.pack_optimizer(self.optimizer.state_dict())
        tensors: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            **{name: average.model.state_dict() for name, average in self.averages.all().items()},
            "optimizer": moments,
            "infobatch": {name: value for name, value in memory.items() if isinstance(value, Tensor)},
            "visits": {"visits": self.visits},
        }
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "progress": self.averages.progress,
            "optimizer": groups,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "infobatch": {name: value for name, value in memory.items() if not isinstance(value, Tensor)},
            "journal": journal,
            "bad_images": bad_images,
            "config": config.to_dict(),
        }
        return checkpoint.State(tensors, values)

    def restore(self, state: checkpoint.State, config: Config, path: Path) -> None:
        """Go on from a state.

        Raises:
            Refused: it is of another model, adapter or data set.
        """
        tensors, values = state
        for name in ("model", "adapter"):
            theirs, ours = values["config"][name], config.to_dict()[name]
            if theirs != ours:
                differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
                raise Refused(
                    f"--resume {path}: the checkpoint is of another {name} ({name}.{differing[0]} is "
                    f"{theirs.get(differing[0])!r} there, {ours.get(differing[0])!r} here); leave these settings out"
                )
        size = len(tensors["infobatch"]["score"])
        if size != self.infobatch.size:
            raise Refused(f"--resume {path}: the checkpoint is of {size} images, --data has {self.infobatch.size} now")
        checkpoint.fill(self.model, tensors["model"], path)
        averages = self.averages.all()
        if {name for name in tensors if name.startswith("average")} != averages.keys():
            lengths = " ".join(sorted(name[len("average-") :] for name in tensors if "average-" in name)) or "none"
            raise Refused(f"--resume {path}: the checkpoint's --average.lengths are {lengths}; leave the setting out")
        for name, average in averages.items():
            checkpoint.fill(average.model, tensors[name], path)
        self.optimizer.load_state_dict(checkpoint.unpack_optimizer(tensors["optimizer"], values["optimizer"]))
        for parameter, moments in self.optimizer.state.items():
            if wrong := [name for name, value in moments.items() if value.shape not in (parameter.shape, ())]:
                raise ValueError(f"the optimizer's {wrong[0]} is not of its parameter's shape")
        if tensors["visits"]["visits"].shape != self.visits.shape:
            raise ValueError("visits are not one number for each image")
        for name, value in values["infobatch"].items():
            if not isinstance(value, int) or (value < 0 and name != "plan"):
                raise TypeError(f"{name} is {value!r}")
        memory = self.infobatch
        try:
            memory.load_state_dict({**tensors["infobatch"], **values["infobatch"]})
            ahead = memory.plan.at(np.arange(memory.seen, memory.length)) if memory.seen else []
            if (memory.ledger.loss[ahead] != UNSEEN).any():
                raise ValueError("it has losses of samples that are yet to be visited")
        except ValueError as error:
            raise Refused(f"--resume {path}: {error}") from None
        self.step, self.seconds = values["step"], values["seconds"]
        self.visits = tensors["visits"]["visits"].to(torch.int32)
        # A run that is given more epochs has its clock set back; what a power average weighs does not notice.
        self.averages.progress = values["progress"] * (values["config"]["epochs"] / config.epochs)
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])


def changes(state: checkpoint.State, config: Config) -> str:
    """The settings that are not what they were, in words."""
    old, new = flat(state.values["config"]), flat(config.to_dict())
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if new[name] != old.get(name)]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def scheduler(config: Config, size: int, tell: Callable[[str], Any]) -> InfoBatch:
    """What plans a run's epochs.

    Args:
        config: the run's.
        size: samples.
        tell: called with what the user should know.

    Raises:
        Refused: the policy can't be had with these settings.
    """
    pruning = config.pruning if config.infobatch else Pruning()  # a recipe's budget is not for everybody
    settings = {"ratio": pruning.ratio, "over": pruning.over}
    policy = parts.policy(config.policy)
    try:
        return InfoBatch(
            size,
            epochs=config.epochs,
            policy=policy,
            budget=pruning.budget,
            anneal=pruning.anneal,
            smoothing=pruning.smoothing,
            raw=pruning.raw,
            seed=config.seed,
            tell=tell,
            **{name: value for name, value in settings.items() if value is not None},
        )
    except ValueError as error:
        raise Refused(f"--pruning.policy {config.policy}: {error}") from None
