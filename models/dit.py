"""A diffusion transformer. This file imports nothing of the project, since exported pipelines contain a copy of it."""

from collections.abc import Callable
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
    """A diffusion transformer with adaLN-zero (Peebles and Xie, "Scalable diffusion models with transformers", 2023).

    Attributes:
        size: preset of width, depth and heads (table 1 of that paper).
        patch: side of a patch, in pixels.
        width: channels of a token, a multiple of 4 * heads; default: that of size.
        depth: number of blocks; default: that of size.
        heads: attention heads; default: that of size.
        position: fixed sine-cosine position embedding added to the tokens (sincos), or axial rotary position
            embedding of queries and keys (rope; Su et al., 2021; Heo et al., 2024).
        qk_norm: layer norm of queries and keys, so that attention logits don't diverge (Dehghani et al., 2023, section
            2.1).
        route: share of the tokens of an image, in [0, 1), that skip all blocks but the first two and the last two in
            training (TREAD, Krause et al., 2025); others are chosen in each forward pass. It changes the objective.
        init: weights to start from: an exported model, a run, or a file of them (.safetensors, .pt).
    """

    size: Literal["S", "B", "L", "XL"] = "S"
    patch: int = 2
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    position: Literal["sincos", "rope"] = "sincos"
    qk_norm: bool = False
    route: float = 0.0
    init: str | None = None

    def __post_init__(self) -> None:
        width, depth, heads = self.dimensions
        if self.patch < 1 or depth < 1 or heads < 1:
            raise ValueError(f"patch, depth and heads must be positive, got {self.patch}, {depth}, {heads}")
        if width < 1 or width % (4 * heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * heads}, got {width}")
        if not 0 <= self.route < 1 or (self.route and depth < 5):  # the outer four blocks have all tokens
            raise ValueError(f"route must be in [0, 1), and 0 if depth is below 5, got {self.route}, depth {depth}")

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width, depth and heads, of `size` where the fields are None."""
        sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
        width, depth, heads = sizes[self.size]
        return (
            width if self.width is None else self.width,
            depth if self.depth is None else self.depth,
            heads if self.heads is None else self.heads,
        )

    def build(self, shape: tuple[int, int, int], classes: int) -> "DiT":
        """Make the network for images of `shape`, (C, H, W), and `classes` classes (0: without labels).

        Raises:
            ValueError: the patch does not divide the sides of the image.
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
            route=self.route,
        )


