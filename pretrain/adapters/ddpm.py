"""Denoising diffusion in discrete time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from einops import reduce
from torch import nn

from pretrain.adapters import Batch, Losses, drop_labels
from pretrain.adapters._uncertainty import oversample_below, snr_weight
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class DDPM:
    """Denoising diffusion with the simple loss (Ho et al., 2020, equation 14), or a weighted one.

    Attributes:
        prediction: target of the network: noise, image, or velocity (Salimans and Ho, 2022).
        noise_schedule: linear (Ho et al., 2020), cosine (Nichol and Dhariwal, 2021) or sigmoid (Xu et al., 2022).
        timesteps: number of noise levels, T; with fewer than 1000, linear and sigmoid don't end in pure noise.
        zero_terminal_snr: rescale the noise schedule to end in pure noise (Lin et al., 2024).
        early: changes the objective: factor on the density of timesteps below 0.7 T (SpeeD; Wang et al., 2025).
        min_snr: changes the objective: gamma of min-SNR weighting, for example 5 (Hang et al., 2023).
        p2: changes the objective: gamma of P2 weighting, for example 1 (Choi et al., 2022, with k = 1).
        label_dropout: share of labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    noise_schedule: Literal["linear", "squaredcos_cap_v2", "sigmoid"] = "squaredcos_cap_v2"
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    early: float = 1.0
    min_snr: float | None = None
    p2: float | None = None
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        zero_snr, weights = self.zero_terminal_snr, [w for w in (self.min_snr, self.p2) if w is not None]
        for good, message in (
            (self.timesteps >= 2, f"timesteps must be at least 2, got {self.timesteps}"),
            (min(self.early, 1, *weights) > 0, f"early, min_snr, p2 must be above 0, got {self.early}, {weights}"),
            (len(weights) < 2, f"min_snr and p2 must not both be given, got {weights}; leave one out"),
            (not zero_snr or self.prediction != "epsilon", "prediction must not be epsilon with zero_terminal_snr"),
            (not zero_snr or not weights, "zero_terminal_snr must not be combined with min_snr or p2 (weight 0 at T)"),
            (0 <= self.label_dropout <= 1, f"label_dropout must be in [0, 1], got {self.label_dropout}"),
        ):
            if not good:
                raise ValueError(message)

    @cached_property
    def ddpm_scheduler(self) -> Any:
        """The scheduler of diffusers that adds noise in training."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.timesteps,
            beta_schedule=self.noise_schedule,
            prediction_type=self.prediction,
            rescale_betas_zero_snr=self.zero_terminal_snr,
        )

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """The weighted squared error at timestep floor(level * T), after the map of `early`, as loss and score."""
        x, noise = batch.image, rng.normal(*batch.image.shape[1:])
        t = (oversample_below(batch.level, 0.7, self.early) * self.timesteps).long()
        output = model(self.ddpm_scheduler.add_noise(x, noise, t), t, drop_labels(batch.label, self.label_dropout, rng))
        targets = {"epsilon": noise, "sample": x, "v_prediction": self.ddpm_scheduler.get_velocity(x, noise, t)}
        error = reduce((output - targets[self.prediction]).square(), "b c h w -> b", "mean")
        alpha_bar = self.ddpm_scheduler.alphas_cumprod[t]
        return Losses(error * snr_weight(alpha_bar / (1 - alpha_bar), self.prediction, self.min_snr, self.p2))

    def scheduler(self) -> Any:
        """DDIM (Song et al., 2021) with the same noise schedule."""
        from diffusers import DDIMScheduler

        betas = {"trained_betas": self.ddpm_scheduler.betas.tolist(), "rescale_betas_zero_snr": False}
        options: Any = betas if self.noise_schedule == "sigmoid" else {}  # diffusers' DDIM lacks this schedule
        return DDIMScheduler.from_config(self.ddpm_scheduler.config, timestep_spacing="trailing", **options)
