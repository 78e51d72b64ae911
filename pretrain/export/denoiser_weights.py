"""Weights of denoisers to start from: models of diffusers, runs and state dicts."""

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Generative
from pretrain.config import registry
from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.export.weights import (
    IN_FOLDER,
    differences,
    preference,
    read_object,
    read_weights,
    require_finite,
    shape_text,
    summarise_names,
    without_wrappers,
)

OF_DIFFUSERS = tuple(
    f"diffusion_pytorch_model.{end}" for end in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")
)
SUBFOLDERS = ("unet", "transformer", "network")  # of a pipeline, that may hold its denoiser
# By the class of the network: layers whose shapes depend on the channels of the images and on the number of classes.
MAY_BE_NEW = {"UNet2DModel": ("conv_in", "conv_out", "class_embedding"), "DiT": ("embed", "out", "label")}
MAY_DIFFER = {  # settings of a network that change no other layer
    "sample_size",
    "in_channels",
    "out_channels",
    "num_class_embeds",
    "num_train_timesteps",
    "dropout",
    "route",
    "shape",
    "classes",
}
FLAGS = {"block_out_channels": "channels", "layers_per_block": "layers", "attention_head_dim": "head-dim"}
FLAGS |= {
    name: name.replace("_", "-")
    for name in ("attention", "attention_from", "patch", "width", "depth", "heads", "position")
}


def start_from(model: nn.Module, adapter: object, path: Path, flag: str = "--model.init") -> str:
    """Initialize a denoiser from a file.

    The file holds a network of diffusers, a run's, or a state dict; wrappers (DDP, torch.compile, FSDP) may have added
    prefixes. All parameters must fit, except those of the first and the last layer, if the images have another number
    of channels, and the embedding of the classes, if there are others: these keep their initialization.

    Args:
        model: the denoiser, in the adapter's module if that has parameters; unchanged if an error is raised.
        adapter: the objective.
        path: see `read_weights`; a folder may also be a model or a pipeline of diffusers.
        flag: by which the path was given, for messages.

    Returns:
        A message: what was taken, what keeps its initialization, what was ignored, and what the network was trained to
        predict, if that is known and another thing than now.

    Raises:
        UserError: the file can't be read, or its network differs from the model's.
    """
    try:
        return f"{flag} {path}: {_start_from(model, adapter, expand(path), flag.rpartition('.')[0])}"
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from None


def _start_from(model: nn.Module, adapter: object, path: Path, flag: str) -> str:
    path = next((path / name for name in SUBFOLDERS if (path / name / "config.json").is_file()), path)
    found = read_weights(path, (*OF_DIFFUSERS, *IN_FOLDER))
    own_prefix, network = _innermost(model)
    own, kind, stated = network.state_dict(), type(network).__name__, _stated(found.folder)
    if (there := stated.get("_class_name", kind)) != kind:
        raise UserError(f"it is a {there} and the network here a {kind}; give weights of a {kind}")
    plain = {name: found.tensors[there] for name, there in without_wrappers(found.tensors).items()}
    prefix, others = _prefix(plain, own)
    children = {name.partition(".")[0] for name in own}
    named = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
    inside = {name: value for name, value in named.items() if name.partition(".")[0] in children}
    around = _around(model, own_prefix, plain, prefix)
    require_finite(inside | around)
    _require_settings(network, inside, stated, flag)
    new = [layer for layer in MAY_BE_NEW.get(kind, ()) if not _fits(layer, inside, own)]
    taken, needed = ({k: v for k, v in all_.items() if k.rpartition(".")[0] not in new} for all_ in (inside, own))
    if wrong := differences(taken, needed):
        raise UserError(f"it does not fit: {wrong}; set {flag}.* to those of the file")
    network.load_state_dict(taken, strict=False)
    model.load_state_dict(around, strict=False)
    message = "initialised the network" + (f" by {found.kind}" if found.kind else "")
    if others:
        message += f" from {prefix!r}, one of {others + 1} in it"
    if new:
        message += f", but not {_shapes(new, inside, own)}, which start from scratch"
    root = prefix.removesuffix(own_prefix)
    used = {prefix + name for name in inside} | {root + name for name in around}
    if ignored := [name for name in plain if name not in used]:
        message += f", ignored {summarise_names(ignored, prefix)}"
    before, now = _predicted_before(found.folder), _predicted(adapter)
    return message + (f"; it predicted {before}, and this run trains {now}" if before and before != now else "")


