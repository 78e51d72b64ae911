"""EDM: denoising at continuous noise levels, preconditioned to unit variance of inputs and targets."""

from dataclasses import dataclass
from typing import Any

from einops import rearrange, reduce
from torch import nn

from pretrain.adapters import Batch, Losses, bare, drop_labels
from pretrain.adapters._levels import normal_quantile
from pretrain.adapters._uncertainty import UncertaintyHead
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class EDM:
    """Denoising with preconditioning and log-normal noise levels (EDM; Karras et al., 2022, table 1).

    The network F is called with the noisy image x = y + sigma noise as F(c_in x, ln(sigma) / 4). The denoiser is
    D = c_skip x + c_out F. Its squared error, weighted by 1 / c_out^2, is the squared error of F with the target
    (y - c_skip x) / c_out (equation 8), which is computed below without a difference of nearly equal numbers.

    Attributes:
        mean: changes the objective: mean of ln(sigma).
        std: changes the objective: standard deviation of ln(sigma).
        sigma_data: standard deviation of the pixels, or of the latents.
        uncertainty: changes the objective: learn the log error u(sigma) and minimize error / e^u + u, so that all
            noise levels count alike (EDM2; Karras et al., 2024). The score is the error.
        label_dropout: share of labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5
    uncertainty: bool = False
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.std <= 0 or self.sigma_data <= 0:
            raise ValueError(f"std and sigma_data must be above 0, got {self.std} and {self.sigma_data}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")

    @property
    def infobatch(self) -> dict[str, Any]:
        """What --infobatch alone means: learned uncertainty already makes the gradients of all levels alike."""
        if self.uncertainty:
            return {"pruning.policy": "full"}
        return {"pruning.policy": "importance", "pruning.budget": 0.65, "optim.compensation": 0.5}

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network, with `uncertainty` inside an `UncertaintyHead`, which learns u."""
        return UncertaintyHead(model) if self.uncertainty else model

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """The squared error of F; ln(sigma) is the quantile of its normal distribution at the level.

        Raises:
            ValueError: `uncertainty` is set and the model does not come from `prepare`.
        """
        if self.uncertainty and not isinstance(bare(model), UncertaintyHead):
            raise ValueError("uncertainty needs an UncertaintyHead; pass the module that prepare(model) returns")
        y, noise = batch.image, rng.normal(*batch.image.shape[1:])
        label = drop_labels(batch.label, self.label_dropout, rng)
        log_sigma = normal_quantile(batch.level, self.mean, self.std)
        sigma = rearrange(log_sigma.exp(), "b -> b 1 1 1")
        norm = (sigma**2 + self.sigma_data**2).sqrt()
        target = (sigma / self.sigma_data * y - self.sigma_data * noise) / norm
        if not self.uncertainty:
            output = model((y + sigma * noise) / norm, log_sigma / 4, label)
            return Losses(reduce((output - target).square(), "b c h w -> b", "mean"))
        output, u = model((y + sigma * noise) / norm, log_sigma / 4, label, uncertainty=True)
        error = reduce((output - target).square(), "b c h w -> b", "mean")
        return Losses(error / u.exp() + u, score=error.detach())

    def scheduler(self) -> Any:
        """DPM-Solver++ (Lu et al., 2022) of second order, with the same preconditioning, sigma from 80 to 0.002."""
        from diffusers import EDMDPMSolverMultistepScheduler

        return EDMDPMSolverMultistepScheduler(sigma_data=self.sigma_data)
