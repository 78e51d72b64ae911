"""Images from noise, by a diffusers scheduler."""

import torch
from torch import Tensor, nn

from pretrain.adapter import Generative


@torch.no_grad()
def generate(
    model: nn.Module, adapter: Generative, noise: Tensor, label: Tensor, *, steps: int, guidance: float = 1.0
) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] from standard normal noise of that shape.

    Args:
        model: a denoiser in evaluation mode.
        adapter: names the scheduler.
        noise: float32 [B, C, H, W].
        label: int64 [B]; -1: none.
        steps: of the scheduler.
        guidance: classifier-free guidance scale w (Ho and Salimans 2022, equation 6, in the form
            uncond + w (cond - uncond)); 1 is plain conditional generation.
    """
    scheduler = adapter.scheduler()
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(scaled, t.expand(len(x)), label)
        if guidance != 1.0:
            without = model(scaled, t.expand(len(x)), torch.full_like(label, -1))
            output = without + guidance * (output - without)
        x = scheduler.step(output, t, x).prev_sample
    return x.clamp(-1, 1)
