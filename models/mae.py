"""A masked autoencoder built from a timm vision transformer."""

from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ._attention import CrossBlock, with_prefix


@dataclass(frozen=True)
class MAEConfig:
    """A timm ViT as encoder, which sees the visible patches alone, and a light transformer as decoder.

    Attributes:
        encoder: name of a timm vision transformer; the fields below it replace its own.
        patch: side of a patch in pixels.
        width: channels of an encoder token.
        depth: encoder blocks.
        heads: encoder attention heads.
        decoder_width: channels of a decoder token, a multiple of 4.
        decoder_depth: decoder blocks.
        decoder_heads: decoder attention heads.
        decoder: "self": hidden and visible patches attend to one another (He et al. 2022); "cross": each hidden patch
            looks at the visible ones alone (Fu et al. 2024), so leaving some out changes nothing for the others.
        init: file to start from (.safetensors or .pth): of timm, of transformers, a published MAE, or of another run.
    """

    encoder: str = "vit_base_patch16_224"
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder: Literal["self", "cross"] = "self"
    init: str | None = None

    def __post_init__(self) -> None:
        sizes = (
            self.patch,
            self.width,
            self.depth,
            self.heads,
            self.decoder_width,
            self.decoder_depth,
            self.decoder_heads,
        )
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"patch, widths, depths and heads must be at least 1, got {sizes}")
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width must be a multiple of 4 and of decoder_heads = {self.decoder_heads}, "
                f"got {self.decoder_width}"
            )

    def timm_arguments(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """What `timm.create_model(self.encoder, ...)` needs to make the encoder for images of `shape`."""
        own = {"patch_size": self.patch, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}
        chosen = {name: value for name, value in own.items() if value is not None}
        size = shape[1] if shape[1] == shape[2] else shape[1:]
        return {"img_size": size, "in_chans": shape[0], "num_classes": 0, **chosen}

    def build(self, shape: tuple[int, int, int], classes: int) -> "MaskedAutoencoder":
        """The network for images of `shape` (C, H, W); classes do not matter to it.

        Raises:
            ValueError: no such encoder, or the image is not a whole number of its patches.
        """
        if not timm.is_model(self.encoder):
            from difflib import get_close_matches

            near = get_close_matches(self.encoder, timm.list_models("vit_*", module="vision_transformer"), 2, 0.3)
            hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('vit_*') lists them"
            raise ValueError(f"timm has no vision transformer {self.encoder!r}; {hint}")
        family = timm.model_entrypoint(self.encoder).__module__.rpartition(".")[2]
        refusal = f"the encoder must be timm's plain VisionTransformer, such as vit_base_patch16_224; {self.encoder} "
        if family not in ("vision_transformer", "deit"):
            raise ValueError(f"{refusal}is of timm's {family}")
        try:
            encoder: Any = timm.create_model(self.encoder, **self.timm_arguments(shape))
        except (AssertionError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(
                f"timm can't make {self.encoder} with these sizes: {error or type(error).__name__}"
            ) from None
        if type(encoder) is not VisionTransformer or encoder.attn_pool is not None:
            pooled = "pools its tokens by attention" if hasattr(encoder, "attn_pool") else "has other tokens than it"
            raise ValueError(f"{refusal}{pooled}")
        if type(encoder.patch_embed) is not PatchEmbed:
            raise ValueError(f"{refusal}has convolutions before its tokens")
        patch: Any = encoder.patch_embed.patch_size
        if shape[1] % patch[0] or shape[2] % patch[1] or encoder.patch_embed.num_patches < 2:
            raise ValueError(
                f"an encoder with patch {patch[0]} needs images of two or more whole patches, got "
                f"{shape[1]}x{shape[2]}; give another --model.patch or --data.size"
            )
        return MaskedAutoencoder(
            encoder, shape[0], self.decoder, self.decoder_width, self.decoder_depth, self.decoder_heads
        )


def sincos_position(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Fixed sine-cosine position embedding [1, prefix + L, width]; zero for the prefix (class) tokens."""
    frequency = 10000.0 ** -torch.arange(0, 1, 4 / width)[: width // 4]
    axes = [torch.outer(torch.arange(n).float(), frequency) for n in grid]
    y = axes[0][:, None].expand(-1, grid[1], -1)
    x = axes[1][None, :].expand(grid[0], -1, -1)
    position = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(prefix, width), position])[None]


class MaskedAutoencoder(nn.Module):
    """Encoder on visible patches, decoder on those and hidden ones (He et al. 2022, section 3).

    Args:
        encoder: a timm vision transformer; it exports and loads without this project.
        channels: of the images.
        decoder: see `MAEConfig`.
        width, depth, heads: of the decoder.
    """

    def __init__(
        self, encoder: VisionTransformer, channels: int, decoder: str, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.grid: tuple[int, int] = encoder.patch_embed.grid_size
        self.patch: tuple[int, int] = encoder.patch_embed.patch_size
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position: Tensor
        self.register_buffer("position", sincos_position(self.grid, width, encoder.num_prefix_tokens), persistent=False)
        self.cross = decoder == "cross"
        self.decoder = nn.ModuleList(
            CrossBlock(width, heads) if self.cross else Block(width, heads, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, channels * self.patch[0] * self.patch[1])
        self.initialise()

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them, in the decoder too."""
        self.encoder.set_grad_checkpointing(True)

    def apply_block(self, block: nn.Module, *tokens: Tensor, attn_mask: Tensor | None) -> Tensor:
        """What a block makes of its tokens."""
        if self.encoder.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, attn_mask=attn_mask, use_reentrant=False)
        return block(*tokens, attn_mask=attn_mask)

    @property
    def patches(self) -> int:
        """L, patches of an image."""
        return self.grid[0] * self.grid[1]

    def initialise(self) -> None:
        """Xavier for linear maps and the patch embedding, fixed positions (He et al. 2022, appendix A.1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)
        if self.encoder.cls_token is not None:
            nn.init.normal_(self.encoder.cls_token, std=0.02)
        if self.encoder.pos_embed is not None:
            prefix = self.encoder.pos_embed.shape[1] - self.patches
            with torch.no_grad():
                self.encoder.pos_embed.copy_(sincos_position(self.grid, self.encoder.embed_dim, prefix))
            self.encoder.pos_embed.requires_grad_(False)

    def patchify(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, P], P = patch height * patch width * C."""
        return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch[0], q=self.patch[1])

    def unpatchify(self, patch: Tensor) -> Tensor:
        """[B, L, P] -> [B, C, H, W]."""
        (h, w), (p, q) = self.grid, self.patch
        return rearrange(patch, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)

    def embed_visible(self, image: Tensor, visible: Tensor) -> Tensor:
        """What the encoder's blocks see, [B, prefix + V, D]; hidden patches are not even embedded."""
        encoder, embed = self.encoder, self.encoder.patch_embed
        # Flat at first, so that the gradient has the parameter's strides, also of one channel: DDP warns otherwise.
        kernel = rearrange(embed.proj.weight.flatten(1), "d (c p q) -> d (p q c)", p=self.patch[0], q=self.patch[1])
        tokens = embed.norm(linear(_at(self.patchify(image), visible), kernel, embed.proj.bias))
        prefix = [
            token.expand(len(image), -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None
        ]
        if encoder.pos_embed is not None:
            start = encoder.pos_embed.shape[1] - self.patches  # some encoders give the prefix no position
            tokens = tokens + _at(encoder.pos_embed[:, start:].expand(len(image), -1, -1), visible)
            prefix = [torch.cat(prefix, dim=1) + encoder.pos_embed[:, :start]] if start else prefix
        return encoder.norm_pre(encoder.pos_drop(torch.cat([*prefix, tokens], dim=1)))

    def encode(self, image: Tensor, visible: Tensor, there: Tensor | None = None) -> Tensor:
        """Tokens [B, prefix + V, D] of the visible patches, int64 [B, V], in the order given.

        Where not all images show as many, `there`, bool [B, V], says which places are taken; the others go unseen.
        """
        tokens = self.embed_visible(image, visible)
        seen = None if there is None else with_prefix(there, self.encoder.num_prefix_tokens)
        for block in self.encoder.blocks:
            tokens = self.apply_block(block, tokens, attn_mask=seen)
        return self.encoder.norm(tokens)

    def forward(self, image: Tensor, visible: Tensor, hidden: Tensor, there: Tensor | None = None) -> Tensor:
        """Predicted patches [B, H, P] at `hidden`, int64 [B, H], from images and the patches `visible`, int64 [B, V].

        The decoder sees no other patches than these: what is not asked for costs nothing. Where not all images show
        as many, `there`, bool [B, V + H], says which places of both are taken; what is predicted at others is void.
        """
        prefix = self.encoder.num_prefix_tokens
        shown = None if there is None else there[:, : visible.shape[1]]
        known = self.embed(self.encode(image, visible, shown))
        position = self.position.expand(len(image), -1, -1)
        places = torch.arange(prefix, device=visible.device).expand(len(image), -1)
        known = known + _at(position, torch.cat([places, visible + prefix], dim=1))
        asked = self.mask_token.to(known.dtype) + _at(position, hidden + prefix)
        if self.cross:
            seen = None if shown is None else with_prefix(shown, prefix)
            for block in self.decoder:
                asked = self.apply_block(block, asked, known, attn_mask=seen)
            return self.out(self.norm(asked))
        seen = None if there is None else with_prefix(there, prefix)
        tokens = torch.cat([known, asked], dim=1)
        for block in self.decoder:
            tokens = self.apply_block(block, tokens, attn_mask=seen)
        return self.out(self.norm(tokens[:, known.shape[1] :]))


def _at(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens [B, N, D] of [B, L, D] at places, int64 [B, N]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
