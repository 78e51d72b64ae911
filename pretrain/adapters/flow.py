"""Rectified flow: straight paths from data to noise, velocity prediction."""

from dataclasses import dataclass
from typing import Any

from einops import rearrange, reduce
from torch import nn

from pretrain.adapter import Batch, Losses, drop_labels
from pretrain.rng import Draws


@dataclass(frozen=True)
class Flow:
    """Flow matching on straight paths: x_t = (1 - t) x + t noise, target noise - x, t uniform.

    Lipman et al. 2023 (conditional flow matching), Liu et al. 2023 (rectified flow, equation 1).

    Attributes:
        label_dropout: share of the labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")

    def __call__(self, model: nn.Module, batch: Batch, rng: Draws) -> Losses:
        """One forward pass; the level is the time t."""
        noise = rng.normal(*batch.image.shape[1:])
        t = rearrange(batch.level, "b -> b 1 1 1")
        x_t = (1 - t) * batch.image + t * noise
        velocity = model(x_t, 1000 * batch.level, drop_labels(batch.label, self.label_dropout, rng))
        return Losses(reduce((velocity - (noise - batch.image)).square(), "b c h w -> b", "mean"))

    def scheduler(self) -> Any:
        """Euler steps from noise to data."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()
