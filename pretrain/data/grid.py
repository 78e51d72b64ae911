"""Arranging image tensors in one picture."""

import torch
from einops import rearrange
from torch import Tensor


def grid(images: Tensor, columns: int) -> Tensor:
    """Arrange images in rows, with a border; small ones are enlarged by a whole factor to up to 96 pixels.

    Args:
        images: float32 [B, C, H, W] in [-1, 1]. Of four or more channels the first three are shown (as alpha, a fourth
            could make everything invisible), of two the first.
        columns: images per row; the last row is filled with black.

    Returns:
        uint8 [H', W', C] on the CPU, C 1 or 3.
    """
    images = images[:, : 3 if images.shape[1] > 2 else 1]
    empty = -len(images) % columns
    images = torch.cat([images, torch.full_like(images[:1], -1).expand(empty, -1, -1, -1)])
    scale = max(1, 96 // max(images.shape[-2:]))
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-0.6)
    return rearrange(to_uint8(images), "(r k) h w c -> (r h) (k w) c", k=columns)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images [B, C, H, W] in [-1, 1] (values beyond are clamped) to uint8 [B, H, W, C] on the CPU."""
    return rearrange(((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu(), "b c h w -> b h w c")
