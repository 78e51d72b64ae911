"""Denoising diffusion in discrete time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from einops import reduce
from torch import nn

from pretrain.adapter import Batch, Losses, drop_labels
from pretrain.rng import Draws


@dataclass(frozen=True)
class DDPM:
    """Denoising diffusion with the simple loss (Ho et al. 2020, equation 14).

    Attributes:
        prediction: what the network predicts: the noise, the image, or the velocity (Salimans and Ho 2022).
        noise_schedule: how the noise grows: linear (Ho et al. 2020) or cosine (Nichol and Dhariwal 2021).
        timesteps: noise levels, T.
        label_dropout: share of the labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    timesteps: int = 1000
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {self.timesteps}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")

    @cached_property
    def noising(self) -> Any:
        """The noise schedule, as diffusers has it."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.timesteps, beta_schedule=self.noise_schedule, prediction_type=self.prediction
        )

    def __call__(self, model: nn.Module, batch: Batch, rng: Draws) -> Losses:
        """One forward pass; the level picks the timestep."""
        x, noise = batch.image, rng.normal(*batch.image.shape[1:])
        t = (batch.level * self.timesteps).long()
        output = model(self.noising.add_noise(x, noise, t), t, drop_labels(batch.label, self.label_dropout, rng))
        match self.prediction:
            case "epsilon":
                target = noise
            case "sample":
                target = x
            case "v_prediction":
                target = self.noising.get_velocity(x, noise, t)
        return Losses(reduce((output - target).square(), "b c h w -> b", "mean"))

    def scheduler(self) -> Any:
        """DDIM (Song et al. 2021) over the same noise schedule."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.noising.config, timestep_spacing="trailing")
