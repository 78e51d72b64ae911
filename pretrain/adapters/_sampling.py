"""Generating images with the noise schedulers of diffusers."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Generative
from pretrain.core.errors import UserError

# For the class of each adapter's own scheduler: the classes that can sample from the same network, by setting name.
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


def make_scheduler(adapter: Generative, sampler: str | None, *, latents: bool = False) -> Any:
    """Make a noise scheduler of diffusers for sampling from the model of an adapter.

    Args:
        adapter: provides its own scheduler, whose configuration is used.
        sampler: a name in `SAMPLERS`; None: the adapter's own scheduler.
        latents: whether latents are sampled; their predictions are not clipped to the range of pixels.

    Raises:
        ValueError: this adapter has no sampler of this name.
    """
    own = adapter.scheduler()
    if latents and own.config.get("clip_sample"):
        own.register_to_config(clip_sample=False)
    by_name = SAMPLERS.get(type(own).__name__, {})
    if sampler is None:
        return own
    alphas_cumprod = getattr(own, "alphas_cumprod", None)
    zero_snr = alphas_cumprod is not None and alphas_cumprod[-1] == 0  # sigma is infinite there; only DDIM allows it
    allowed = [name for name in by_name if name == "ddim" or not zero_snr]
    if sampler not in allowed:
        raise ValueError(
            f"sampler must be one of {', '.join(allowed) or 'none'} for {type(adapter).__name__}, got {sampler}"
        )
    import diffusers

    from pretrain.adapters._heun import EDMHeunScheduler

    class_name = by_name[sampler]
    scheduler: Any = EDMHeunScheduler if class_name == "EDMHeunScheduler" else getattr(diffusers, class_name)
    parameters = inspect.signature(scheduler.__init__).parameters
    config = {key: value for key, value in own.config.items() if key in parameters}
    if sampler == "dpm++" and "shift" in own.config:  # DPM-Solver's settings for rectified flow have other names
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": own.config["shift"]}
    return scheduler(**config)


def check_sampling(
    adapter: Generative,
    classes: int,
    sampler: str | None,
    steps: int,
    guidance: float,
    flag: str = "--",
    *,
    interval: tuple[float, float] | None = None,
    guided_by_labels: bool = True,
) -> None:
    """Raise if `generate` can't use these settings.

    Args:
        adapter: provides the noise scheduler.
        classes: that the network was built for; 0: without labels.
        sampler, steps, guidance: see `generate`.
        flag: prefix of the settings' names on the command line, for messages.
        interval: the `guidance_interval` of `generate`.
        guided_by_labels: whether there is no `guide`.

    Raises:
        UserError: there is no such sampler, it does not allow so many steps, the model does not allow guidance, or an
            interval or a guide would have no effect.
    """
    if not math.isfinite(guidance):
        raise UserError(f"{flag}guidance must be a finite number, got {guidance}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        got = " ".join(f"{value:g}" for value in interval)
        raise UserError(f"{flag}guidance-interval must be two noise levels sigma, 0 <= low < high, got {got}")
    if guidance == 1 and (interval is not None or not guided_by_labels):
        what = f"{flag}guidance-interval does" if interval is not None else "a guide does"
        raise UserError(f"{what} nothing at {flag}guidance 1, which is no guidance; give another, for example 2")
    if guidance != 1 and guided_by_labels and not (classes and getattr(adapter, "label_dropout", 1)):
        raise UserError(
            f"{flag}guidance {guidance:g} needs a model that was trained with and without labels; train with "
            "--class-conditional and a label_dropout above 0, or leave it out"
        )
    try:
        make_scheduler(adapter, sampler).set_timesteps(steps)
    except ValueError as error:
        settings = f"{flag}sampler {sampler}, {flag}steps {steps}" if sampler else f"{flag}steps {steps}"
        raise UserError(f"{settings}: {' '.join(str(error).split())}") from None


def sigma_of(scheduler: Any, timestep: Tensor) -> Tensor:
    """Standard deviation of the noise relative to that of the signal's scale 1, at timesteps of a scheduler.

    Args:
        scheduler: of diffusers, of any class in `SAMPLERS`.
        timestep: [T]; as the network gets them.

    Returns:
        float64 [T]; infinite where there is noise alone.
    """
    timestep = timestep.double().cpu()
    if (alphas := getattr(scheduler, "alphas_cumprod", None)) is not None and not scheduler.config.get(
        "use_flow_sigmas"
    ):
        low, alphas = timestep.floor().long(), torch.cat([alphas, alphas[-1:]]).double().cpu()
        alpha = alphas[low].lerp(alphas[low + 1], timestep - low)
        return ((1 - alpha) / alpha).sqrt()
    if "EDM" in type(scheduler).__name__:
        return (4 * timestep).exp()  # Karras et al. (2022), table 1: the network gets ln(sigma) / 4
    time = timestep / scheduler.config.num_train_timesteps
    return time / (1 - time)


@torch.no_grad()
def generate(
    model: nn.Module,
    adapter: Generative,
    noise: Tensor,
    label: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    sampler: str | None = None,
    autoencoder: Any = None,
    guide: nn.Module | None = None,
) -> Tensor:
    """Generate images from noise.

    Args:
        model: a denoiser in evaluation mode, called as ``model(x, timestep, label)``.
        adapter: provides the noise scheduler.
        noise: float32 [B, C, H, W], standard normal, of the shape of the images or of their latents.
        label: int64 [B]; -1 for no label.
        steps: of the scheduler.
        guidance: scale w of classifier-free guidance, uncond + w (cond - uncond) (Ho and Salimans, 2022, equation 6,
            where the scale is w - 1); 1: no guidance.
        guidance_interval: noise levels sigma, low and high, between which guidance is used; the other steps have none
            and call the network once (Kynkäänniemi et al., 2024). None: all.
        sampler: a name in `SAMPLERS`; None: the adapter's own scheduler.
        autoencoder: whose `decode` turns latents into images, for a latent diffusion model.
        guide: a worse model, whose prediction with labels takes the place of `uncond` (autoguidance: Karras et al.,
            2024); None: `model` without labels.

    Returns:
        float32 [B, C, H, W] in [-1, 1].

    Raises:
        ValueError: this adapter has no sampler of this name, or it does not allow so many steps.
    """
    scheduler = make_scheduler(adapter, sampler, latents=autoencoder is not None)
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    low, high = guidance_interval or (0.0, math.inf)
    sigma = sigma_of(scheduler, scheduler.timesteps)
    guided = ((sigma >= low) & (sigma <= high)).tolist() if guidance != 1 else [False] * len(sigma)
    for t, is_guided in zip(scheduler.timesteps, guided, strict=True):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(scaled, t.expand(len(x)), label)
        if is_guided:
            without = label if guide is not None else torch.full_like(label, -1)
            worse = (guide or model)(scaled, t.expand(len(x)), without)
            output = worse + guidance * (output - worse)
        x = scheduler.step(output, t, x).prev_sample
    return autoencoder.decode(x) if autoencoder else x.clamp(-1, 1)
