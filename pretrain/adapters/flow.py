"""Flow matching on straight paths between data and noise (rectified flow)."""

from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange, reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses, drop_labels
from pretrain.adapters._levels import normal_quantile
from pretrain.adapters._posterior import References
from pretrain.adapters._velocity import VelocityFromImage, shrinkage
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class Flow:
    """Flow matching on straight paths: x_t = (1 - t) x + t noise; the network predicts the velocity noise - x.

    Conditional flow matching (Lipman et al., 2023), rectified flow (Liu et al., 2023, equation 1). The density of t is
    part of the objective (Esser et al., 2024, section 3.1).

    Attributes:
        times: changes the objective: density of t, uniform or logit-normal (more weight on the middle).
        mean: of logit(t), with times logit_normal; larger: more noise.
        std: standard deviation of logit(t), with times logit_normal.
        shift: changes the objective, and the steps of sampling: t becomes shift t / (1 + (shift - 1) t); above 1: more
            noise, for larger images (Esser et al., 2024, equation 23); 1: no change.
        prediction: "sample": the network puts out the image, from which the velocity is computed, for transformers on
            large patches of pixels (JiT; Li and He, 2025); changes the objective at times below 0.05.
        posterior_mean: replace the image in the target by its posterior mean over all training images, which gives the
            same expected gradient with less noise (Bertrand et al., 2025); for small data sets.
        label_dropout: share of labels replaced by "no label", for classifier-free guidance, in [0, 1].
    """

    times: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    prediction: Literal["velocity", "sample"] = "velocity"
    posterior_mean: bool = False
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.times == "uniform" and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"mean and std must be given with times logit_normal only, got {self.mean} and {self.std} with uniform"
            )
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std and shift must be above 0, got {self.std} and {self.shift}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")

    @property
    def infobatch(self) -> dict[str, Any]:
        """What --infobatch alone means: gradients differ between levels only with posterior means as targets."""
        if not self.posterior_mean:
            return {"pruning.policy": "full"}
        best = {"pruning.policy": "importance", "pruning.over": "levels", "pruning.budget": 0.714}
        return best | {"optim.compensation": 0.5}

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network; one that predicts images inside a `VelocityFromImage`."""
        return VelocityFromImage(model) if self.prediction == "sample" else model

    def time(self, level: Tensor) -> Tensor:
        """The times t in [0, 1] of levels in [0, 1), float32 [B]; t = 1 is pure noise."""
        t = level if self.times == "uniform" else normal_quantile(level, self.mean, self.std).sigmoid()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def path(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the image and of the noise in x_t at levels in [0, 1), float32 [B] each."""
        time = self.time(level)
        return 1 - time, time

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG, references: References | None = None) -> Losses:
        """The squared error of the velocity at `time(level)`; the network is called with 1000 t.

        With `references` the target is its posterior mean, (x_t - E[x | x_t]) / t. With a predicted image the loss is
        the image's squared error over max(t, 0.05)^2; a model that does not come from `prepare` raises ValueError.
        """
        x, noise, time = batch.image, rng.normal(*batch.image.shape[1:]), self.time(batch.level)
        t = rearrange(time, "b -> b 1 1 1")
        x_t = (1 - t) * x + t * noise
        label = drop_labels(batch.label, self.label_dropout, rng)
        velocity = model(x_t, 1000 * time, label)
        if references is not None:
            x, noise = references.means(x, noise, x_t, 1 - time, time, label)
        target = noise - x if self.prediction == "velocity" else (noise - x) * shrinkage(model, t)
        return Losses(reduce((velocity - target).square(), "b c h w -> b", "mean"))

    def scheduler(self) -> Any:
        """Euler's method from t = 1 to 0, its steps spaced by `shift`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.shift)
