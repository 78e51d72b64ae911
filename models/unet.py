"""The `UNet2DModel` of diffusers with the signature of a denoiser."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """A convolutional UNet (diffusers' UNet2DModel).

    Attributes:
        channels: channels at each resolution, multiples of 4; the first is that of the image, each further one half.
        layers: residual blocks at each resolution.
        attention: number of resolutions with self-attention, from the lowest up; if any, the innermost block has it.
        head_dim: channels of an attention head.
        attention_from: number of the lowest resolutions without attention, those above them have it; 1 in diffusers'
            train_unconditional.py.
        dropout: dropout probability, in [0, 1).
        init: weights to start from: a model or pipeline of diffusers, a run, or a file of them (.safetensors, .pt).
    """

    channels: tuple[int, ...] = (64, 128, 128)
    layers: int = 2
    attention: int = 1
    head_dim: int = 8
    attention_from: int = 0
    dropout: float = 0.0
    init: str | None = None

    def __post_init__(self) -> None:
        if not self.channels or not all(width > 0 and width % 4 == 0 for width in self.channels):
            raise ValueError(f"channels must be one or more multiples of 4, got {self.channels}")
        if min(self.attention, self.attention_from) < 0 or self.attention + self.attention_from > len(self.channels):
            raise ValueError(
                f"attention and attention_from must be at least 0, and {len(self.channels)} resolutions at most "
                f"together, got {self.attention} and {self.attention_from}"
            )
        if self.attention_from and not self.attention:
            raise ValueError(f"attention_from must be 0 where attention is 0, got {self.attention_from}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if self.attention and any(width % self.head_dim for width in self.channels):
            raise ValueError(f"channels must be multiples of head_dim = {self.head_dim}, got {self.channels}")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

    @property
    def groups(self) -> int:
        """Groups of the group norms: at most 32, and at least two channels in each.

        A group of one channel would cancel the bias of the layer before it; that bias has gradients of pure rounding
        error, which Adam scales to full steps.
        """
        return min(32, math.gcd(*self.channels) // 2)

    def build(self, shape: tuple[int, int, int], classes: int) -> "UNet":
        """Make the network for images of `shape`, (C, H, W), and `classes` classes (0: without labels).

        Raises:
            ValueError: the sides of the image can't be halved once for each further resolution.
        """
        factor = 2 ** (len(self.channels) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"a UNet with {len(self.channels)} resolutions needs images whose sides {factor} divides, got "
                f"{shape[1]}x{shape[2]}; give fewer --model.channels or another --data.size"
            )
        lowest_first = range(len(self.channels) - 1, -1, -1)
        has_attention = [0 <= n - self.attention_from < self.attention for n in lowest_first]
        network = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)),
            add_attention=self.attention > 0,
            attention_head_dim=self.head_dim,
            norm_num_groups=self.groups,
            dropout=self.dropout,
            num_class_embeds=classes + 1 if classes else None,  # the last class is "no label"
        )
        return UNet(network)


class UNet(nn.Module):
    """A denoiser.

    Args:
        network: the model of diffusers, which is exported and can be loaded without this project.
    """

    def __init__(self, network: UNet2DModel) -> None:
        super().__init__()
        self.network = network

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        # Given explicitly, as diffusers' default function breaks torch.compile's graphs.
        self.network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Denoise a batch.

        Args:
            x: float32 [B, C, H, W].
            time: float32 [B], or int64; in the units of the noise scheduler.
            label: int64 [B]; -1 for no label.

        Returns:
            float32 [B, C, H, W].
        """
        embeddings = self.network.config["num_class_embeds"]
        class_labels = torch.where(label < 0, embeddings - 1, label) if embeddings else None
        return self.network(x, time, class_labels=class_labels, return_dict=False)[0]
