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
    """Denoising diffusion with the simple loss (Ho et al. 2020, equation 14), or a weighted one.

    Attributes:
        prediction: what the network predicts: the noise, the image, or the velocity (Salimans and Ho 2022).
        noise_schedule: linear (Ho et al. 2020), cosine (Nichol and Dhariwal 2021) or sigmoid (Xu et al. 2022).
        timesteps: noise levels, T; linear and sigmoid are made for 1000, fewer leave some of the image at the end.
        zero_terminal_snr: change the noise schedule so that nothing of the image is left at the end (Lin et al. 2024).
        early: changes the objective: timesteps below 0.7 T come this many times as often (SpeeD; Wang et al. 2025).
        min_snr: changes the objective: weigh the image's squared error by min(SNR, this), say 5 (Hang et al. 2023).
        p2: changes the objective: weigh the noise's squared error by (1 + SNR)^-this, say 1 (Choi et al. 2022).
        label_dropout: share of the labels replaced by "no label", for classifier-free guidance, in [0, 1].
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
        zero, weights = self.zero_terminal_snr, [w for w in (self.min_snr, self.p2) if w is not None]
        for good, said in (
            (self.timesteps >= 2, f"timesteps must be at least 2, got {self.timesteps}"),
            (min(self.early, 1, *weights) > 0, f"early, min_snr, p2 must be above 0, got {self.early}, {weights}"),
            (len(weights) < 2, f"min_snr and p2 must not both be given, got {weights}; leave one out"),
            (not zero or self.prediction != "epsilon", "prediction must not be epsilon with zero_terminal_snr"),
            (not zero or not weights, "zero_terminal_snr must not go with min_snr or p2: its end would weigh 0"),
            (0 <= self.label_dropout <= 1, f"label_dropout must be in [0, 1], got {self.label_dropout}"),
        ):
            if not good:
                raise ValueError(said)

    @cached_property
    def noising(self) -> Any:
        """The noise schedule, as diffusers has it."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.timesteps,
            beta_schedule=self.noise_schedule,
            prediction_type=self.prediction,
            rescale_betas_zero_snr=self.zero_terminal_snr,
        )

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass; the level picks the timestep, the timestep the weight: the loss serves as the score."""
        x, noise = batch.image, rng.normal(*batch.image.shape[1:])
        t = (oversample_below(batch.level, 0.7, self.early) * self.timesteps).long()
        output = model(self.noising.add_noise(x, noise, t), t, drop_labels(batch.label, self.label_dropout, rng))
        targets = {"epsilon": noise, "sample": x, "v_prediction": self.noising.get_velocity(x, noise, t)}
        error = reduce((output - targets[self.prediction]).square(), "b c h w -> b", "mean")
        signal = self.noising.alphas_cumprod[t]
        return Losses(error * snr_weight(signal / (1 - signal), self.prediction, self.min_snr, self.p2))

    def scheduler(self) -> Any:
        """DDIM (Song et al. 2021) over the same noise schedule."""
        from diffusers import DDIMScheduler

        betas = {"trained_betas": self.noising.betas.tolist(), "rescale_betas_zero_snr": False}
        given: Any = betas if self.noise_schedule == "sigmoid" else {}  # DDIM has no name for it
        return DDIMScheduler.from_config(self.noising.config, timestep_spacing="trailing", **given)
