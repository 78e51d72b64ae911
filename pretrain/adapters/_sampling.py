"""Images from noise, by a diffusers scheduler."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Generative
from pretrain.core.errors import UserError

# By the scheduler that an adapter names, the diffusers classes that undo the same noise with the same network.
SAMPLERS: dict[str, dict[str, str]] = {
    "DDIMScheduler": {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "heun": "HeunDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
    },
    "FlowMatchEulerDiscreteScheduler": {
        "euler": "FlowMatchEulerDiscreteScheduler",
        "heun": "FlowMatchHeunDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
    },
    "EDMDPMSolverMultistepScheduler": {
        "dpm++": "EDMDPMSolverMultistepScheduler",
        "euler": "EDMEulerScheduler",
        "heun": "EDMHeunScheduler",  # ours
    },
}


def sampler(adapter: Generative, name: str | None, *, latents: bool = False) -> Any:
    """A fresh scheduler of that name for the adapter's noise; the adapter's own where none is named.

    For latents it does not clip: they have no range that pixels have.

    Raises:
        ValueError: there is none of that name for this noise.
    """
    own = adapter.scheduler()
    if latents and own.config.get("clip_sample"):
        own.register_to_config(clip_sample=False)
    known = SAMPLERS.get(type(own).__name__, {})
    if name is None:
        return own
    signal = getattr(own, "alphas_cumprod", None)
    endless = signal is not None and signal[-1] == 0  # then the last noise level is infinite, which DDIM alone bears
    able = [other for other in known if other == "ddim" or not endless]
    if name not in able:
        raise ValueError(f"sampler must be one of {', '.join(able) or 'none'} for {type(adapter).__name__}, got {name}")
    import diffusers

    from pretrain.adapters._heun import EDMHeunScheduler

    kind: Any = EDMHeunScheduler if known[name] == "EDMHeunScheduler" else getattr(diffusers, known[name])
    takes = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in own.config.items() if key in takes}
    if name == "dpm++" and "shift" in own.config:  # it knows straight paths by other names
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": own.config["shift"]}
    return kind(**config)


def check(adapter: Generative, classes: int, name: str | None, steps: int, guidance: float, flag: str = "--") -> None:
    """Refuse what `generate` could not do with these settings.

    Args:
        adapter: names the scheduler.
        classes: that the network knows; 0: none.
        name, steps, guidance: see `generate`.
        flag: what a setting's name begins with on the command line.

    Raises:
        UserError: there is no such sampler, not with so many steps, or nothing to be guided by.
    """
    if not math.isfinite(guidance):
        raise UserError(f"{flag}guidance must be a finite number, got {guidance}")
    if guidance != 1 and not (classes and getattr(adapter, "label_dropout", 1)):
        raise UserError(
            f"{flag}guidance {guidance:g} needs a model that knows images with a label and without one; train with "
            "--class-conditional and a label_dropout above 0, or leave it out"
        )
    try:
        sampler(adapter, name).set_timesteps(steps)
    except ValueError as error:
        named = f"{flag}sampler {name}, " if name else ""
        raise UserError(f"{named}{flag}steps {steps}: {' '.join(str(error).split())}") from None


@torch.no_grad()
def generate(
    model: nn.Module,
    adapter: Generative,
    noise: Tensor,
    label: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    by: str | None = None,
    autoencoder: Any = None,
) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] from standard normal noise of that shape, or of their latents' shape.

    Args:
        model: a denoiser in evaluation mode.
        adapter: names the scheduler.
        noise: float32 [B, C, H, W].
        label: int64 [B]; -1: none.
        steps: of the scheduler.
        guidance: classifier-free guidance scale w (Ho and Salimans 2022, equation 6, in the form
            uncond + w (cond - uncond)); 1 is plain conditional generation.
        by: a sampler's name, see `sampler`.
        autoencoder: its `decode` makes images, where the model is one of latents.
    """
    scheduler = sampler(adapter, by, latents=autoencoder is not None)
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(scaled, t.expand(len(x)), label)
        if guidance != 1.0:
            without = model(scaled, t.expand(len(x)), torch.full_like(label, -1))
            output = without + guidance * (output - without)
        x = scheduler.step(output, t, x).prev_sample
    return autoencoder.decode(x) if autoencoder else x.clamp(-1, 1)
