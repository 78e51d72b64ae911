"""diffusers' `UNet2DModel` behind the denoiser's signature."""

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
        channels: width at each resolution, from the image's own downwards; each step halves the image.
        layers: residual blocks at each resolution.
        attention: how many of the lowest resolutions attend over the whole image.
        head_dim: channels of one attention head.
        dropout: share of activations dropped in training, in [0, 1).
    """

    channels: tuple[int, ...] = (64, 128, 128)
    layers: int = 2
    attention: int = 1
    head_dim: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.channels or not all(width > 0 and width % 4 == 0 for width in self.channels):
            raise ValueError(f"channels must be one or more multiples of 4, got {self.channels}")
        if not 0 <= self.attention <= len(self.channels):
            raise ValueError(f"attention must be from 0 to {len(self.channels)} resolutions, got {self.attention}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if self.attention and any(width % self.head_dim for width in self.channels):
            raise ValueError(f"channels must be multiples of head_dim = {self.head_dim}, got {self.channels}")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

    @property
    def groups(self) -> int:
        """Groups of the group normalisation: up to 32, of two channels at least.

        In a group of one channel the bias before it does nothing, and Adam turns its rounding errors into noise.
        """
        return min(32, math.gcd(*self.channels) // 2)

    def build(self, shape: tuple[int, int, int], classes: int) -> "UNet":
        """The network for images of `shape` (C, H, W) with `classes` classes, 0 for none.

        Raises:
            ValueError: the image can't be halved as often as there are resolutions.
        """
        factor = 2 ** (len(self.channels) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"a UNet with {len(self.channels)} resolutions needs images whose sides {factor} divides, got "
                f"{shape[1]}x{shape[2]}; give fewer --model.channels or another --data.size"
            )
        attends = [n >= len(self.channels) - self.attention for n in range(len(self.channels))]
        network = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            add_attention=self.attention > 0,
            attention_head_dim=self.head_dim,
            norm_num_groups=self.groups,
            dropout=self.dropout,
            num_class_embeds=classes + 1 if classes else None,  # the last one is "no label"
        )
        return UNet(network)


class UNet(nn.Module):
    """A denoiser: ``network`` is the stock model, which exports and loads without this project."""

    def __init__(self, network: UNet2DModel) -> None:
        super().__init__()
        self.network = network

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.network.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False)
        )  # diffusers' own breaks graphs

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """A tensor like x [B, C, H, W], from time [B] and label int64 [B] (-1: none)."""
        labels = self.network.config["num_class_embeds"]
        known = torch.where(label < 0, labels - 1, label) if labels else None
        return self.network(x, time, class_labels=known, return_dict=False)[0]
