"""Positions of patches: fixed embeddings, and selecting tokens by their position."""

import torch
from torch import Tensor


def sincos_position(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Fixed sine-cosine position embedding (He et al., 2022, appendix A.1).

    Args:
        grid: rows and columns of patches.
        width: channels, a multiple of 4.
        prefix: number of class and register tokens before the patches; their position is 0.

    Returns:
        float32 [1, prefix + L, width].
    """
    frequency = 10000.0 ** -torch.arange(0, 1, 4 / width)[: width // 4]
    axes = [torch.outer(torch.arange(n).float(), frequency) for n in grid]
    y = axes[0][:, None].expand(-1, grid[1], -1)
    x = axes[1][None, :].expand(grid[0], -1, -1)
    position = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(prefix, width), position])[None]


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Select the tokens [B, N, D] of tokens [B, L, D] at positions `index`, int64 [B, N]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
