"""A masked autoencoder with a vision transformer of timm as encoder."""

from collections.abc import Callable
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

from ._attention import CrossBlock, attention_mask
from ._positions import gather_tokens, sincos_position


@dataclass(frozen=True)
class MAEConfig:
    """A vision transformer of timm as encoder of the visible patches, and a small transformer as decoder.

    Attributes:
        encoder: name of a vision transformer in timm.
        patch: side of a patch, in pixels; default: that of the encoder.
        width: channels of an encoder token; default: that of the encoder.
        depth: number of encoder blocks; default: that of the encoder.
        heads: attention heads of the encoder; default: those of the encoder.
        decoder_width: channels of a decoder token, a multiple of 4 and of decoder_heads.
        decoder_depth: number of decoder blocks.
        decoder_heads: attention heads of the decoder.
        decoder: self-attention of visible and hidden patches (self; He et al., 2022), or cross-attention of each hidden
            patch to the visible ones (cross; Fu et al., 2024), where leaving out hidden patches does not change others.
        init: weights to start from: a file (.safetensors or .pth) of timm, transformers or a published MAE, a folder
            that holds one, or a run.
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
        """The arguments of `timm.create_model(self.encoder, ...)` for images of `shape`, (C, H, W)."""
        own = {"patch_size": self.patch, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}
        chosen = {name: value for name, value in own.items() if value is not None}
        size = shape[1] if shape[1] == shape[2] else shape[1:]
        return {"img_size": size, "in_chans": shape[0], "num_classes": 0, **chosen}

    def build(self, shape: tuple[int, int, int], classes: int) -> "MaskedAutoencoder":
        """Make the network for images of `shape`, (C, H, W); `classes` is ignored.

        Raises:
            ValueError: timm has no such encoder, it is no plain vision transformer, or its patch does not divide the
                sides of the image.
        """
        if not timm.is_model(self.encoder):
            from difflib import get_close_matches

            names = timm.list_models("vit_*", module="vision_transformer")
            similar = get_close_matches(self.encoder, names, 2, 0.3)
            hint = f"did you mean {' or '.join(similar)}?" if similar else "timm.list_models('vit_*') lists them"
            raise ValueError(f"timm has no vision transformer {self.encoder!r}; {hint}")
        family = timm.model_entrypoint(self.encoder).__module__.rpartition(".")[2]
        message = f"the encoder must be a plain VisionTransformer of timm, like vit_base_patch16_224; {self.encoder} "
        if family not in ("vision_transformer", "deit"):
            raise ValueError(f"{message}is in timm's module {family}")
        try:
            encoder: Any = timm.create_model(self.encoder, **self.timm_arguments(shape))
        except (AssertionError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(
                f"timm can't make {self.encoder} with these sizes: {error or type(error).__name__}"
            ) from None
        if type(encoder) is not VisionTransformer or encoder.attn_pool is not None:
            reason = "has attention pooling" if hasattr(encoder, "attn_pool") else "has other tokens"
            raise ValueError(f"{message}{reason}")
        if type(encoder.patch_embed) is not PatchEmbed:
            raise ValueError(f"{message}has convolutions before its tokens")
        patch: Any = encoder.patch_embed.patch_size
        if shape[1] % patch[0] or shape[2] % patch[1] or encoder.patch_embed.num_patches < 2:
            raise ValueError(
                f"an encoder with patch {patch[0]} needs images of two or more whole patches, got "
                f"{shape[1]}x{shape[2]}; give another --model.patch or --data.size"
            )
        return MaskedAutoencoder(
            encoder, shape[0], self.decoder, self.decoder_width, self.decoder_depth, self.decoder_heads
        )


class MaskedAutoencoder(nn.Module):
    """An encoder of the visible patches, and a decoder that predicts hidden ones (He et al., 2022, section 3).

    Args:
        encoder: a vision transformer of timm, which is exported and can be loaded without this project.
        channels: of the images, C.
        decoder: "self" or "cross", see `MAEConfig`.
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
        """Recompute activations of encoder and decoder in the backward pass instead of storing them."""
        self.encoder.set_grad_checkpointing(True)

    def apply_block(self, block: nn.Module, *tokens: Tensor, attn_mask: Tensor | None) -> Tensor:
        """The output of a block, with gradient checkpointing if it is enabled."""
        if self.encoder.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, attn_mask=attn_mask, use_reentrant=False)
        return block(*tokens, attn_mask=attn_mask)

    @property
    def patches(self) -> int:
        """Number of patches of an image, L."""
        return self.grid[0] * self.grid[1]

    def initialise(self) -> None:
        """Xavier-uniform linear layers and patch embedding, fixed positions (He et al., 2022, appendix A.1)."""
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
        """Images [B, C, H, W] as patches [B, L, P], P = patch height * patch width * C."""
        return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch[0], q=self.patch[1])

    def unpatchify(self, patch: Tensor) -> Tensor:
        """Patches [B, L, P] as images [B, C, H, W]."""
        (h, w), (p, q) = self.grid, self.patch
        return rearrange(patch, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)

    def embed_visible(self, image: Tensor, visible: Tensor) -> Tensor:
        """Input tokens [B, prefix + V, D] of the encoder's blocks; only visible patches, int64 [B, V], are embedded."""
        encoder, embed = self.encoder, self.encoder.patch_embed
        # Flattened first, so that the gradient has the parameter's strides also with one channel, or DDP warns.
        kernel = rearrange(embed.proj.weight.flatten(1), "d (c p q) -> d (p q c)", p=self.patch[0], q=self.patch[1])
        tokens = embed.norm(linear(gather_tokens(self.patchify(image), visible), kernel, embed.proj.bias))
        prefix = [
            token.expand(len(image), -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None
        ]
        if encoder.pos_embed is not None:
            start = encoder.pos_embed.shape[1] - self.patches  # 0 in encoders without positions of prefix tokens
            tokens = tokens + gather_tokens(encoder.pos_embed[:, start:].expand(len(image), -1, -1), visible)
            prefix = [torch.cat(prefix, dim=1) + encoder.pos_embed[:, :start]] if start else prefix
        return encoder.norm_pre(encoder.pos_drop(torch.cat([*prefix, tokens], dim=1)))

    def encode(
        self,
        image: Tensor,
        visible: Tensor,
        valid: Tensor | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Encode the visible patches.

        Args:
            image: float32 [B, C, H, W].
            visible: int64 [B, V]; indices of patches, in any order.
            valid: bool [B, V]; False for entries of `visible` to ignore; None: all are valid.
            choose: called after the first quarter of the blocks with the mean of each image's tokens, [B, D]; returns
                the images that go on, int64 [K].

        Returns:
            float32 [B, prefix + V, D], or with `choose` [K, prefix + V, D]; class and register tokens, then the patches
            in the order of `visible`.
        """
        tokens = self.embed_visible(image, visible)
        mask = None if valid is None else attention_mask(valid, self.encoder.num_prefix_tokens)
        depth = len(self.encoder.blocks)
        for number, block in enumerate(self.encoder.blocks):
            if choose is not None and number == min(max(1, depth // 4), depth - 1):
                kept = choose(tokens.mean(dim=1))
                tokens, mask = tokens[kept], None if mask is None else mask[kept]
            tokens = self.apply_block(block, tokens, attn_mask=mask)
        return self.encoder.norm(tokens)

    def forward(
        self,
        image: Tensor,
        visible: Tensor,
        hidden: Tensor,
        valid: Tensor | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Predict hidden patches; the decoder computes no others.

        Args:
            image: float32 [B, C, H, W].
            visible: int64 [B, V]; indices of visible patches.
            hidden: int64 [B, H]; indices of the patches to predict.
            valid: bool [B, V + H]; False for entries of `visible` and `hidden` to ignore, whose predictions have no
                meaning; None: all are valid.
            choose: see `encode`; all that follows is restricted to these images.

        Returns:
            [B, H, P], or with `choose` [K, H, P]; the predicted patches.
        """
        prefix = self.encoder.num_prefix_tokens
        valid_visible = None if valid is None else valid[:, : visible.shape[1]]
        if choose is None:
            tokens = self.encode(image, visible, valid_visible)
        else:
            kept: list[Tensor] = []
            tokens = self.encode(image, visible, valid_visible, lambda feature: kept.append(choose(feature)) or kept[0])
            visible, hidden = visible[kept[0]], hidden[kept[0]]
            valid, valid_visible = (None if part is None else part[kept[0]] for part in (valid, valid_visible))
        context = self.embed(tokens)
        position = self.position.expand(len(tokens), -1, -1)
        prefix_index = torch.arange(prefix, device=visible.device).expand(len(tokens), -1)
        context = context + gather_tokens(position, torch.cat([prefix_index, visible + prefix], dim=1))
        queries = self.mask_token.to(context.dtype) + gather_tokens(position, hidden + prefix)
        if self.cross:
            mask = None if valid_visible is None else attention_mask(valid_visible, prefix)
            for block in self.decoder:
                queries = self.apply_block(block, queries, context, attn_mask=mask)
            return self.out(self.norm(queries))
        mask = None if valid is None else attention_mask(valid, prefix)
        tokens = torch.cat([context, queries], dim=1)
        for block in self.decoder:
            tokens = self.apply_block(block, tokens, attn_mask=mask)
        return self.out(self.norm(tokens[:, context.shape[1] :]))
