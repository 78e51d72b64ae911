"""Denoising diffusion in discrete time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from einops import reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses, drop_labels
from pretrain.adapters._levels import snr_weight
from pretrain.adapters._posterior import References
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class DDPM:
    """Denoising diffusion with the simple loss (Ho et al., 2020, equation 14), or a weighted one.

    Attributes:
        prediction: target of the network: noise, image, or velocity (Salimans and Ho, 2022).
        noise_schedule: linear (Ho et al., 2020), cosine (Nichol and Dhariwal, 2021) or sigmoid (Xu et al., 2022).
        timesteps: number of noise levels, T; with fewer than 1000, linear and sigmoid don't end in pure noise.
        zero_terminal_snr: rescale the noise schedule to end in pure noise (Lin et al., 2024).
        min_snr: changes the objective: gamma of min-SNR weighting, for example 5 (Hang et al., 2023).
        posterior_mean: use the target's posterior mean over all training images: the same expected gradient, with less
            noise (Xu et al., 2023; Bertrand et al., 2025); for small data sets.
        label_dropout: share of labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    noise_schedule: Literal["linear", "squaredcos_cap_v2", "sigmoid"] = "squaredcos_cap_v2"
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    min_snr: float | None = None
    posterior_mean: bool = False
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        for good, message in (
            (self.timesteps >= 2, f"timesteps must be at least 2, got {self.timesteps}"),
            (self.min_snr is None or self.min_snr > 0, f"min_snr must be above 0, got {self.min_snr}"),
            (
                not self.zero_terminal_snr or (self.prediction != "epsilon" and not self.min_snr),
                "zero_terminal_snr must not be combined with prediction epsilon or min_snr, whose weight at T is 0",
            ),
            (0 <= self.label_dropout <= 1, f"label_dropout must be in [0, 1], got {self.label_dropout}"),
        ):
            if not good:
                raise ValueError(message)

    @property
    def infobatch(self) -> dict[str, Any]:
        """What --infobatch alone means: plain velocities have gradients too alike for a choice of levels to pay."""
        if self.prediction == "v_prediction" and not (self.min_snr or self.posterior_mean):
            return {"pruning.policy": "full"}
        return {"pruning.policy": "importance", "pruning.budget": 0.65, "optim.compensation": 0.5}

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

    def path(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the image and of the noise at timestep floor(level * T), float32 [B] each."""
        ddpm = self.ddpm_scheduler
        ddpm.alphas_cumprod = ddpm.alphas_cumprod.to(level.device)  # once: a copy in each step waits for it
        alpha_bar = ddpm.alphas_cumprod[(level * self.timesteps).long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG, references: References | None = None) -> Losses:
        """The weighted squared error at timestep floor(level * T), as loss and score."""
        x, noise, (signal, sigma) = batch.image, rng.normal(*batch.image.shape[1:]), self.path(batch.level)
        a, s = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        noisy, label = a * x + s * noise, drop_labels(batch.label, self.label_dropout, rng)
        output = model(noisy, (batch.level * self.timesteps).long(), label)
        if references is not None:
            x, noise = references.means(x, noise, noisy, signal, sigma, label)
        target = {"epsilon": noise, "sample": x, "v_prediction": a * noise - s * x}[self.prediction]
        error = reduce((output - target).square(), "b c h w -> b", "mean")
        return Losses(error * snr_weight((signal / sigma).square(), self.prediction, self.min_snr))

    def scheduler(self) -> Any:
        """DDIM (Song et al., 2021) with the same noise schedule."""
        from diffusers import DDIMScheduler

        betas = {"trained_betas": self.ddpm_scheduler.betas.tolist(), "rescale_betas_zero_snr": False}
        options: Any = betas if self.noise_schedule == "sigmoid" else {}  # diffusers' DDIM lacks this schedule
        return DDIMScheduler.from_config(self.ddpm_scheduler.config, timestep_spacing="trailing", **options)