def _innermost(model: nn.Module) -> tuple[str, Any]:
    """The network inside the modules of adapters, of ours for diffusers and of N:M masks, after its prefix in them."""
    prefix, network = "", model
    while found := next((child for child in network.named_children() if child[0] in ("network", "base")), None):
        prefix, network = f"{prefix}{found[0]}.", found[1]
    return prefix, network


def _prefix(names: Iterable[str], own: Mapping[str, Tensor]) -> tuple[str, int]:
    """The prefix of the network's names in a file, and the number of further networks with these names in it."""
    names, count = [*names], Counter[str]()
    for name in names:
        parts = name.split(".")
        starts = [start for start in range(len(parts)) if ".".join(parts[start:]) in own]
        count.update("".join(f"{part}." for part in parts[:start]) for start in starts)
    most = max(count.values(), default=0)
    if 2 * most < min(len(own), len(names)):
        raise UserError(
            f"it holds no such network, of which {next(iter(own))} is a part; it holds {summarise_names(names)}"
        )
    found = [prefix for prefix, number in count.items() if 2 * number > most]
    return min(found, key=preference), len(found) - 1


def _around(model: nn.Module, own_prefix: str, names: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters of the model outside of its network (a head of the objective) that a file has in the same shapes.

    Args:
        model: with the network at `own_prefix`.
        own_prefix: of the network's names in the model.
        names: in the file.
        prefix: of the network's names in it.
    """
    if not prefix.endswith(own_prefix):
        return {}
    root = prefix.removesuffix(own_prefix)
    outside = {name: value for name, value in model.state_dict().items() if not name.startswith(own_prefix)}
    found = {name: names[root + name] for name in outside if root + name in names}
    return found if own_prefix and not differences(found, outside) else {}


def _fits(layer: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> bool:
    names = [name for name in here if name.startswith(f"{layer}.")]
    if layer in ("class_embedding", "label"):  # which a network without classes may lack
        return all(name in there and there[name].shape == here[name].shape for name in names)
    return all(name not in there or there[name].shape == here[name].shape for name in names)


def _shapes(layers: Iterable[str], there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    weights = {layer: f"{layer}.weight" for layer in layers}
    return ", ".join(
        f"{layer} ({shape_text(there.get(name))} in the file, {shape_text(here[name])} here)"
        for layer, name in weights.items()
    )


def _stated(folder: Path) -> dict[str, Any]:
    """The settings of a network as diffusers writes them, from the files beside its weights; {} if they say nothing."""
    card = read_object(folder / "config.json")
    if isinstance(card.get("_class_name"), str):
        return card
    state = read_object(folder / "state.json")
    try:
        settings = state["config"]["model"]
        if settings["name"] not in ("unet", "dit"):  # another one's code may come from anywhere
            return {}
        component = registry.load("model", settings["name"])
        known = {item.name: settings[item.name] for item in fields(component) if item.name in settings}
        with torch.device("meta"):
            network: Any = _innermost(component(**known).build(tuple(state["images"]["shape"]), 0))[1]
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {**network.config, "_class_name": type(network).__name__}


def _of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a DiT or a UNet2DModel that the names and shapes of its parameters tell."""

    def numbers(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})

    if depth := len(numbers(r"blocks\.(\d+)\.")):
        bias = tensors.get("embed.bias", torch.empty(0))
        return {"depth": depth, "width": bias.numel(), "qk_norm": "blocks.0.norm_q.weight" in tensors}
    down = numbers(r"down_blocks\.(\d+)\.")
    with_attention = numbers(r"down_blocks\.(\d+)\.attentions\.")
    biases = [tensors.get(f"down_blocks.{n}.resnets.0.conv1.bias") for n in down]
    kinds = ["Attn" * (n in with_attention) for n in down]
    return {
        "block_out_channels": [bias.numel() for bias in biases if bias is not None],
        "layers_per_block": len(numbers(r"down_blocks\.0\.resnets\.(\d+)\.")),
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "add_attention": any(name.startswith("mid_block.attentions.") for name in tensors),
    }