def rope_angles(grid: tuple[int, int], width: int) -> Tensor:
    """Rotation angles of axial RoPE.

    Half of the channel pairs turn with the row of a patch, half with its column, with the frequencies
    100^(-4 i / width), i = 0 .. width / 4 - 1 (Heo et al., "Rotary position embedding for vision transformer", 2024,
    section 3.2).

    Args:
        grid: rows and columns of patches.
        width: channels of one attention head, a multiple of 4.

    Returns:
        float32 [L, width / 2], in radians; patches in row-major order.
    """
    frequency = 100.0 ** -(torch.arange(width // 4).float() / (width // 4))
    row, column = (torch.outer(torch.arange(n).float(), frequency) for n in grid)
    return torch.cat([row.repeat_interleave(grid[1], dim=0), column.repeat(grid[0], 1)], dim=1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs of channels (n, n + d/2) of x.

    Args:
        x: [..., L, d].
        cosine, sine: float32 [L, d/2], or [B, 1, L, d/2] for positions that differ by image; of the angles.

    Returns:
        [..., L, d].
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Block(nn.Module):
    """A DiT block: attention and MLP, with shift, scale and gate from the condition (adaLN-zero).

    Args:
        width: channels of a token, D.
        heads: attention heads.
        qk_norm: whether to normalize queries and keys.
    """

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
        """Update the tokens.

        Args:
            x: float32 [B, L, D]; the tokens.
            condition: float32 [B, D].
            cosine, sine: as for `rotate`, d = D / heads; None: without RoPE.

        Returns:
            float32 [B, L, D].
        """
        modulation = rearrange(self.modulate(condition), "b (n d) -> n b 1 d", n=6)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.heads)
        q, k = self.norm_q(q), self.norm_k(k)
        if cosine is not None and sine is not None:
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norm and rotation give float32 under autocast
        x = x + gate1 * self.out(rearrange(scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(ModelMixin, ConfigMixin):
    """A denoiser with one embedding of time and label for all blocks, and a null class for "no label".

    Args:
        shape: (C, H, W) of the images.
        classes: number of classes; 0: without labels.
        patch, width, depth, heads, position, qk_norm, route: see `DiTConfig`.
    """

    _supports_gradient_checkpointing = True  # read by diffusers' enable_gradient_checkpointing()
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
        route: float = 0.0,
    ) -> None:
        super().__init__()
        channels, rows, columns = shape
        self.patch, self.null_class, self.route = patch, classes, route
        self.grid = (rows // patch, columns // patch)
        self.embed = nn.Linear(channels * patch**2, width)
        sincos = cosine = sine = None
        if position == "sincos":
            sincos = get_2d_sincos_pos_embed(width, self.grid, output_type="pt").float().reshape(1, -1, width)
        else:
            angle = rope_angles(self.grid, width // heads)
            cosine, sine = angle.cos(), angle.sin()
        self.register_buffer("sincos", sincos, persistent=False)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(256, width)
        self.label = nn.Embedding(classes + 1, width)  # the last class is "no label"
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, channels * patch**2)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform linear layers, normal embeddings, zero gates and output (DiT, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        gates: Any = (module for name, module in self.named_modules() if name.endswith("modulate"))
        for linear in (*(gate[1] for gate in gates), self.out):
            nn.init.zeros_(linear.weight)

    def _not_routed(self, tokens: Tensor) -> Tensor:
        """Random positions of the tokens that go through all blocks, int64 [B, K, 1] in increasing order."""
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
        return order[:, : max(1, round((1 - self.route) * order.shape[1]))].sort(dim=1).values[..., None]

    def _angles(self, position: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """RoPE's cosines and sines at positions [B, K, 1], or at all; None, None without RoPE."""
        at = slice(None) if position is None else position.mT
        return None if self.cosine is None else self.cosine[at], None if self.sine is None else self.sine[at]

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor, choose: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Denoise a batch.

        Args:
            x: float32 [B, C, H, W].
            time: float32 [B], or int64; in the units of the noise scheduler.
            label: int64 [B]; -1 for no label.
            choose: called after the first quarter of the blocks with the mean of each image's tokens, [B, D]; returns
                the images that go on, int64 [K], to which all that follows is restricted.

        Returns:
            float32 [B, C, H, W], or with `choose` [K, C, H, W].
        """
        p, (h, w) = self.patch, self.grid
        tokens = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        if self.sincos is not None:
            tokens = tokens + self.sincos
        label = torch.where(label < 0, self.null_class, label) if self.null_class else torch.zeros_like(label)
        condition = self.time(self.time_features(time).to(x.dtype)) + self.label(label)  # [B, D]
        depth, every, position = len(self.blocks), tokens, None
        for number, block in enumerate(self.blocks):
            if choose is not None and number == min(max(1, depth // 4), depth - 1):
                kept = choose(tokens.mean(dim=1))
                tokens, condition, every = tokens[kept], condition[kept], every[kept]
                position = None if position is None else position[kept]
            if self.route and self.training and number == 2:
                every, position = tokens, self._not_routed(tokens)
                tokens = every.take_along_dim(position, dim=1)
            elif position is not None and number == depth - 2:
                tokens, position = every.scatter(1, position.expand_as(tokens), tokens.to(every.dtype)), None
            inputs = (tokens, condition, *self._angles(position))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, *inputs, use_reentrant=False)
            else:
                tokens = block(*inputs)
        shift, scale = rearrange(self.modulate(condition), "b (n d) -> n b 1 d", n=2)
        tokens = self.out(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
