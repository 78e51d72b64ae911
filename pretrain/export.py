"""The averaged model in the formats that other people's programs open."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, ModelMixin
from safetensors.torch import save_file
from torch import nn

from pretrain import pipeline
from pretrain.adapter import Generative, bare
from pretrain.objective import Uncertain


def to_diffusers(model: nn.Module, adapter: object, folder: Path) -> str:
    """Write a denoiser as a diffusers pipeline, and say how it is opened.

    A UNet that knows no labels makes a stock `DDPMPipeline`, which takes schedulers that neither start from noise of
    another size than 1 nor scale what the network sees. Any other diffusers network brings its code and the
    code of the pipeline along, which `from_pretrained` runs only if told to trust it. A network that is no diffusers
    model, or an adapter without a scheduler, leaves its parameters alone.
    """
    model = model.network if isinstance(model, Uncertain) else model  # nothing for who makes images
    network: Any = getattr(model, "network", model)
    if not isinstance(network, ModelMixin) or not isinstance(adapter, Generative):
        folder.mkdir(parents=True, exist_ok=True)
        _save(model, folder / "model.safetensors")
        return f"safetensors.torch.load_file({str(folder / 'model.safetensors')!r})"
    scheduler = adapter.scheduler()
    stock = type(network).__module__.startswith("diffusers.")
    unscaled = getattr(scheduler, "init_noise_sigma", 1.0) == 1.0
    if stock and unscaled and network.config.get("num_class_embeds") is None:
        pipe: Any = DDPMPipeline  # made for a DDPMScheduler, it takes any whose `step` is like it
        pipe(network, scheduler).save_pretrained(folder)
        return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})"
    network.save_pretrained(folder / "network")
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copy(inspect.getfile(pipeline), folder / "pipeline.py")
    library = "diffusers"
    if not stock:
        source = Path(inspect.getfile(type(network)))
        library = f"{source.stem}_network"  # no name that diffusers itself has
        shutil.copy(source, folder / "network" / f"{library}.py")
    index = {
        "_class_name": ["pipeline", pipeline.LabelPipeline.__name__],
        "network": [library, type(network).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)"


def to_timm(model: nn.Module, name: str, arguments: dict[str, Any], folder: Path) -> str:
    """Write a masked autoencoder's encoder as a checkpoint that timm loads, and say how.

    Args:
        model: its `encoder` is a timm vision transformer without a head.
        name, arguments: what `timm.create_model` makes the encoder from.
        folder: gets encoder.safetensors, and encoder.json with the same name and arguments, and what the pixels
            are normalised by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "encoder.safetensors"
    _save(bare(model).encoder, file)
    card = {"architecture": name, "arguments": arguments, "mean": [0.5], "std": [0.5]}
    (folder / "encoder.json").write_text(json.dumps(card, indent=2) + "\n")
    said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, checkpoint_path={str(file)!r}, {said})"


def _save(model: nn.Module, file: Path) -> None:
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, file, {"format": "pt"}
    )
