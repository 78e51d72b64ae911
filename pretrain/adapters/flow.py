"""Rectified flow: straight paths from data to noise, velocity prediction."""

from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange, reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses, drop_labels
from pretrain.adapters._posterior import MIN_NOISE, References
from pretrain.adapters._uncertainty import normal_quantile
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class Flow:
    """Flow matching on straight paths: x_t = (1 - t) x + t noise, target noise - x.

    Lipman et al. 2023 (conditional flow matching), Liu et al. 2023 (rectified flow, equation 1). How densely times are
    visited is part of the objective (Esser et al. 2024, section 3.1).

    Attributes:
        times: changes the objective: t uniform, or its logit normal, so that times in the middle count more.
        mean: of the logit-normal times' logit; above 0 there is more noise.
        std: of the logit-normal times' logit.
        shift: changes the objective, and the steps of sampling: t becomes shift t / (1 + (shift - 1) t), above 1 there
            is more noise, as larger images need (Esser et al. 2024, equation 23); 1 changes nothing.
        posterior_mean: train on the expected image given the noisy one over all training images, which has the same
            expected gradient and less noise (Bertrand et al. 2025); for small data sets.
        label_dropout: share of the labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    times: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    posterior_mean: bool = False
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.times == "uniform" and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"mean and std must go with times logit_normal, got {self.mean} and {self.std} with uniform"
            )
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std and shift must be above 0, got {self.std} and {self.shift}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")

    def time(self, level: Tensor) -> Tensor:
        """The times t in [0, 1] of levels."""
        t = level if self.times == "uniform" else normal_quantile(level, self.mean, self.std).sigmoid()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def path(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the image and of the noise at levels."""
        time = self.time(level)
        return 1 - time, time

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG, references: References | None = None) -> Losses:
        """One forward pass; the level picks the time t."""
        noise, time = rng.normal(*batch.image.shape[1:]), self.time(batch.level)
        t = rearrange(time, "b -> b 1 1 1")
        x_t = (1 - t) * batch.image + t * noise
        label = drop_labels(batch.label, self.label_dropout, rng)
        target = noise - batch.image
        if references is not None:  # (x_t - mean) / t
            mean = references.mean(batch.image, x_t, 1 - time, time, label)
            target = target + (batch.image - mean) / t.clamp(min=MIN_NOISE)
        velocity = model(x_t, 1000 * time, label)
        return Losses(reduce((velocity - target).square(), "b c h w -> b", "mean"))

    def scheduler(self) -> Any:
        """Euler steps from noise to data."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.shift)
