"""Denoisers as diffusers pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, LDMPipeline, ModelMixin
from torch import nn

from pretrain.adapters import Generative
from pretrain.adapters._sampling import make_scheduler
from pretrain.adapters._uncertainty import UncertaintyHead
from pretrain.adapters._velocity import VelocityFromImage
from pretrain.data.autoencoder import Autoencoder
from pretrain.export.pipeline import LabelPipeline
from pretrain.export.weights import parameters_alone


def to_diffusers(
    model: nn.Module,
    adapter: object,
    folder: Path,
    autoencoder: Autoencoder | None = None,
    class_names: Sequence[str] = (),
) -> str:
    """Write a denoiser as a diffusers pipeline.

    The pipeline is diffusers' own where it computes the same, see `_stock_pipeline`. Else it is `LabelPipeline`, whose
    code, with that of the network, is written, too; `from_pretrained` executes it only with trust_remote_code=True. Of
    a network that is no diffusers model, or with an adapter without a scheduler, the parameters alone are written.

    Args:
        model: the denoiser.
        adapter: provides the noise scheduler.
        folder: where to write.
        autoencoder: decodes latents.
        class_names: of the network's classes.

    Returns:
        A Python expression that opens it.

    Raises:
        OSError: it can't be written.
    """
    model = model.network if isinstance(model, UncertaintyHead) else model  # the head is for training alone
    image = isinstance(model, VelocityFromImage)
    model = model.network if isinstance(model, VelocityFromImage) else model
    network: Any = getattr(model, "network", model)
    if not isinstance(network, ModelMixin) or not isinstance(adapter, Generative):
        how = parameters_alone(model, folder)
        if autoencoder is not None:
            autoencoder.network.save_pretrained(folder / "vae")
        return how
    scheduler = make_scheduler(adapter, None, latents=autoencoder is not None)
    if not image and (pipeline := _stock_pipeline(network, scheduler, autoencoder)) is not None:
        pipeline.save_pretrained(folder)
        return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})"
    vae, prediction = autoencoder.network if autoencoder else None, "sample" if image else None
    LabelPipeline(network, scheduler, vae, [*class_names] or None, prediction).save_pretrained(folder)
    return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)"


def _stock_pipeline(network: Any, scheduler: Any, autoencoder: Autoencoder | None) -> Any:
    """A pipeline of diffusers for this network, or None.

    A UNet2DModel without labels makes a `DDPMPipeline`, if the initial noise has standard deviation 1, the scheduler
    does not scale the network's input, and images have at most the 4 channels that PIL has; with an autoencoder it
    makes an `LDMPipeline`, if latents are square, are scaled by one number and not shifted, and the scheduler has
    `scale_model_input`.
    """
    if not type(network).__module__.startswith("diffusers.") or network.config.get("num_class_embeds") is not None:
        return None
    if autoencoder is None:
        pipeline: Any = DDPMPipeline  # typed for a DDPMScheduler, it accepts any with the same `step`
        is_stock = getattr(scheduler, "init_noise_sigma", 1.0) == 1.0 and network.config.in_channels <= 4
        return pipeline(network, scheduler) if is_stock else None
    height, width = network.config.sample_size
    if height != width or autoencoder.shift.any() or autoencoder.scale.numel() > 1:
        return None
    if not hasattr(scheduler, "scale_model_input"):
        return None
    network.register_to_config(sample_size=height)  # it requires a number
    return LDMPipeline(vqvae=autoencoder.network, unet=network, scheduler=scheduler)
