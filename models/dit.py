"""A diffusion transformer. This file stands alone: an exported pipeline carries it beside its weights."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with adaLN-zero (Peebles and Xie 2023).

    Attributes:
        size: width, depth and heads by name (table 1 there); the fields below replace them.
        patch: side of a patch in pixels.
        width: channels of a token, D.
        depth: blocks.
        heads: attention heads; they divide the width.
        position: "sincos": added to the tokens (Peebles and Xie 2023); "rope": queries and keys are turned by row and
            column, so that attention knows how far apart patches are (Su et al. 2021; axial, Heo et al. 2024).
        qk_norm: normalise queries and keys, which keeps attention from blowing up (Dehghani et al. 2023, section 2.1).
    """

    size: Literal["S", "B", "L", "XL"] = "S"
    patch: int = 2
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    position: Literal["sincos", "rope"] = "sincos"
    qk_norm: bool = False

    def __post_init__(self) -> None:
        width, depth, heads = self.dimensions
        if self.patch < 1 or depth < 1 or heads < 1:
            raise ValueError(f"patch, depth and heads must be positive, got {self.patch}, {depth}, {heads}")
        if width < 1 or width % (4 * heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * heads}, got {width}")

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
        width, depth, heads = sizes[self.size]
        return (
            width if self.width is None else self.width,
            depth if self.depth is None else self.depth,
            heads if self.heads is None else self.heads,
        )

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
        width, depth, heads = self.dimensions
        return DiT(
            shape=shape,
            classes=classes,
            patch=self.patch,
            width=width,
            depth=depth,
            heads=heads,
            position=self.position,
            qk_norm=self.qk_norm,
        )


def angles(grid: tuple[int, int], width: int) -> Tensor:
    """By how much pairs of channels turn at each patch, in radians, [L, width / 2]: half by row, half by column.

    Frequencies 100^(-4 i / width), i below width / 4: axial RoPE (Heo et al. 2024, "Rotary position embedding for
    vision transformer", section 3.2).
    """
    frequency = 100.0 ** -(torch.arange(width // 4).float() / (width // 4))
    row, column = (torch.outer(torch.arange(n).float(), frequency) for n in grid)
    return torch.cat([row.repeat_interleave(grid[1], dim=0), column.repeat(grid[0], 1)], dim=1)


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Channels n and n + d/2 of x [..., L, d] as points of a plane, turned by angles [L, d/2]."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cosine - two * sine, two * cosine + one * sine], dim=-1)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the identity at the start."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = (
            nn.LayerNorm(width // heads, eps=1e-6, bias=False) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        """Tokens [B, L, D] from tokens [B, L, D] and the condition [B, D]; cosine and sine of RoPE's angles."""
        parts = rearrange(self.modulate(condition), "b (n d) -> n b 1 d", n=6)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.heads)
        q, k = self.norm_q(q), self.norm_k(k)
        if cosine is not None and sine is not None:
            q, k = turn(q, cosine, sine), turn(k, cosine, sine)
        q, k = q.to(v.dtype), k.to(v.dtype)  # both are done in float32 under autocast
        x = x + gate1 * self.out(rearrange(scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(ModelMixin, ConfigMixin):
    """A denoiser. One time and label embedding for all blocks, with a null class of its own.

    Args:
        shape: of the images, (C, H, W).
        classes: how many, 0 for none.
        patch, width, depth, heads, position, qk_norm: see `DiTConfig`.
    """

    _supports_gradient_checkpointing = True  # what diffusers' enable_gradient_checkpointing() asks for
    gradient_checkpointing = False
    sincos: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None

    @register_to_config
    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        position: str,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        channels, height, side = shape
        self.patch, self.null = patch, classes
        self.grid = (height // patch, side // patch)
        self.embed = nn.Linear(channels * patch**2, width)
        sincos = cosine = sine = None
        if position == "sincos":
            sincos = get_2d_sincos_pos_embed(width, self.grid, output_type="pt").float().reshape(1, -1, width)
        else:
            turned = angles(self.grid, width // heads)
            cosine, sine = turned.cos(), turned.sin()
        self.register_buffer("sincos", sincos, persistent=False)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(256, width)
        self.label = nn.Embedding(classes + 1, width)  # the last one is "no label"
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
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
        tokens = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        if self.sincos is not None:
            tokens = tokens + self.sincos
        label = torch.where(label < 0, self.null, label) if self.null else torch.zeros_like(label)
        condition = self.time(self.time_features(time).to(x.dtype)) + self.label(label)  # [B, D]
        for block in self.blocks:
            given = (tokens, condition, self.cosine, self.sine)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, *given, use_reentrant=False)
            else:
                tokens = block(*given)
        shift, scale = rearrange(self.modulate(condition), "b (n d) -> n b 1 d", n=2)
        tokens = self.out(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
