"""Image tensors as pictures that a person can see."""

import torch
from einops import rearrange
from torch import Tensor


def grid(images: Tensor, columns: int) -> Tensor:
    """One picture, uint8 [H', W', C], of images [B, C, H, W] in [-1, 1], enlarged so that a person can see it.

    Of four channels the first three are shown: the fourth may be anything, and where it is 0 one would see nothing.
    """
    images = images[:, :3]
    empty = -len(images) % columns
    images = torch.cat([images, torch.full_like(images[:1], -1).expand(empty, -1, -1, -1)])
    scale = max(1, 96 // max(images.shape[-2:]))
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-0.6)
    return rearrange(pixels(images), "(r k) h w c -> (r h) (k w) c", k=columns)


def pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] on the CPU, of images [B, C, H, W] in [-1, 1]."""
    return rearrange(((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu(), "b c h w -> b h w c")
