"""The limit that training programs are compared with: a loop with nothing that could be left out."""

import copy
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import mse_loss

MASK_RATIO = 0.75


def noise_loss(alpha_bar: Tensor, model: nn.Module, image: Tensor) -> Tensor:
    """The mean squared error of predicted noise, for images [B, C, H, W] in [-1, 1] and signal powers [T] by time."""
    noise, time = torch.randn_like(image), torch.randint(len(alpha_bar), (len(image),), device=image.device)
    alpha = alpha_bar[time].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
    return mse_loss(model(noisy, time, torch.full_like(time, -1)).float(), noise)


def mask_loss(model: Any, image: Tensor) -> Tensor:
    """The mean squared error of normalized hidden patches, for images [B, C, H, W] in [-1, 1]."""
    order = torch.rand(len(image), model.patches, device=image.device).argsort(dim=1)
    visible, hidden = order.tensor_split([round(model.patches * (1 - MASK_RATIO))], dim=1)
    patch = model.patchify(image).take_along_dim(hidden[..., None], 1)
    target = (patch - patch.mean(-1, keepdim=True)) / (patch.var(-1, keepdim=True) + 1e-6).sqrt()
    return mse_loss(model(image, visible, hidden).float(), target)


def train(model: nn.Module, images: Tensor, batch: int, steps: int, *, mae: bool, bf16=False, compiled=False) -> Any:
    """Train a network of models/ on images uint8 [N, C, H, W] on the same device, and return its EMA."""
    loss = mask_loss if mae else partial(noise_loss, DDPMScheduler().alphas_cumprod.to(images.device))
    trained: Any = [p for p in model.parameters() if p.requires_grad]
    ema = copy.deepcopy(model)
    averages: Any = [p.requires_grad_(False) for p in ema.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    network: Any = torch.compile(model) if compiled else model
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images), device=images.device)
        index, order = order[:batch], order[batch:]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            value = loss(network, images[index].float() / 127.5 - 1)
        value.backward()
        if not mae:  # where the other programs clip it, too
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, trained, 1e-3)
    return ema
