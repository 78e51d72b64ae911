"""What a training needs before its first step."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter
from pretrain.checkpoint.storage import State
from pretrain.config import registry
from pretrain.config.schema import Config, flat
from pretrain.core.errors import UserError
from pretrain.data.fingerprint import changed
from pretrain.data.sources import Source
from pretrain.training.flops import SampleCost, profile_sample

BACKEND = "inductor"  # of torch.compile


def profile_objective(config: Config, adapter: Adapter, model: nn.Module, source: Source) -> SampleCost:
    """What a visit costs. Adapter and model meet here for the first time.

    Parameters that the loss does not reach are frozen: several processes would wait for their gradients.
    """
    try:
        visit = profile_sample(adapter, model, source.shape, source.classes)
    except ValueError as error:
        raise UserError(f"--adapter {config.adapter.name}: {error}") from None
    except (TypeError, AttributeError) as error:
        if {config.adapter.name, config.model.name} - {*registry.names("adapter"), *registry.names("model")}:
            raise  # the user's own code: the traceback says where
        raise UserError(
            f"--adapter {config.adapter.name} has no use for --model {config.model.name}: {error}"
        ) from None
    for parameter in visit.unreached:
        parameter.requires_grad_(False)
    return visit


def recompute(model: nn.Module) -> None:
    """Have a network compute activations again in the backward pass (gradient checkpointing, Chen et al. 2016).

    Raises:
        UserError: it has no switch for that.
    """
    switch = getattr(model, "enable_gradient_checkpointing", None)
    if switch is None:
        raise UserError(
            f"--recompute: the network, a {type(model).__name__}, has no method enable_gradient_checkpointing(); "
            "leave it out, or give the network one"
        )
    switch()


def compiled(model: nn.Module, device: torch.device) -> None:
    """Have a network compiled as it is called; its parameters keep their names, and copies of it are as they were.

    Every shape of a batch is compiled for itself, the last ones of the epochs too, up to `torch._dynamo`'s limit of
    eight; what is beyond runs uncompiled.

    Raises:
        UserError: nothing can be compiled here, for want of a C++ compiler or of Triton.
    """
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is wrong with the compilers
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"--compile: torch can't compile on this machine ({said}); leave it out") from None
    model.compile(dynamic=False, backend=BACKEND)


def changes(state: State, config: Config) -> str:
    """The settings that are not what they were, in words."""
    old, new = flat(state.values["config"]), flat(config.to_dict())
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if new[name] != old.get(name)]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def check(path: Path, state: State, now: dict[str, Tensor], source: Source) -> None:
    """Compare with the state of the checkpoint `path`.

    Raises:
        UserError: the data set is another one now.
    """
    made_by, given = state.values["images"].get("autoencoder"), source.train.data.source
    if made_by != source.made_by:
        kind = (
            "latents of another autoencoder" if made_by and source.made_by else "no latents" if made_by else "latents"
        )
        raise UserError(f"--resume {path}: --data {given} holds {kind} now; bring back what the run began with")
    if what := changed(state.tensors["data"], now, source):
        raise UserError(
            f"--resume {path}: the data set has changed: {what}; scores belong to images by their number, "
            "so bring it back, or start anew"
        )
