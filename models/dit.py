"""A diffusion transformer. This file stands alone: an exported pipeline carries it beside its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with adaLN-zero (Peebles and Xie 2023).

    Attributes:
        patch: side of a patch in pixels.
        width: channels of a token, D.
        depth: blocks.
        heads: attention heads; they divide the width.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6

    def __post_init__(self) -> None:
        if self.patch < 1 or self.depth < 1 or self.heads < 1:
            raise ValueError(f"patch, depth and heads must be positive, got {self.patch}, {self.depth}, {self.heads}")
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * self.heads}, got {self.width}")

    def build(self, shape: tuple[int, int, int], classes: int) -> "DiT":
        """The network for images of `shape` (C, H, W) with `classes` classes, 0 for none.

        Raises:
            ValueError: the image is not a whole number of patches.
        """
        if shape[1] % self.patch or shape[2] % self.patch:
            raise ValueError(
                f"a DiT with patch {self.patch} needs images whose sides {self.patch} divides, got "
                f"{shape[1]}x{shape[2]}; give another --model.patch or --data.size"
            )
        return DiT(shape=shape, classes=classes, patch=self.patch, width=self.width, depth=self.depth, heads=self.heads)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the identity at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, L, D] from tokens [B, L, D] and the condition [B, D]."""
        parts = rearrange(self.modulate(condition), "b (n d) -> n b 1 d", n=6)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.heads)
        x = x + gate1 * self.out(rearrange(scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(ModelMixin, ConfigMixin):
    """A denoiser. One time and label embedding for all blocks, with a null class of its own.

    Args:
        shape: of the images, (C, H, W).
        classes: how many, 0 for none.
        patch, width, depth, heads: see `DiTConfig`.
    """

    @register_to_config
    def __init__(
        self, shape: tuple[int, int, int], classes: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        channels, height, side = shape
        self.patch, self.null = patch, classes
        self.grid = (height // patch, side // patch)
        self.embed = nn.Linear(channels * patch**2, width)
        position = get_2d_sincos_pos_embed(width, self.grid, output_type="pt").float()
        self.register_buffer("position", position.reshape(1, -1, width), persistent=False)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(256, width)
        self.label = nn.Embedding(classes + 1, width)  # the last one is "no label"
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, channels * patch**2)
        self.initialise()

    def initialise(self) -> None:
        """Xavier for linear maps, small embeddings, zero for gates and output (adaLN-zero, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        gates: Any = (module for name, module in self.named_modules() if name.endswith("modulate"))
        for linear in (*(gate[1] for gate in gates), self.out):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """A tensor like x [B, C, H, W], from time [B] and label int64 [B] (-1: none)."""
        p, (h, w) = self.patch, self.grid
        tokens = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)) + self.position
        label = torch.where(label < 0, self.null, label) if self.null else torch.zeros_like(label)
        condition = self.time(self.time_features(time).to(x.dtype)) + self.label(label)  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = rearrange(self.modulate(condition), "b (n d) -> n b 1 d", n=2)
        tokens = self.out(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