def _by_our_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With `attention` and `attention_from` of `UNetConfig` in place of the types of blocks, if they say the same."""
    settings = {name: _plain(value) for name, value in settings.items()}
    down, up = settings.get("down_block_types"), settings.get("up_block_types")
    if not isinstance(down, list):
        return settings
    for attention, start in itertools.product(range(len(down) + 1), repeat=2):
        kinds = [""] * (len(down) - attention - start) + ["Attn"] * attention + [""] * start
        same = down == [f"{kind}DownBlock2D" for kind in kinds]
        same = same and up == [f"{kind}UpBlock2D" for kind in reversed(kinds)]
        if same and settings.get("add_attention") == (attention > 0):
            rest = ("down_block_types", "up_block_types", "add_attention")
            settings = {name: value for name, value in settings.items() if name not in rest}
            return settings | {"attention": attention, "attention_from": start}
    return settings


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value  # as in JSON


def _require_settings(network: Any, tensors: Mapping[str, Tensor], stated: Mapping[str, Any], flag: str) -> None:
    """Raise a `UserError` if the file is of another network, with the flags that make this one like it."""
    if not isinstance(config := getattr(network, "config", None), Mapping):  # not one of diffusers
        return
    parameters = inspect.signature(type(network).__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    there, here = ({**defaults, **stated} if stated else _of_tensors(tensors)), {**config}
    if "attention" in (ours := _by_our_fields(there)):
        there, here = ours, _by_our_fields(here)
    names = [name for name in here if name in there and name not in MAY_DIFFER and not name.startswith("_")]
    wrong = [name for name in names if _plain(there[name]) != _plain(here[name])]
    no_effect = {"attention_head_dim"} if there.get("attention") == 0 else set()
    no_effect |= {"norm_num_groups"} if "block_out_channels" in wrong else set()  # they follow from the channels
    wrong = [name for name in wrong if name not in no_effect]
    if not wrong:
        return
    words = {name: " ".join(map(str, v if isinstance(v := there[name], list | tuple) else [v])) for name in wrong}
    flags = [f"{flag}.{FLAGS[name]} {words[name]}" for name in wrong if name in FLAGS]
    flags += [f"{flag}.{'' if there[name] else 'no-'}qk-norm" for name in wrong if name == "qk_norm"]
    fixed = [name for name in wrong if there[name] is None or name not in (*FLAGS, "qk_norm")]
    listed = ", ".join(f"{name} {words[name][:80]} (here {here[name]})" for name in wrong)
    what = f"no setting changes {', '.join(fixed)}" if fixed else f"give {' '.join(flags)}"
    raise UserError(f"its network has {listed}; {what}")


def _predicted(adapter: object) -> str:
    """What a network is trained to predict by an objective; "" if it does not say so."""
    if not isinstance(adapter, Generative):
        return ""
    scheduler = adapter.scheduler()
    return _target(type(scheduler).__name__, scheduler.config, getattr(adapter, "prediction", None))


def _predicted_before(folder: Path) -> str:
    """What the network in a file was trained to predict, from the files beside; "" if they don't say."""
    state, index = read_object(folder / "state.json"), read_object(folder.parent / "model_index.json")
    scheduler = read_object(folder.parent / "scheduler" / "scheduler_config.json")
    if isinstance(name := scheduler.get("_class_name"), str):
        return _target(name, scheduler, index.get("prediction"))
    try:
        settings = state["config"]["adapter"]
        if settings["name"] not in registry.names("adapter"):
            return ""
        component = registry.load("adapter", settings["name"])
        return _predicted(component(**{item.name: settings[item.name] for item in fields(component)}))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


def _target(scheduler: str, config: Mapping[str, Any], prediction: object) -> str:
    """What a network predicts for a scheduler of diffusers, by its class and its config."""
    if "EDM" in scheduler:
        return "EDM's preconditioned image"
    if "FlowMatch" in scheduler or config.get("prediction_type") == "flow_prediction":
        return "the image of a flow" if prediction == "sample" else "the velocity of a flow"
    return f"{config.get('prediction_type', 'epsilon')} of a diffusion"
